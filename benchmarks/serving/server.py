"""A real `vllm serve` on a free loopback port, and what can be asked of it and done to it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

SEATS = 8
MAX_MODEL_LEN = 384
KV_MIB = 24  # little, so that a burst also throws requests out, and its pages are all touched early
# oneDNN keeps a kernel for every number of rows that it has met, up to half a GiB here; with few
# row numbers to meet, these caches are full early and memory can be asked to be flat.
BATCHED_TOKENS = 64
SMALL = (
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(SEATS), "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(KV_MIB << 20), "--max-num-batched-tokens", str(BATCHED_TOKENS)),
)
SMALL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Server:
    """A running `vllm serve` and a client for it."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def tree(self) -> list[psutil.Process]:
        """The server's process and all its children."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def pause(self) -> None:
        """Stops it: an idle engine polls, and would disturb whoever is measured."""
        for p in self.tree():
            p.suspend()

    def resume(self) -> None:
        """Lets it go on.

        Raises:
            RuntimeError: If one of its processes is no more.
        """
        try:
            for p in self.tree():
                p.resume()
        except psutil.NoSuchProcess as e:
            raise RuntimeError(
                f"a process of the server ended while others were measured ({e}): servers are in memory at once, "
                f"and if that was too much, --only takes fewer; the end of {self.log}:\n{tail(self.log)}"
            ) from e

    def rss_mib(self) -> float:
        """Resident memory of the server and all its children."""
        return sum(p.memory_info().rss for p in self.tree()) / 2**20

    def metric(self, name: str) -> float:
        """The sum over labels of a Prometheus value."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, flags=re.MULTILINE)
        if not values:
            raise RuntimeError(f"the server reports no metric {name}")
        return sum(map(float, values))


@contextlib.contextmanager
def serve(
    model: Path,
    *flags: str,
    settings: Sequence[str] = SMALL,
    environment: Mapping[str, str] = SMALL_ENVIRONMENT,
    start_seconds: float = 300,
) -> Iterator[Server]:
    """Starts `vllm serve` in float32 on a free loopback port and takes it down with its children."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "target"]
    command += ["--dtype", "float32", *settings, *flags]
    everything = {**environment, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".log", prefix="soak-", delete=False) as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=everything)
    server = Server(process, url, Path(log.name))
    try:
        deadline = time.monotonic() + start_seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vllm serve did not start; the end of {log.name}:\n{tail(server.log)}")
            time.sleep(0.5)
        yield server
    finally:
        if process.poll() is None:
            with contextlib.suppress(RuntimeError):
                server.resume()
        children = server.tree()[1:] if process.poll() is None else []
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in psutil.wait_procs(children, timeout=10)[1]:
            child.kill()


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def kill_engine(server: Server, seconds: float = 60) -> dict[str, Any]:
    """Kills the engine process (SIGKILL) under a running request, and returns what a client and an operator see.

    Comparable between servers: the answer to the request, whether the server ends by itself
    within `seconds`, with which status, which error its log names, and what is left running.
    """
    processes = server.tree()[1:]
    (engine,) = [p for p in processes if "EngineCore" in " ".join(p.cmdline())]
    request = {"model": "target", "prompt": "x = 1", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=seconds) as response:
        lines = response.iter_lines()
        next(lines)
        engine.kill()
        try:
            rest = [line for line in lines if line]
            answer = "error" if any('"error"' in line for line in rest) else "a whole answer"
        except httpx.HTTPError as e:
            answer = type(e).__name__
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(seconds)
    left = [
        p.name() for p in psutil.wait_procs(processes, timeout=10)[1] if p.status() != psutil.STATUS_ZOMBIE
    ]
    named = sorted(set(re.findall(r"\bEngine\w*Error\b", server.log.read_text(errors="replace"))))
    return {"request": answer, "exit status": server.process.returncode, "log names": named, "left": left}
