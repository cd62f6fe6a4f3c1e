"""The engines that the suite compares, and the models they run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.studies.dialled import SHAPES, dialled
from benchmarks.toy.workloads import PLACES
from sdfp_vllm.measure.spec import EngineSpec, Turn
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import Candidate, Prediction, Provenance, SkipPlan, StoredView
from sdfp_vllm.plan.store import save_plan
from sdfp_vllm.planner.chances import measure_chances
from sdfp_vllm.planner.cost import measure_costs
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.stack import DecoderStack, load_target

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


def draft_cost(draft: Path) -> Costs:
    """What the separate draft model's forwards cost; they run all its layers."""
    return measure_costs(DecoderStack(load_target(draft, torch.float32)))


def dialled_model(name: str, folder: Path, dtype: torch.dtype) -> tuple[Path, SkipPlan, Path]:
    """A random checkpoint of the shape `name`, its plan and where that lies. Its costs are measured here, in `dtype`."""
    dial = DIALLED[name]
    keep: list[int] = dial["keep"]  # type: ignore[assignment]
    model = dialled(folder / name, name, keep, dial["scale"], tokenizer=True)  # type: ignore[arg-type]
    stack = DecoderStack(load_target(model, dtype))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(SHAPES[name]["vocab_size"], (16, 32), generator=generator)
    text = greedy_continuations(stack, prompts, 32)
    cost = measure_costs(stack)
    k: int = dial["k"]  # type: ignore[assignment]
    chances = measure_chances(DraftRollout(stack, text), keep, 8)
    kept = KeepSet.of(keep)
    view = StoredView.of(kept, stack.num_layers)
    accepted = [1.0]
    for chance in chances.acceptance:
        accepted.append(accepted[-1] * chance)
    lengths = [sum(accepted[: n + 1]) for n in range(len(accepted))]
    speedup = [cost.speedup(kept, n, length) for n, length in enumerate(lengths)]
    plan = SkipPlan(
        model=str(model),
        fingerprint=fingerprint(model),
        view=view,
        num_speculative_tokens=k,
        worthwhile=True,
        prediction=Prediction(
            acceptance_rate=(lengths[k] - 1) / k, mean_accepted_length=lengths[k], speedup=speedup[k]
        ),
        scores=[],
        curve=[
            Candidate(
                attention=view.attention, mlp=view.mlp, acceptance=chances.acceptance, speedup=speedup
            )
        ],
        costs=cost,
        chances=chances,
        made=Provenance(
            calibration="random tokens", calibration_tokens=0, seed=0, selector="by hand", created="",
            sdfp_version="", torch_version=torch.__version__, transformers_version="",
        ),
    )  # fmt: skip
    where = folder / f"{name}-plan"
    save_plan(plan, where)
    return model, plan, where
