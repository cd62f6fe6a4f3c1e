"""Generates with one vLLM engine in a process of its own, and measures it.

Engines are compared one process each: none inherits the other's memory, caches or compiled
code. `run_engines` starts `python -m sdfp_vllm.measure.engines FOLDER` for each, which builds `LLM`,
warms it up, generates turn by turn and writes one JSON result.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdfp_vllm.errors import SdfpError

_WARM_UP_TOKENS = 16
_LOG_LINES = 25
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1
_STARTING = 2  # engines that start at once
# The engine core runs in the measured process: one process that computes, none that polls for it.
# Its KV cache on a CPU is small, where vLLM by itself would claim nine tenths of the machine.
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_ENGINE = {"distributed_executor_backend": "uni"}


class Turn(BaseModel):
    """Requests that an engine answers in one go, while the other engines wait. Prompts are text, or token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: list[list[int] | str] = Field(min_length=1)
    batch: int = Field(default=1, ge=1)  # so many at a time
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    window: int | Literal["none"] | None = None  # last tokens that SDFP drafts see; None: as it is set up
    copies: bool | None = None  # whether a paced SDFP engine may copy from the context; None: as it is set up


class EngineSpec(BaseModel):
    """One engine and what it shall generate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    turns: list[Turn] = Field(min_length=1)
    warm_up: list[int] | str
    speculative: dict[str, Any] | None = None  # vLLM's speculative_config
    ignore_eos: bool = False
    seed: int | None = (
        None  # of the engine and of every request; None for requests without, which alone are paced
    )
    dtype: str = "auto"
    engine: dict[str, Any] = {}  # further arguments of LLM()
    environment: dict[str, str] = {}


class TurnMeasurement(BaseModel):
    """What one turn gave.

    Attributes:
        seconds: The whole requests'.
        decode_seconds: From the first token to the last, which is what drafting changes.
        draft_seconds: Spent in the drafter.
        rounds, draft_tokens, accepted_tokens, accepted_per_position: vLLM's own metrics;
            `accepted_per_position[j]` counts the rounds in which draft token j was accepted.
        paced: (batch size, rows verified, draft steps that followed) of rounds, and their count; empty where not paced.
    """

    token_ids: list[list[int]]
    texts: list[str]
    seconds: float
    decode_seconds: float
    draft_seconds: float = 0.0
    rounds: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    paced: list[tuple[int, int, int, int]] = []

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens per verification round that had a draft: accepted ones and the target's own (as in vLLM)."""
        return 1 + self.accepted_tokens / self.rounds if self.rounds else None


class Measurement(BaseModel):
    """What one engine gave, by turn, warm-up excluded. Times are in seconds."""

    turns: list[TurnMeasurement]
    start_seconds: float
    kv_bytes_per_token: float | None
    vllm_version: str

    @property
    def whole(self) -> TurnMeasurement:
        """All turns as one."""
        positions = itertools.zip_longest(*(t.accepted_per_position for t in self.turns), fillvalue=0)
        paced: Counter[tuple[int, ...]] = Counter()
        for *key, count in itertools.chain.from_iterable(t.paced for t in self.turns):
            paced[tuple(key)] += count
        return TurnMeasurement(
            token_ids=[ids for t in self.turns for ids in t.token_ids],
            texts=[text for t in self.turns for text in t.texts],
            accepted_per_position=[sum(counts) for counts in positions],
            paced=[(*key, count) for key, count in sorted(paced.items())],  # type: ignore[misc]
            **{
                name: sum(getattr(t, name) for t in self.turns)
                for name in (
                    "seconds", "decode_seconds", "draft_seconds", "rounds", "draft_tokens", "accepted_tokens",
                )
            },
        )  # fmt: skip

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over request time, prefill included."""
        whole = self.whole
        return sum(map(len, whole.token_ids)) / whole.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after each request's first, over the time they took. 0 where all have one token."""
        whole = self.whole
        later = sum(len(ids) - 1 for ids in whole.token_ids)
        return later / whole.decode_seconds if whole.decode_seconds else 0.0


def one_by_one(prompts: Sequence[list[int] | str], max_tokens: int, temperature: float = 0.0) -> list[Turn]:
    """A turn for each prompt."""
    return [Turn(prompts=[p], max_tokens=max_tokens, temperature=temperature) for p in prompts]


def run_engine(spec: EngineSpec) -> Measurement:
    """Runs `spec` in a process of its own. See `run_engines`."""
    return run_engines([spec])[0]


