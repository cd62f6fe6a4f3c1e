"""`vllm serve` under load: plain vLLM, SDFP drafting nothing, a built-in method, SDFP, in turns.

    make bench-serve
    python -m benchmarks.serving [MODEL] [--questions FILE.jsonl] [--loads 1,2,4,8,16] [--out FILE]
    python -m benchmarks.serving validate FILE

Real servers, the engine in a process of its own, with vLLM's defaults but float32 and a small KV cache; driven by vLLM's own
client over loopback with chats, greedy. Servers take turns at each load, those not asked are stopped (SIGSTOP); each load is
repeated with other prompts, and no prompt comes twice. A load is a number of requests at once, or `r` and requests a second
(`r0.5`). Ratios are to the first server, which has no plugin loaded at all. `validate` refuses a file whose servers differ in
anything else, whose prompts repeat or whose answers differ in length; a ratio within the spread of its repeats is told as ~1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.serving.figures import PLAIN, draw, problems, rows_of, table
from benchmarks.serving.load import under_load
from benchmarks.serving.server import Server, serve
from sdfp_vllm.common.json_lines import json_rows
from sdfp_vllm.common.provenance import provenance, weights_of
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.demo.methods import speculative
from sdfp_vllm.demo.questions import OWN
from sdfp_vllm.demo.run import plan_for
from sdfp_vllm.demo.smollm2 import smollm2
from sdfp_vllm.plan.fingerprint import fingerprint, resolve_model_dir
from sdfp_vllm.plan.store import default_plan_dir
from sdfp_vllm.planner.calibration import chat_of

IDLE, SDFP = "SDFP, drafting nothing", "SDFP"
NOTHING = [[1, 1 << 20, 0]]  # no drafts at any batch size


def main() -> None:
    if sys.argv[1:2] == ["validate"]:
        content = json.loads(Path(sys.argv[2]).read_text())
        sys.exit("; ".join(problems(content)) or None)
    asked = _arguments()
    console = Console(stderr=True)
    folder = resolve_model_dir(asked.model) if asked.model else smollm2()
    plan_for(folder, "float32", asked.eager, console)
    methods = _servers(str(default_plan_dir(fingerprint(folder))), asked.rival)
    methods = {n: c for n, c in methods.items() if n == PLAIN or not asked.only or n in asked.only.split(";")}
    settings = [
        *("--max-model-len", str(asked.max_model_len)),
        *("--max-num-seqs", str(asked.seats)),
        *(["--enforce-eager"] if asked.eager else []),
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    loads = _loads(_prompts(asked.questions), asked.loads.split(","), asked.repeats, asked.seconds)
    runs: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="serving-") as work:
        servers: dict[str, Server] = {}
        names = list(methods)
        # Starting uses one core for the most part: two at once.
        for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
            with ThreadPoolExecutor(2) as pool, console.status(f"Starting {', '.join(pair)}"):
                started = [
                    pool.submit(
                        lambda n: stack.enter_context(
                            serve(
                                folder,
                                *_flags(methods[n]),
                                settings=settings,
                                environment=environment | ({"VLLM_PLUGINS": ""} if n == PLAIN else {}),
                                start_seconds=900,
                            )
                        ),
                        name,
                    )
                    for name in pair
                ]
                for name, future in zip(pair, started, strict=True):
                    servers[name] = future.result()
            for name in pair:
                servers[name].pause()
        for step, load in enumerate(loads):
            turn = step % len(names)  # another one is first each time
            for name in names[turn:] + names[:turn]:
                with console.status(f"{name} at load {load['load']} (repeat {load['repeat'] + 1})"):
                    servers[name].resume()
                    got = under_load(
                        servers[name],
                        folder,
                        load["texts"],
                        concurrency=load["concurrency"],
                        rate=load["rate"],
                        tokens=asked.tokens,
                        goodput=asked.goodput,
                        folder=Path(work),
                    )
                    servers[name].pause()
                runs.append({"server": name, "load": load["load"], "repeat": load["repeat"]} | got)
                console.print(
                    f"{name:24} load {load['load']:>4}: {got['output_throughput']:6.1f} tokens/s, TPOT "
                    f"{got['mean_tpot_ms']:6.1f} ms, p99 {got['p99_tpot_ms']:6.1f} ms",
                    highlight=False,
                )
    rows = rows_of(runs)
    content = {
        "command": f"python -m benchmarks.serving {folder.name} --loads {asked.loads} --repeats {asked.repeats}",
        "model": folder.name,
        "weights": asked.provenance or weights_of(asked.model or str(folder), folder),
        "engine": "eager" if asked.eager else "compiled",
        "questions": asked.questions.name if asked.questions else "the project's own",
        "tokens": asked.tokens,
        "goodput": asked.goodput,
        "servers": [
            {"name": n, "speculative": methods[n], "settings": settings, "environment": environment}
            for n in names
        ],
        "loads": [
            {"load": x["load"], "repeat": x["repeat"], "prompts": [_hash(t) for t in x["texts"]]}
            for x in loads
        ],
        "rows": rows,
        "runs": runs,
        "provenance": provenance(),
    }
    for s in content["servers"]:
        s["speculative"] = (s["speculative"] or {}) | ({"model": "PLAN"} if "SDFP" in s["name"] else {})
    if asked.out:
        save_results(asked.out, content)
        draw(
            rows,
            f"{folder.name}, float32, {content['engine']}: vllm serve under load",
            asked.out.with_suffix(".png"),
        )
    Console(width=140).print(table(rows))
    if why := problems(content):
        sys.exit("Not to be claimed: " + "; ".join(why))


def _servers(plan: str, rival: str) -> dict[str, dict[str, Any] | None]:
    """Each server's `--speculative-config`."""
    sdfp = {"method": "sdfp", "model": plan}
    return {
        PLAIN: None,
        IDLE: sdfp | {"num_speculative_tokens_per_batch_size": NOTHING},
        rival: speculative(rival, {}),
        SDFP: sdfp,
    }


