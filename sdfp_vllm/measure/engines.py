"""Runs vLLM engines in processes of their own, and compares them.

Engines are compared one process each: none inherits the other's memory, caches or compiled
code. `run_engines` starts `python -m sdfp_vllm.measure.worker FOLDER` for each, and tells it turn by turn to go on.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure.spec import EngineSpec, Measurement

_LOG_LINES = 25
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 0.2
_STARTING = 2  # engines that start at once
# The engine core runs in the measured process: one process that computes, none that polls for it.
# Its KV cache on a CPU is small, where vLLM by itself would claim nine tenths of the machine.
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def _unheard(text: str) -> None:
    """Takes the text of streamed turns that nobody asked for."""


def run_engine(spec: EngineSpec, on_text: Callable[[str], None] = _unheard) -> Measurement:
    """Runs `spec` in a process of its own. See `run_engines`."""
    return run_engines([spec], on_text=on_text)[0]


def run_engines(
    specs: Sequence[EngineSpec],
    on_step: Callable[[int, int], None] = lambda engine, done: None,
    goes_on: Callable[[int], bool] = lambda turn: True,
    on_text: Callable[[str], None] = _unheard,
) -> list[Measurement]:
    """Runs all engines at once but in turns: turn 0 on each that has one, then turn 1 on each, and so on.

    A machine whose speed drifts so slows all of them alike. Engines that are not at work are
    stopped (SIGSTOP), because an idle vLLM engine polls; they keep their memory. Two start at a time. Every
    process is gone when this returns or is interrupted.

    Args:
        specs: One per engine.
        on_step: Called as (engine at work, steps done); an engine's start and each turn are a step.
        goes_on: Asked before each turn; False ends the run, with the turns so far.
        on_text: Given the text of streamed turns, piece by piece while they run; the pieces join to the whole text.

    Raises:
        SdfpError: If an engine fails; carries the end of its output.
    """
    done = 0
    with tempfile.TemporaryDirectory(prefix="sdfp-") as folder, contextlib.ExitStack() as stack:
        engines: list[_EngineProcess] = []
        for i, spec in enumerate(specs):
            (Path(folder) / str(i)).mkdir()
            engines.append(_EngineProcess(spec, Path(folder) / str(i)))
        # Importing, loading and compiling use one core for the most part: two engines start together.
        for i, engine in enumerate(engines):
            on_step(i, done)
            for other in engines[i : i + _STARTING]:
                if not other.started:
                    stack.enter_context(other)
            engine.wait(_unheard)
            engine.pause()
            done += 1
        for turn in range(max(len(spec.turns) for spec in specs)):
            if not goes_on(turn):
                break
            for i, engine in enumerate(engines):
                if turn < len(engine.spec.turns) and engine.spec.turns[turn] is not None:
                    on_step(i, done)
                    engine.resume()
                    engine.next_turn(on_text)
                    engine.pause()
                    done += 1
        return [engine.finish() for engine in engines]


class _EngineProcess:
    """`python -m sdfp_vllm.measure.worker` in a process group: told by a line on stdin, answers by a byte in a file."""

    def __init__(self, spec: EngineSpec, folder: Path):
        self.spec, self.folder = spec, folder
        self.result, self.progress, self.log = folder / "result.json", folder / "progress", folder / "log"
        self.text = folder / "text"
        self.started = False
        self._answers = 0  # that were waited for: to its start, and to each turn
        self._told = 0  # bytes of the text
        # What is read may end within a character: its first bytes wait here for the others.
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def __enter__(self) -> _EngineProcess:
        self.started = True
        (self.folder / "spec.json").write_text(self.spec.model_dump_json())
        self.progress.touch()
        self.text.touch()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sdfp_vllm.measure.worker", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_SETTINGS | dict(os.environ) | self.spec.environment,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def pause(self) -> None:
        time.sleep(_SETTLE_SECONDS)  # a step that the engine began ahead of need ends
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def next_turn(self, on_text: Callable[[str], None]) -> None:
        with contextlib.suppress(BrokenPipeError):  # `wait` says why it died
            self.process.stdin.write(b"\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        self.wait(on_text)

    def wait(self, on_text: Callable[[str], None]) -> None:
        """For one more answer than until now."""
        self._answers += 1
        while self.progress.stat().st_size < self._answers:
            if self.process.poll() is not None:
                raise self._failure()
            time.sleep(_POLL_SECONDS)
            self._tell(on_text)
        self._tell(on_text)  # what was written before the answer, and after the last look

    def _tell(self, on_text: Callable[[str], None]) -> None:
        with self.text.open("rb") as file:
            file.seek(self._told)
            new = file.read()
        self._told += len(new)
        if text := self._decoder.decode(new):
            on_text(text)

    def finish(self) -> Measurement:
        self.resume()
        self.process.stdin.close()  # type: ignore[union-attr]
        while not self.result.exists():
            if self.process.poll() is not None and not self.result.exists():
                raise self._failure()
            time.sleep(_POLL_SECONDS)
        return Measurement.model_validate_json(self.result.read_text())

    def _failure(self) -> SdfpError:
        output = self.log.read_text(errors="replace").strip().splitlines()
        method = (self.spec.speculative or {}).get("method", "plain decoding")
        return SdfpError(
            f"vLLM engine ({method}) on {self.spec.model}",
            f"failed with exit status {self.process.returncode}",
            "Correct what its last lines name; VLLM_LOGGING_LEVEL=INFO makes it say more.",
            log="\n".join(output[-_LOG_LINES:]),
        )