def run_engines(
    specs: Sequence[EngineSpec],
    on_step: Callable[[int, int], None] = lambda engine, done: None,
    goes_on: Callable[[int], bool] = lambda turn: True,
) -> list[Measurement]:
    """Runs all engines at once but in turns: turn 0 on each, then turn 1 on each, and so on.

    A machine whose speed drifts so slows all of them alike. Engines that are not at work are
    stopped (SIGSTOP), because an idle vLLM engine polls; they keep their memory. Two start at a time. Every
    process is gone when this returns or is interrupted.

    Args:
        specs: One per engine.
        on_step: Called as (engine at work, steps done); an engine's start and each turn are a step.
        goes_on: Asked before each turn; False ends the run, with the turns so far.

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
            engine.wait_for(1)
            engine.pause()
            done += 1
        for turn in range(max(len(spec.turns) for spec in specs)):
            if not goes_on(turn):
                break
            for i, engine in enumerate(engines):
                if turn < len(engine.spec.turns):
                    on_step(i, done)
                    engine.resume()
                    engine.next_turn()
                    engine.wait_for(turn + 2)
                    engine.pause()
                    done += 1
        return [engine.finish() for engine in engines]


class _EngineProcess:
    """`python -m sdfp_vllm.measure.engines` in a process group: told by a line on stdin, answers by a byte in a file."""

    def __init__(self, spec: EngineSpec, folder: Path):
        self.spec, self.folder = spec, folder
        self.result, self.progress, self.log = folder / "result.json", folder / "progress", folder / "log"
        self.started = False

    def __enter__(self) -> _EngineProcess:
        self.started = True
        (self.folder / "spec.json").write_text(self.spec.model_dump_json())
        self.progress.touch()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sdfp_vllm.measure.engines", str(self.folder)],
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

    def next_turn(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # wait_for says why it died
            self.process.stdin.write(b"\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def wait_for(self, answers: int) -> None:
        while self.progress.stat().st_size < answers:
            if self.process.poll() is not None:
                raise self._failure()
            time.sleep(_POLL_SECONDS)

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


def measure(spec: EngineSpec, ready: Callable[[], bool] = lambda: True) -> Measurement:
    """Builds the engine in this process and generates. Use `run_engine` unless this process is for it alone.

    Args:
        ready: Called before each turn, outside of the timing, and once after the last; may block. False ends the run.
    """
    import vllm
    from vllm import LLM, SamplingParams

    from sdfp_vllm.engine.inspect_engine import (
        DraftingTime,
        allow_copies,
        kv_bytes_per_token,
        narrow_drafts,
        rounds_paced,
    )

    began = time.perf_counter()
    llm = LLM(
        spec.model,
        dtype=spec.dtype,  # type: ignore[arg-type]  # vLLM refuses what it does not know
        seed=spec.seed or 0,
        speculative_config=spec.speculative,
        disable_log_stats=False,
        **(_ENGINE | spec.engine),
    )
    start_seconds = time.perf_counter() - began

    spent = DraftingTime(llm)

    def generate(prompts: Sequence[list[int] | str], max_tokens: int, temperature: float) -> list[Any]:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, ignore_eos=spec.ignore_eos, seed=spec.seed
        )
        requests: Any = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        return llm.generate(requests, params, use_tqdm=False)

    def run(turn: Turn) -> TurnMeasurement:
        if turn.copies is not None:
            allow_copies(llm, turn.copies)
        if turn.window is not None:
            narrow_drafts(llm, turn.window)
        before, drafting, paced = _draft_counters(llm), spent.seconds, rounds_paced(llm)
        outputs, decoding = [], 0.0
        began = time.perf_counter()
        for i in range(0, len(turn.prompts), turn.batch):
            chunk = generate(turn.prompts[i : i + turn.batch], turn.max_tokens, turn.temperature)
            outputs += chunk
            decoding += max(o.metrics.last_token_ts for o in chunk) - min(
                o.metrics.first_token_ts for o in chunk
            )
        seconds = time.perf_counter() - began
        after = _draft_counters(llm)
        counted = {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in after}
        return TurnMeasurement(
            token_ids=[list(o.outputs[0].token_ids) for o in outputs],
            texts=[o.outputs[0].text for o in outputs],
            seconds=seconds,
            decode_seconds=decoding,
            draft_seconds=spent.seconds - drafting,
            rounds=sum(counted["num_drafts"]),
            draft_tokens=sum(counted["num_draft_tokens"]),
            accepted_tokens=sum(counted["num_accepted_tokens"]),
            accepted_per_position=counted["num_accepted_tokens_per_pos"],
            paced=[(*key, count) for key, count in sorted((rounds_paced(llm) - paced).items())],
        )

    generate([spec.warm_up], _WARM_UP_TOKENS, 0.0)
    turns: list[TurnMeasurement] = []
    while ready() and len(turns) < len(spec.turns):
        turns.append(run(spec.turns[len(turns)]))
    return Measurement(
        turns=turns,
        start_seconds=start_seconds,
        kv_bytes_per_token=kv_bytes_per_token(llm),
        vllm_version=vllm.__version__,
    )


def _draft_counters(llm: Any) -> dict[str, list[int]]:
    """vLLM's speculative-decoding counters, all zero-length where the engine drafts nothing."""
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
    found: dict[str, list[int]] = {name: [] for name in names}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:spec_decode_")
        if name in found:
            found[name] = list(metric.values) if hasattr(metric, "values") else [int(metric.value)]
    return found


def die_with_parent() -> None:
    """Ends this process when its parent does, however that ends: a stopped engine would else stay for ever (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """The engine's side: announces each moment of readiness with a byte, then waits for a line or the end of stdin."""
    die_with_parent()
    folder = Path(sys.argv[1])
    with (folder / "progress").open("ab", buffering=0) as progress:

        def ready() -> bool:
            progress.write(b".")
            return bool(sys.stdin.readline())

        measurement = measure(EngineSpec.model_validate_json((folder / "spec.json").read_text()), ready)
    new = folder / "result.new"
    new.write_text(measurement.model_dump_json())
    new.rename(folder / "result.json")


if __name__ == "__main__":
    main()
