"""`vllm serve` for tests: in a process group of its own, on a free port, until it answers and until it is stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

VLLM = (str(Path(sys.executable).parent / "vllm"),)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    log: Path,
    model: str | Path,
    *flags: str,
    vllm: Sequence[str] = VLLM,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> tuple[subprocess.Popen, str]:
    """Starts a float32, eager server and waits until it answers; returns it and its URL.

    Args:
        vllm: The command that has `serve`.
        env: Beside this process's environment; the engine gets a process of its own.
    """
    port = free_port()
    command = [
        *vllm, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(env or {})}
    with log.open("w") as f:
        server = subprocess.Popen(
            command, env=environment, cwd=cwd, stdout=f, stderr=f, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(log.read_text()[-4000:])
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return server, url
        except OSError:
            time.sleep(1)
    stop(server)
    raise RuntimeError("the server did not come up:\n" + log.read_text()[-4000:])


def stop(server: subprocess.Popen) -> None:
    """Ends the server and its engine, by force where it takes longer than half a minute."""
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
