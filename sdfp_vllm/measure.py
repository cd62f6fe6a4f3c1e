"""Generates with one vLLM engine in a process of its own, and measures it.

Engines are compared one process each: none inherits the other's memory, caches or compiled
code. `run_engine` starts `python -m sdfp_vllm.measure SPEC RESULT`, which builds `LLM`,
warms it up, generates prompt after prompt (batch 1) and writes one JSON result.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sdfp_vllm.errors import SdfpError

_WARM_UP_TOKENS = 16
_LOG_LINES = 25
_SETTINGS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


class EngineSpec(BaseModel):
    """One engine and what it shall generate. Prompts are text, or token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    prompts: list[list[int]] | list[str] = Field(min_length=1)
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


def run_engine(spec: EngineSpec, on_prompt: Callable[[int], None] = lambda done: None) -> Measurement:
    """Runs `spec` in a fresh process group, which is gone when this returns or is interrupted.

    Args:
        on_prompt: Called with the number of prompts finished, a few times a second.

    Raises:
        SdfpError: If the engine fails; carries the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="sdfp-") as folder:
        spec_file, result, log = (Path(folder) / name for name in ("spec.json", "result.json", "log"))
        spec_file.write_text(spec.model_dump_json())
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "sdfp_vllm.measure", str(spec_file), str(result)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=_SETTINGS | dict(os.environ) | spec.environment,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    on_prompt(_progress_file(result).stat().st_size if _progress_file(result).exists() else 0)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode or not result.exists():
            output = log.read_text(errors="replace").strip().splitlines()
            method = (spec.speculative or {}).get("method", "plain decoding")
            raise SdfpError(
                f"vLLM engine ({method}) on {spec.model}",
                f"failed with exit status {process.returncode}:\n" + "\n".join(output[-_LOG_LINES:]) + "\n",
                "Correct what its last lines name; VLLM_LOGGING_LEVEL=INFO makes it say more.",
            )
        return Measurement.model_validate_json(result.read_text())


def measure(spec: EngineSpec, on_prompt: Callable[[int], None] = lambda done: None) -> Measurement:
    """Builds the engine in this process and generates. Use `run_engine` unless this process is for it alone."""
    import vllm
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(
        spec.model,
        dtype=spec.dtype,
        seed=spec.seed,
        speculative_config=spec.speculative,
        disable_log_stats=False,
        **spec.engine,
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
    for done, prompt in enumerate(spec.prompts, 1):
        began = time.perf_counter()
        outputs.append(generate(prompt, spec.max_tokens))
        seconds.append(time.perf_counter() - began)
        on_prompt(done)
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
        kv_bytes_per_token=_kv_bytes_per_token(llm),
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


def _kv_bytes_per_token(llm: Any) -> float | None:
    """KV cache the engine spends per token, drafts included: the space it was given over the tokens that fit.

    Known on the CPU only, where the space is a setting.
    """
    import vllm.envs as envs
    from vllm.platforms import current_platform

    cache = llm.llm_engine.vllm_config.cache_config
    if not current_platform.is_cpu() or not envs.VLLM_CPU_KVCACHE_SPACE or not cache.num_gpu_blocks:
        return None
    return envs.VLLM_CPU_KVCACHE_SPACE * 2**30 / (cache.num_gpu_blocks * cache.block_size)


def _progress_file(result: Path) -> Path:
    """One byte per finished prompt."""
    return result.with_suffix(".progress")


def main() -> None:
    spec_file, result = Path(sys.argv[1]), Path(sys.argv[2])
    with _progress_file(result).open("ab", buffering=0) as progress:
        measurement = measure(
            EngineSpec.model_validate_json(spec_file.read_text()), lambda _: progress.write(b".") and None
        )
    result.write_text(measurement.model_dump_json())


if __name__ == "__main__":
    main()
