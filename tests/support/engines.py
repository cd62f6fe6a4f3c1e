"""Real vLLM engines for tests: started in this process, eager and small unless a test asks otherwise."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from sdfp_vllm.pacing.record import Pacing
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import Candidate, Chances, Prediction, Provenance, SkipPlan, StoredView
from sdfp_vllm.plan.store import save_plan

BASE: dict[str, Any] = dict(
    dtype="float32",
    max_model_len=512,
    max_num_seqs=8,
    enforce_eager=True,
    disable_log_stats=False,
    distributed_executor_backend="uni",
    kv_cache_memory_bytes=256 << 20,
)


def candidate(view: KeepSet, num_layers: int) -> Candidate:
    """A point of a searched curve by hand."""
    stored = StoredView.of(view, num_layers)
    return Candidate(attention=stored.attention, mlp=stored.mlp, acceptance=[0.5] * 8, speedup=[1.0] * 9)


def write_plan(model: Path, folder: Path, kept: KeepSet | Sequence[int], k: int, **changes: Any) -> str:
    """Writes a plan by hand that knows acceptance up to 8 draft tokens; returns its folder."""
    target, view = fingerprint(model), KeepSet.of(kept)
    if pacing := changes.pop("pacing", None):
        changes |= costs_by_hand(pacing, target.num_layers, view)
    plan = SkipPlan(
        model=str(model),
        fingerprint=target,
        view=StoredView.of(view, target.num_layers),
        num_speculative_tokens=k,
        worthwhile=True,
        prediction=Prediction(acceptance_rate=0.5, mean_accepted_length=2.0, speedup=1.1),
        scores=[],
        curve=[candidate(view, target.num_layers)],
        made=Provenance(
            calibration="by hand",
            calibration_tokens=0,
            seed=0,
            selector="by hand",
            created=str(date.today()),
            sdfp_version="test",
            torch_version="test",
            transformers_version="test",
        ),
    )
    save_plan(plan.model_copy(update=changes), folder)
    return str(folder)


def costs_by_hand(pacing: Pacing, num_layers: int, view: KeepSet) -> dict[str, Any]:
    """Costs and chances of a plan whose pacing is `pacing`: all time is the head's."""
    layers = {p: [0.0] * len(pacing.rows) for p in {"full", *(view.precision(i, b) for b, i in view.units())}}
    costs = Costs(
        rows=pacing.rows,
        attention=layers,
        mlp=layers,
        head={"full": pacing.target_ms},
        draft_head=pacing.draft_ms,
        num_layers=num_layers,
        round_overhead_ms=pacing.round_overhead_ms,
        draft_overhead_ms=pacing.draft_overhead_ms,
        device="by hand",
        dtype="float32",
        threads=1,
    )
    return {"costs": costs, "chances": Chances(acceptance=pacing.acceptance, confidence=pacing.confidence)}


def pacing_by_hand(row_ms: float = 0.5, **changes: Any) -> Pacing:
    """Costs that make drafting pay: a step a tenth of the target's, a row of verification `row_ms` of its 10 ms."""
    fields = dict(
        rows=[1, 64],
        target_ms=[10.0, 10.0 + 63 * row_ms],
        draft_ms=[1.0, 1.5],
        draft_overhead_ms=0.0,
        round_overhead_ms=0.5,
        acceptance=[0.7] * 8,
        confidence=[0.2] * 5 + [0.7] * 10,
    )
    return Pacing.model_validate(fields | changes)


@contextlib.contextmanager
def engine(model: Path | str, speculative: dict[str, Any] | None = None, **overrides: Any) -> Iterator[Any]:
    """Yields a running `LLM` and takes it down completely."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings = {**BASE, **overrides}
    if speculative is not None:
        settings["speculative_config"] = speculative
    llm = None
    try:
        llm = LLM(str(model), **settings)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def tokens(
    llm: Any, prompts: Sequence[Any], batch: int | None = None, **params: Any
) -> list[list[list[int]]]:
    """Generates greedily unless told otherwise; returns [prompt][sequence] token ids, `batch` prompts at a time."""
    from vllm import SamplingParams

    settings: dict[str, Any] = dict(temperature=0.0, max_tokens=32, ignore_eos=True, seed=None)
    sampling = SamplingParams(**{**settings, **params})
    out: list[list[list[int]]] = []
    step = batch or len(prompts)
    for i in range(0, len(prompts), step):
        chunk = [p if isinstance(p, str) else {"prompt_token_ids": list(p)} for p in prompts[i : i + step]]
        for request in llm.generate(chunk, sampling, use_tqdm=False):
            out.append([list(o.token_ids) for o in request.outputs])
    return out


# Greedy answers found identical to plain vLLM's in this process; the session prints the sum at its end.
compared = 0


def assert_identical(got: Sequence[Any], want: Sequence[Any]) -> None:
    """Asserts that answers, one per prompt, are plain vLLM's, naming the first that is not; counts them."""
    global compared
    assert len(got) == len(want)
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours == theirs, f"answer {i} of {len(want)} is not plain vLLM's"
    compared += len(got)


def spec_counters(llm: Any) -> dict[str, Any]:
    """vLLM's own speculative-decoding counters of this engine so far, by short name."""
    prefix = "vllm:spec_decode_"
    return {
        m.name.removeprefix(prefix): getattr(m, "values", None) or getattr(m, "value", 0)
        for m in llm.get_metrics()
        if m.name.startswith(prefix)
    }


def metric(llm: Any, name: str) -> float:
    """One of vLLM's own counters, without its "vllm:"."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def runner(llm: Any) -> Any:
    """The V1 model runner of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner
