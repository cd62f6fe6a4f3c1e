"""How much an engine adds to the kernels' times, measured before the search."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from sdfp_vllm import __version__
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure.engines import run_engine
from sdfp_vllm.measure.spec import EngineSpec, Turn
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import Fingerprint
from sdfp_vllm.plan.keep import Branch, KeepSet
from sdfp_vllm.plan.schema import DraftHead, Prediction, Provenance, SkipPlan, StoredView
from sdfp_vllm.plan.store import save_plan
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.engine_setup import engine_is_here, engine_settings
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.prospects import whole_at_lowest

_PROBED_LAYERS = 8  # as many of the model's layers, with random weights, show what one costs
_PROBE_TOKENS, _PROBES = 32, 12
_PROBE_DRAFTS = 2


def overheads_of(
    model_dir: Path,
    identity: Fingerprint,
    options: PlanOptions,
    costs: Costs,
    can_round: Mapping[Branch, bool],
) -> Costs:
    """`costs` with what an engine adds to each layer, in the target's step and in a draft step.

    Measured on an engine with a few layers of the model's shape and random weights, that drafts with all of them at
    the precision that is fastest here. What its steps take beyond the products, the head and a round's own overhead is
    the layers'. Where such an engine cannot be started, and on a GPU, whose clock the host does not see, `costs` are as
    they were: the check at the end speaks for it.
    """
    if not engine_is_here() or torch.cuda.is_available():
        return costs
    layers = min(costs.num_layers, _PROBED_LAYERS)
    lowest, whole = whole_at_lowest(costs).precision(0, "attention"), KeepSet.of(range(layers))
    view = DraftView.at(whole, {unit: lowest for unit in whole.units() if can_round[unit[0]]})
    head = DraftHead(precision=min(costs.head, key=lambda p: costs.head[p][0]) if view.rounded else "full")
    prompt = list(range(10, 26))
    with tempfile.TemporaryDirectory(prefix="sdfp-probe-") as folder:
        save_plan(_plan_by_hand(identity, StoredView.of(view, identity.num_layers, head=head)), folder)
        probe = EngineSpec(
            model=str(model_dir),
            turns=[Turn(prompts=[prompt], max_tokens=_PROBE_TOKENS)] * _PROBES,
            warm_up=prompt,
            speculative={"method": "sdfp", "model": folder, "num_speculative_tokens": _PROBE_DRAFTS},
            ignore_eos=True,
            dtype=costs.dtype,
            engine={
                **engine_settings(identity, len(prompt) + _PROBE_TOKENS, options),
                "load_format": "dummy",
                "hf_overrides": of_layers(model_dir, layers),
            },
            environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        try:
            turns = run_engine(probe).turns
        except SdfpError:
            return costs
    rounds = [(t, t.rounds) for t in turns if t.rounds and t.draft_seconds]
    if not rounds:
        return costs
    # An engine drafts once more than it verifies: after the last token as well, when decoding is over.
    draft = min(1e3 * t.draft_seconds / ((n + 1) * _PROBE_DRAFTS) for t, n in rounds)
    verify = min(1e3 * (t.decode_seconds - t.draft_seconds * n / (n + 1)) / n for t, n in rounds)
    few = costs.model_copy(
        update={"num_layers": layers, "draft_head": costs.head[head.precision], "layer_overhead_ms": 0.0}
    )
    return costs.model_copy(
        update={
            "layer_overhead_ms": max(0.0, verify - few.round_ms(view, 0, _PROBE_DRAFTS + 1)) / layers,
            "draft_layer_overhead_ms": max(0.0, draft - few.step_ms(view, 1) - few.draft_overhead_ms)
            / layers,
            "engine": "eager" if options.eager else "compiled",
        }
    )


def of_layers(model_dir: Path, layers: int) -> dict[str, object]:
    """What overrides a checkpoint's config for a decoder of fewer layers; a multimodal one has them in `text_config`."""
    own: dict[str, object] = {"num_hidden_layers": layers}
    config = json.loads((model_dir / "config.json").read_text())
    return {"text_config": own} if isinstance(config.get("text_config"), dict) else own


def _plan_by_hand(identity: Fingerprint, view: StoredView) -> SkipPlan:
    """A plan that an engine takes and that promises nothing."""
    return SkipPlan(
        model="probe",
        fingerprint=identity,
        view=view,
        num_speculative_tokens=_PROBE_DRAFTS,
        worthwhile=True,
        prediction=Prediction(acceptance_rate=0.0, mean_accepted_length=1.0, speedup=1.0),
        scores=[],
        curve=[],
        made=Provenance(
            calibration="none",
            calibration_tokens=0,
            seed=0,
            selector="probe",
            created="now",
            sdfp_version=__version__,
            torch_version=torch.__version__,
            transformers_version=transformers.__version__,
        ),
    )
