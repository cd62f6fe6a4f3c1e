"""Generates with one vLLM engine in a process of its own, and measures it.

Engines are compared one process each: none inherits the other's memory, caches or compiled
code. `run_engines` starts `python -m sdfp_vllm.measure FOLDER` for each, which builds `LLM`,
warms it up, generates one prompt at a time (batch 1) and writes one JSON result.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sdfp_vllm.errors import SdfpError

_WARM_UP_TOKENS = 16
_LOG_LINES = 25
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 0.2
# The engine core runs in the measured process: one process that computes, none that polls for it.
# Its KV cache on a CPU is small, where vLLM by itself would claim nine tenths of the machine.
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_ENGINE = {"distributed_executor_backend": "uni"}


class EngineSpec(BaseModel):
    """One engine and what it shall generate. Prompts are text, or token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    prompts: list[list[int] | str] = Field(min_length=1)
    warm_up: list[int] | str
    speculative: dict[str, Any] | None = None  # vLLM's speculative_config
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    ignore_eos: bool = False
    seed: int = 0
    dtype: str = "auto"
    engine: dict[str, Any] = {}  # further arguments of LLM()
    environment: dict[str, str] = {}


class Measurement(BaseModel):
    """What one engine gave. Times are in seconds, one entry per prompt.

    `seconds` is the whole request; `decode_seconds` runs from the first token to the last, and
    is what drafting changes. The draft counters are vLLM's own metrics, warm-up excluded.
    `accepted_per_position[j]` counts the rounds in which draft token j was accepted.
    """

    token_ids: list[list[int]]
    texts: list[str]
    seconds: list[float]
    decode_seconds: list[float]
    start_seconds: float
    rounds: int
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: list[int]
    kv_bytes_per_token: float | None
    vllm_version: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over request time, prefill included."""
        return self.tokens / sum(self.seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after each request's first, over the time they took. 0 where all have one token."""
        spent = sum(self.decode_seconds)
        return (self.tokens - len(self.token_ids)) / spent if spent else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens per verification round that had a draft: accepted ones and the target's own (as in vLLM)."""
        return 1 + self.accepted_tokens / self.rounds if self.rounds else None


def run_engine(spec: EngineSpec) -> Measurement:
    """Runs `spec` in a process of its own. See `run_engines`."""
    return run_engines([spec])[0]


def run_engines(
    specs: Sequence[EngineSpec], on_step: Callable[[int, int], None] = lambda engine, done: None
) -> list[Measurement]:
    """Runs all engines at once but in turns: prompt 0 on each, then prompt 1 on each, and so on.

    A machine whose speed drifts so slows all of them alike. Engines that are not at work are
    stopped (SIGSTOP), because an idle vLLM engine polls; they keep their memory. Every process
    is gone when this returns or is interrupted.

    Args:
        specs: One per engine.
        on_step: Called as (engine at work, steps done); an engine's start and each prompt are a step.

    Raises:
        SdfpError: If an engine fails; carries the end of its output.
    """
    done = 0
    with tempfile.TemporaryDirectory(prefix="sdfp-") as folder, contextlib.ExitStack() as stack:
        engines = []
        for i, spec in enumerate(specs):
            on_step(i, done)
            (Path(folder) / str(i)).mkdir()
            engines.append(stack.enter_context(_EngineProcess(spec, Path(folder) / str(i))))
            engines[-1].wait_for(1)
            engines[-1].pause()
            done += 1
        for turn in range(max(len(spec.prompts) for spec in specs)):
            for i, engine in enumerate(engines):
                if turn < len(engine.spec.prompts):
                    on_step(i, done)
                    engine.resume()
                    engine.next_prompt()
                    engine.wait_for(turn + 2)
                    engine.pause()
                    done += 1
        return [engine.finish() for engine in engines]


class _EngineProcess:
    """`python -m sdfp_vllm.measure` in a process group: told by a line on stdin, answers by a byte in a file."""

    def __init__(self, spec: EngineSpec, folder: Path):
        self.spec, self.folder = spec, folder
        self.result, self.progress, self.log = folder / "result.json", folder / "progress", folder / "log"

    def __enter__(self) -> _EngineProcess:
        (self.folder / "spec.json").write_text(self.spec.model_dump_json())
        self.progress.touch()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sdfp_vllm.measure", str(self.folder)],
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

    def next_prompt(self) -> None:
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
            f"failed with exit status {self.process.returncode}:\n" + "\n".join(output[-_LOG_LINES:]) + "\n",
            "Correct what its last lines name; VLLM_LOGGING_LEVEL=INFO makes it say more.",
        )


def measure(spec: EngineSpec, ready: Callable[[], None] = lambda: None) -> Measurement:
    """Builds the engine in this process and generates. Use `run_engine` unless this process is for it alone.

    Args:
        ready: Called before each prompt, outside of the timing, and once after the last; may block.
    """
    import vllm
    from vllm import LLM, SamplingParams

    from sdfp_vllm.integration.kv_space import kv_bytes_per_token

    began = time.perf_counter()
    llm = LLM(
        spec.model,
        dtype=spec.dtype,  # type: ignore[arg-type]  # vLLM refuses what it does not know
        seed=spec.seed,
        speculative_config=spec.speculative,
        disable_log_stats=False,
        **(_ENGINE | spec.engine),
    )
    start_seconds = time.perf_counter() - began

    def generate(prompt: list[int] | str, max_tokens: int) -> Any:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=spec.temperature, ignore_eos=spec.ignore_eos, seed=spec.seed
        )
        request: Any = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        return llm.generate(request, params, use_tqdm=False)[0]

    generate(spec.warm_up, _WARM_UP_TOKENS)
    before = _draft_counters(llm)
    outputs, seconds = [], []
    for prompt in spec.prompts:
        ready()
        began = time.perf_counter()
        outputs.append(generate(prompt, spec.max_tokens))
        seconds.append(time.perf_counter() - began)
    ready()
    after = _draft_counters(llm)
    counted = {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in after}
    return Measurement(
        token_ids=[list(o.outputs[0].token_ids) for o in outputs],
        texts=[o.outputs[0].text for o in outputs],
        seconds=seconds,
        decode_seconds=[o.metrics.last_token_ts - o.metrics.first_token_ts for o in outputs],
        start_seconds=start_seconds,
        rounds=sum(counted["num_drafts"]),
        draft_tokens=sum(counted["num_draft_tokens"]),
        accepted_tokens=sum(counted["num_accepted_tokens"]),
        accepted_per_position=counted["num_accepted_tokens_per_pos"],
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


def main() -> None:
    """The engine's side: announces each moment of readiness with a byte, then waits for a line or the end of stdin."""
    folder = Path(sys.argv[1])
    with (folder / "progress").open("ab", buffering=0) as progress:

        def ready() -> None:
            progress.write(b".")
            sys.stdin.readline()

        measurement = measure(EngineSpec.model_validate_json((folder / "spec.json").read_text()), ready)
    new = folder / "result.new"
    new.write_text(measurement.model_dump_json())
    new.rename(folder / "result.json")


if __name__ == "__main__":
    main()
