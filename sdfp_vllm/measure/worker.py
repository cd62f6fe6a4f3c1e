"""The engine's side of a measurement: builds `LLM`, warms it up, generates turn by turn, writes one JSON result.

`python -m sdfp_vllm.measure.worker FOLDER` is started by `sdfp_vllm/measure/engines.py`, which waits on FOLDER's files.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn, TurnMeasurement

_WARM_UP_TOKENS = 16
_PR_SET_PDEATHSIG = 1
_ENGINE = {"distributed_executor_backend": "uni"}


def measure(
    spec: EngineSpec,
    ready: Callable[[], bool] = lambda: True,
    on_text: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Builds the engine in this process and generates. Use `run_engine` unless this process is for it alone.

    Args:
        ready: Called before each turn, outside of the timing, and once after the last; may block. False ends the run.
        on_text: Given the text of streamed turns, piece by piece.
    """
    import vllm
    from vllm import LLM, SamplingParams

    from sdfp_vllm.engine.inspect_engine import (
        DraftingTime,
        allow_copies,
        fix_drafts,
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

    def generate(
        prompts: Sequence[list[int] | str], max_tokens: int, temperature: float, streamed: bool = False
    ) -> list[Any]:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, ignore_eos=spec.ignore_eos, seed=spec.seed
        )
        requests: Any = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        if streamed:
            return [_stream(llm.llm_engine, requests[0], params, on_text)]
        return llm.generate(requests, params, use_tqdm=False)

    def run(turn: Turn) -> TurnMeasurement:
        if turn.copies is not None:
            allow_copies(llm, turn.copies)
        fix_drafts(llm, turn.drafts)
        if turn.window is not None:
            narrow_drafts(llm, turn.window)
        before, drafting, paced = _draft_counters(llm), spent.seconds, rounds_paced(llm)
        outputs, decoding = [], 0.0
        began = time.perf_counter()
        for i in range(0, len(turn.prompts), turn.batch):
            chunk = generate(
                turn.prompts[i : i + turn.batch], turn.max_tokens, turn.temperature, turn.streamed
            )
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
    while ready() and len(turns) < len(spec.own_turns):
        turns.append(run(spec.own_turns[len(turns)]))
    return Measurement(
        turns=turns,
        start_seconds=start_seconds,
        kv_bytes_per_token=kv_bytes_per_token(llm),
        vllm_version=vllm.__version__,
    )


def _stream(engine: Any, request: Any, params: Any, on_text: Callable[[str], None]) -> Any:
    """Answers one request, and tells its text as it grows; returns what `LLM.generate` would.

    vLLM's outputs are cumulative where not asked otherwise: the last is the whole answer. Its detokenizer holds a
    character back until the last of its tokens is there, so a text only grows.
    """
    engine.add_request("streamed", request, params)
    told, output = 0, None
    while engine.has_unfinished_requests():
        for output in engine.step():
            text = output.outputs[0].text
            if len(text) > told:
                on_text(text[told:])
                told = len(text)
    return output


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
    """Measures FOLDER's spec: announces each moment of readiness with a byte, then waits for a line or the end of stdin."""
    die_with_parent()
    folder = Path(sys.argv[1])
    with (
        (folder / "progress").open("ab", buffering=0) as progress,
        (folder / "text").open("ab", buffering=0) as text,
    ):

        def ready() -> bool:
            progress.write(b".")
            return bool(sys.stdin.readline())

        def on_text(piece: str) -> None:
            text.write(piece.encode())

        spec = EngineSpec.model_validate_json((folder / "spec.json").read_text())
        measurement = measure(spec, ready, on_text)
    new = folder / "result.new"
    new.write_text(measurement.model_dump_json())
    new.rename(folder / "result.json")


if __name__ == "__main__":
    main()
