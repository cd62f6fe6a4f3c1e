"""A bounded soak of `vllm serve` with SDFP on loopback: rough clients first, then the books are checked.

Plain vLLM answers a pool of prompts once, then its engine process is killed. Then a server with
SDFP takes, for the given seconds, clients that complete, stream, hang up in mid-stream, send
nonsense, and burst past the seats. Afterwards the server must answer, every greedy answer must have
been plain vLLM's, no request may be left running, KV use must be back at zero and memory flat; and
its engine process killed, it must end as plain vLLM did. Exits 1 where one of these fails.

    python -m benchmarks.studies.soak --plan PLAN [--model MODEL] [--seconds 120] [--clients 6]

The test suite runs two minutes of it (`tests/engine_v1/test_soak.py`); by hand, half an hour:
`--seconds 1800`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.server import SEATS, Server, kill_engine, serve, tail

FLAT_MIB = 48  # memory may grow by this between the first third and the end
NONSENSE: list[tuple[str, Any]] = [
    ("not JSON", "{"),
    ("no prompt", {"max_tokens": 4}),
    ("wrong type", {"prompt": "x", "max_tokens": "many"}),
    ("negative length", {"prompt": "x", "max_tokens": -5}),
    ("token outside the vocabulary", {"prompt": [10**7], "max_tokens": 4}),
    ("longer than the model", {"prompt": "x = 1\n" * 2000, "max_tokens": 4}),
    ("refused with speculation", {"prompt": "x", "logit_bias": {"5": 3.0}}),
    ("bad grammar", {"prompt": "x", "structured_outputs": {"regex": "("}}),
    ("unknown model", {"prompt": "x", "model": "no-such-model"}),
]


# ---------------------------------------------------------------- requests
def pool_of_prompts(count: int = 24) -> list[dict[str, Any]]:
    """Greedy requests of mixed prompt length and answer length, the same every time."""
    source = inspect.getsource(argparse) + inspect.getsource(random)
    rng = random.Random(0)
    requests = []
    for _ in range(count):
        start, length = rng.randrange(len(source) - 800), rng.choice([1, 10, 80, 300, 600])
        requests.append({"prompt": source[start : start + length], "max_tokens": rng.choice([1, 8, 32, 96])})
    return requests


def body(request: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "target", "temperature": 0.0, "ignore_eos": True, **request, **more}


async def complete(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    response = await client.post("/v1/completions", json=body(request))
    response.raise_for_status()
    return response.json()["choices"][0]["text"]


async def stream(client: httpx.AsyncClient, request: dict[str, Any]) -> AsyncIterator[str]:
    async with client.stream("POST", "/v1/completions", json=body(request, stream=True)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def client_of(server: Server) -> httpx.AsyncClient:
    # A connection for each request: the server closes idle ones, and reusing one may meet that halfway.
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


async def answers(server: Server, pool: list[dict[str, Any]]) -> list[str]:
    async with client_of(server) as client:
        return list(await asyncio.gather(*(complete(client, r) for r in pool)))


# ---------------------------------------------------------------- the soak
class Soak:
    """Clients of every kind; `counts` says what was done, `failures` what should not have been."""

    def __init__(self, server: Server, pool: list[dict[str, Any]], want: list[str], seed: int):
        self.server, self.pool, self.want = server, pool, want
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def check(self, what: str, i: int, text: str) -> None:
        self.counts[what] += 1
        if text != self.want[i]:
            self.failures.append(f"{what}: answer {i} is {text!r}, plain vLLM's is {self.want[i]!r}")

    async def completes(self, client: httpx.AsyncClient) -> None:
        i = self.rng.randrange(len(self.pool))
        self.check("completed", i, await complete(client, self.pool[i]))

    async def streams(self, client: httpx.AsyncClient) -> None:
        i = self.rng.randrange(len(self.pool))
        self.check("streamed", i, "".join([part async for part in stream(client, self.pool[i])]))

    async def hangs_up(self, client: httpx.AsyncClient) -> None:
        i = self.rng.randrange(len(self.pool))
        leave_after, text = self.rng.randrange(1, 6), ""
        parts = stream(client, {**self.pool[i], "max_tokens": 200, "prompt": self.pool[i]["prompt"][:300]})
        async with contextlib.aclosing(parts) as parts:  # type: ignore[type-var]
            async for part in parts:
                text, leave_after = text + part, leave_after - 1
                if leave_after == 0:
                    break
        self.counts["hung up"] += 1

    async def samples(self, client: httpx.AsyncClient) -> None:
        i = self.rng.randrange(len(self.pool))
        response = await client.post(
            "/v1/completions", json=body(self.pool[i], temperature=0.9, top_p=0.9, n=2)
        )
        response.raise_for_status()
        self.counts["sampled"] += 1

    async def talks_nonsense(self, client: httpx.AsyncClient) -> None:
        name, nonsense = self.rng.choice(NONSENSE)
        content = nonsense if isinstance(nonsense, str) else json.dumps({"model": "target", **nonsense})
        response = await client.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        self.counts["refused"] += 1
        if not 400 <= response.status_code < 500:
            self.failures.append(
                f"nonsense ({name}) was answered {response.status_code}: {response.text[:300]}"
            )

    async def bursts(self, client: httpx.AsyncClient) -> None:
        several = [self.rng.randrange(len(self.pool)) for _ in range(3 * SEATS)]
        texts = await asyncio.gather(*(complete(client, self.pool[i]) for i in several))
        for i, text in zip(several, texts, strict=True):
            self.check("in a burst", i, text)

    async def client(self, until: float) -> None:
        kinds = [self.completes, self.streams, self.hangs_up, self.samples, self.talks_nonsense]
        async with client_of(self.server) as client:
            while time.monotonic() < until:
                act = self.bursts if self.rng.random() < 0.03 else self.rng.choice(kinds)
                try:
                    await act(client)
                except (httpx.HTTPError, KeyError, ValueError) as e:
                    self.failures.append(f"{act.__name__}: {type(e).__name__}: {e}")

    async def run(self, seconds: float, clients: int) -> list[float]:
        """Returns resident memory in MiB, sampled through the run."""
        start = time.monotonic()
        memory: list[float] = []
        tasks = [asyncio.create_task(self.client(start + seconds)) for _ in range(clients)]
        while not all(t.done() for t in tasks):
            memory.append(self.server.rss_mib())
            await asyncio.sleep(1)
        await asyncio.gather(*tasks)
        return memory


def soak(model: Path, plan: str, seconds: float, clients: int = 6, seed: int = 0) -> dict[str, Any]:
    """Runs the soak and returns what was seen; `failures` is empty where all is well."""
    pool = pool_of_prompts()
    with serve(model) as plain:
        want = asyncio.run(answers(plain, pool))
        plain_killed = kill_engine(plain)
    with serve(model, "--speculative-model", plan) as server:
        run = Soak(server, pool, want, seed)
        for i, text in enumerate(asyncio.run(answers(server, pool))):
            run.check("before", i, text)
        memory = asyncio.run(run.run(seconds, clients))
        if server.process.poll() is not None:
            raise RuntimeError(f"the server died; the end of {server.log}:\n{tail(server.log)}")
        left = settle(server)
        for i, text in enumerate(asyncio.run(answers(server, pool))):
            run.check("after", i, text)
        left = {name: max(value, left[name]) for name, value in settle(server).items()}
        run.failures += [f"{name} is {value} with no request left" for name, value in left.items() if value]
        # Buffers and the prefix cache fill up first; from then on memory has no reason to grow.
        early, late = max(memory[: len(memory) // 3 + 1]), memory[-1]
        if late > early + FLAT_MIB:
            run.failures.append(f"memory grew from {early:.0f} to {late:.0f} MiB")
        drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")
        accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
        if not 0 < accepted < drafted:
            run.failures.append(
                f"{accepted:.0f} of {drafted:.0f} drafts accepted: nothing was put to the test"
            )
        killed = kill_engine(server)
        if killed != plain_killed:
            run.failures.append(f"engine killed: {killed}, plain vLLM's: {plain_killed}")
    server.log.unlink()
    plain.log.unlink()
    return {
        "seconds": seconds,
        "requests": dict(run.counts),
        "memory_mib": {"early": round(early), "late": round(late), "highest": round(max(memory))},
        "memory_mib_every_minute": [round(m) for m in memory[::60]],
        "acceptance": round(accepted / max(drafted, 1), 3),
        "engine_killed": killed,
        "failures": run.failures,
    }


def settle(server: Server, seconds: float = 20) -> dict[str, float]:
    """Waits for the server to be idle and returns what is still in use."""
    names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    deadline = time.monotonic() + seconds
    while True:
        values = {name: server.metric(name) for name in names}
        if not any(values.values()) or time.monotonic() > deadline:
            return values
        time.sleep(0.5)


def main() -> None:
    from tests import toy

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=toy.MODEL)
    parser.add_argument("--plan", default="sdfp", help='a plan folder, or "sdfp" for the model\'s own plan')
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seen = soak(args.model, args.plan, args.seconds, args.clients, args.seed)
    print(json.dumps(seen, indent=1))
    sys.exit(1 if seen["failures"] else 0)


if __name__ == "__main__":
    main()
