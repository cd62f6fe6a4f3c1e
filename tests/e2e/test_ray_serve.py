"""`serve run` with two replicas, as a user starts it, under concurrent streams of the `openai` client."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from tests import toy
from tests.support import servers
from tests.support.engines import engine, write_plan

pytest.importorskip("ray")
pytestmark = [pytest.mark.engine, pytest.mark.more]

ROOT = Path(__file__).parents[2]
MODEL = toy.MODEL
PROMPTS = ["import os\n\n\ndef main(", "class Node:\n    def __init__(self", "for i in range("]
TOKENS = 400
REPLICA = "ray::ServeReplica:sdfp:Engine"


def engine_core(replica: psutil.Process) -> psutil.Process | None:
    return next((c for c in replica.children() if (c.cmdline() or [""])[0] == "VLLM::EngineCore"), None)


def replicas(server: subprocess.Popen) -> list[psutil.Process]:
    """The engine replicas' processes, ready or not: what follows REPLICA in a title is the last call, not the state."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            title = (process.cmdline() or [""])[0]
        except psutil.Error:
            continue
        if title.startswith(REPLICA):
            found.append(process)
    return found


def metrics_page(url: str) -> tuple[str, str]:
    """When the replica that answers was started, and its metrics; the gateway picks a replica that is ready."""
    page = urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30).read().decode()
    return re.search(r"^process_start_time_seconds (\S+)$", page, re.M)[1], page


def metrics(url: str, name: str) -> dict[str, float]:
    """A metric of vLLM's by replica, asked for until both have answered."""
    found: dict[str, float] = {}
    while len(found) < 2:
        started, page = metrics_page(url)
        found[started] = float(re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", page, re.M)[1])
    return found


def wait_until(what: str, true, seconds: float = 300, log: Path | None = None) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}\n{log.read_text()[-4000:] if log else ''}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def plain() -> list[str]:
    from vllm import SamplingParams

    with engine(MODEL) as llm:
        outputs = llm.generate(
            PROMPTS, SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True), use_tqdm=False
        )
        return [o.outputs[0].text for o in outputs]


@pytest.fixture(scope="module")
def server(plain, tmp_path_factory) -> Iterator[tuple[subprocess.Popen, str]]:
    """The repository's own Serve config, with another port, a route prefix, a plan made by hand and one process per
    engine less."""
    folder = tmp_path_factory.mktemp("serve")
    config = yaml.safe_load((ROOT / "examples" / "ray_serve.yaml").read_text())
    port = config["http_options"]["port"] = servers.free_port()
    config["applications"][0]["route_prefix"] = "/llm"
    args = config["applications"][0]["args"]
    args["plan"] = write_plan(MODEL, folder / "plan", [0, 5, 15], k=3)
    args["engine"]["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log"
    command = [
        str(Path(sys.executable).parent / "serve"),
        "run",
        str(folder / "serve.yaml"),
        "--address",
        "local",
    ]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as f:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=f, start_new_session=True)

    url = f"http://127.0.0.1:{port}/llm/v1"
    answered = set()

    def up() -> bool:
        said = log.read_text()
        assert process.poll() is None and "build_serve_application failed" not in said, said[-4000:]
        with contextlib.suppress(OSError):  # the gateway isn't there yet, or it has no replica
            answered.add(metrics_page(url)[0])
        return len(answered) == 2

    try:
        wait_until("two replicas are up", up, log=log)
        yield process, url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            for left in (
                [process, *psutil.Process(process.pid).children(True)] if process.poll() is None else []
            ):
                left.kill()


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=server[1], api_key="none", max_retries=0, timeout=300)


def stream(client, i: int, first: threading.Event | None = None, go_on: threading.Event | None = None) -> str:
    """Streams prompt `i`; sets `first` after the first piece, then waits for `go_on`."""
    text = ""
    request = dict(model="demo", prompt=PROMPTS[i % 3], max_tokens=TOKENS, temperature=0.0, stream=True)
    request["extra_body"] = {"ignore_eos": True}
    for chunk in client.completions.create(**request):
        text += chunk.choices[0].text
        if first and not first.is_set():
            first.set()
            go_on.wait(60)
    return text


def test_concurrent_streams_equal_plain_vllm(client, plain):
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda i: stream(client, i), range(12)))
    assert texts == plain * 4


def test_errors_keep_vllms_form(client):
    from openai import NotFoundError

    with pytest.raises(NotFoundError, match="does not exist"):
        client.completions.create(model="another", prompt="x")


def test_a_client_that_leaves_takes_its_request_off_the_engine(server, client):
    before = sum(metrics(server[1], "generation_tokens_total").values())
    request = dict(model="demo", prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0.0, stream=True)
    with client.completions.create(**request, extra_body={"ignore_eos": True}) as answer:
        next(iter(answer))
    wait_until("nothing runs", lambda: not any(metrics(server[1], "num_requests_running").values()), 60)
    assert 0 < sum(metrics(server[1], "generation_tokens_total").values()) - before < TOKENS


def test_a_killed_replica_takes_only_its_own_streams_with_it(server, client, plain):
    """SIGKILL to one of two replicas while eight clients stream; four more come right after."""
    from openai import APIError

    before = replicas(server[0])
    assert len(before) == 2
    firsts, go_on = [threading.Event() for _ in range(8)], threading.Event()
    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(stream, client, i, first, go_on) for i, first in enumerate(firsts)]
        for first in firsts:
            assert first.wait(120)
        before[0].kill()
        go_on.set()
        later = [pool.submit(stream, client, i) for i in range(4)]
        assert [f.result() for f in later] == [plain[i % 3] for i in range(4)]
        lost = 0
        for i, future in enumerate(running):
            try:
                assert future.result() == plain[i % 3]
            except APIError as e:
                assert "the replica that was answering died" in str(e)
                lost += 1
    assert 1 <= lost < 8
    wait_until("the replica is replaced", lambda: len(replicas(server[0])) == 2, 60)


@pytest.mark.slow
def test_a_replica_whose_engine_dies_is_replaced(server):
    """The replica's own process lives on: only the health check can tell."""
    metrics(server[1], "num_requests_running")  # the two that answer have engines
    replica = replicas(server[0])[0]
    core = engine_core(replica)
    assert core is not None
    core.kill()
    wait_until("the replica is stopped", lambda: not replica.is_running(), 120)
    wait_until("another is started", lambda: len(replicas(server[0])) == 2, 60)