def _flags(config: dict[str, Any] | None) -> list[str]:
    return ["--speculative-config", json.dumps(config)] if config else []


def _prompts(file: Path | None) -> list[str]:
    """The first thing that is asked in each row."""
    file = file or OWN
    return [chat_of(row, where)[1][-1]["content"] for _, where, row in json_rows(file, file.name)]


def _loads(prompts: list[str], names: list[str], repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Each load with prompts of its own, as many as there are, more where more are asked at once."""
    plans: list[tuple[int | None, float]] = [
        (None, float(n[1:])) if n.startswith("r") else (int(n), float("inf")) for n in names
    ]
    weights = [4 + (c or rate * seconds) for c, rate in plans]
    share = len(prompts) / (sum(weights) * repeats)
    order = iter(prompts[i] for k in range(7) for i in range(k, len(prompts), 7))  # kinds mixed
    out = []
    for repeat in range(repeats):
        for name, (concurrency, rate), weight in zip(names, plans, weights, strict=True):
            count = max(2, concurrency or 0, int(weight * share))
            texts = [t for _, t in zip(range(count), order, strict=False)]
            if len(texts) < count:
                sys.exit("too few questions for these loads and repeats: give more with --questions")
            out.append(
                dict(load=name, concurrency=concurrency, rate=rate, repeat=repeat, texts=texts),
            )
    return out


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--questions", type=Path, help="jsonl with turns, messages or prompt; default: the project's own")  # fmt: skip
    parser.add_argument("--loads", default="1,2,4")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="how long a load by rate is kept up")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--rival", default="ngram", choices=["ngram", "suffix"])
    parser.add_argument("--only", help="these servers beside the first, separated by semicolons")
    parser.add_argument("--goodput", default="tpot:100", help="objectives, as vLLM's client takes them")
    parser.add_argument("--seats", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--provenance", default="", help="where the weights come from, for the results file")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
