"""The engines that the suite compares, and the models they run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from dialled import SHAPES, dialled
from workloads import PLACES

from sdfp_vllm.fingerprint import fingerprint
from sdfp_vllm.fit.cost import MeasuredCost, measure_cost
from sdfp_vllm.fit.pacing import measure_pacing
from sdfp_vllm.fit.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.fit.stack import DecoderStack, load_target
from sdfp_vllm.measure import EngineSpec, Turn
from sdfp_vllm.plan import Candidate, Prediction, Provenance, SkipPlan

PLAIN, SDFP, FIXED, DRAFT_MODEL, NGRAM, SUFFIX = (
    "plain", "sdfp", "sdfp, fixed length", "draft_model", "ngram", "suffix",
)  # fmt: skip
_OWN_GIB = 2.0  # of an engine beside its weights: the KV cache, the libraries
DRAFT_MODEL_TOKENS = 2  # what suits the demo's separate draft best
# Layers that draft in the random checkpoints, the others' share of what a layer adds, and the draft length.
DIALLED = {
    "qwen3-0.6b": dict(keep=[0, 9, 18, 27], scale=0.03, k=3),
    "llama-3.2-1b": dict(keep=[0, 5, 10, 15], scale=0.03, k=3),
}


def speculative(method: str, plan: str, k: int, draft: Path | None) -> dict[str, Any] | None:
    """vLLM's speculative_config for `method`."""
    return {
        PLAIN: None,
        SDFP: {"method": "sdfp", "model": plan},
        FIXED: {"method": "sdfp", "model": plan, "num_speculative_tokens": k},
        DRAFT_MODEL: {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": DRAFT_MODEL_TOKENS,
        },
        NGRAM: {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        },
        SUFFIX: {"method": "suffix", "num_speculative_tokens": 16},
    }[method]


def methods_at_hand(asked: Sequence[str]) -> list[str]:
    """`asked`, without suffix decoding where the package that vLLM needs for it is not installed."""
    return [m for m in asked if m != SUFFIX or find_spec("arctic_inference")]


def half_if_fast() -> torch.dtype:
    """bfloat16 where oneDNN, and with it vLLM, has products for it on this CPU; where it is emulated, float32 is faster."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def fitting(methods: Sequence[str], model: Path, dtype: torch.dtype) -> list[str]:
    """The first of `methods` that memory holds engines of `model` for, at once; two at least."""
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))  # in bfloat16
    engine = 1.4 * stored * dtype.itemsize / 2 + _OWN_GIB * 2**30  # packed copies come on top of the weights
    return list(methods[: max(2, int(psutil.virtual_memory().available / engine))])


def spec(
    model: Path, turns: list[Turn], warm_up: list[int], settings: dict[str, Any] | None, **changes: Any
) -> EngineSpec:
    """An engine as all are here: eager, the engine core in its process, places for 16 requests."""
    fields: dict[str, Any] = dict(
        model=str(model),
        turns=turns,
        warm_up=warm_up,
        speculative=settings,
        ignore_eos=True,
        seed=None,  # a seed would fix the draft lengths of sampled requests
        dtype="float32",
        engine={"max_model_len": 512, "max_num_seqs": PLACES, "enforce_eager": True},
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    return EngineSpec(**(fields | changes))


def draft_cost(draft: Path) -> MeasuredCost:
    """What the separate draft model's forwards cost; they run all its layers."""
    return measure_cost(DecoderStack(load_target(draft, torch.float32)))


def dialled_model(name: str, folder: Path, dtype: torch.dtype) -> tuple[Path, SkipPlan, Path]:
    """A random checkpoint of the shape `name`, its plan and where that lies. Its costs are measured here, in `dtype`."""
    dial = DIALLED[name]
    keep: list[int] = dial["keep"]  # type: ignore[assignment]
    model = dialled(folder / name, name, keep, dial["scale"], tokenizer=True)  # type: ignore[arg-type]
    stack = DecoderStack(load_target(model, dtype))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(SHAPES[name]["vocab_size"], (16, 32), generator=generator)
    text = greedy_continuations(stack, prompts, 32)
    cost = measure_cost(stack)
    k: int = dial["k"]  # type: ignore[assignment]
    pacing = measure_pacing(DraftRollout(stack, text), keep, cost, 8)
    accepted = [1.0]
    for chance in pacing.acceptance:
        accepted.append(accepted[-1] * chance)
    lengths = [sum(accepted[: n + 1]) for n in range(len(accepted))]
    speedup = [cost.speedup(len(keep), n, length) for n, length in enumerate(lengths)]
    plan = SkipPlan(
        model=str(model),
        fingerprint=fingerprint(model),
        kept_layers=keep,
        num_speculative_tokens=k,
        worthwhile=True,
        prediction=Prediction(
            acceptance_rate=(lengths[k] - 1) / k, mean_accepted_length=lengths[k], speedup=speedup[k]
        ),
        scores=[],
        curve=[Candidate(kept_layers=keep, acceptance=pacing.acceptance, speedup=speedup)],
        cost=cost.model(),
        pacing=pacing,
        made=Provenance(
            calibration="random tokens", calibration_tokens=0, seed=0, selector="by hand", created="",
            sdfp_version="", torch_version=torch.__version__, transformers_version="",
        ),
    )  # fmt: skip
    where = folder / f"{name}-plan"
    plan.save(where)
    return model, plan, where
