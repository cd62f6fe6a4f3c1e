"""What the real engine says: how much it adds to the kernels' times before the search, and what the plan gives after it."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from sdfp_vllm import __version__
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure.engines import run_engine
from sdfp_vllm.measure.memory import run_as_memory_allows
from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn, one_by_one
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.families import MULTIMODAL
from sdfp_vllm.plan.fingerprint import Fingerprint
from sdfp_vllm.plan.keep import Branch, KeepSet
from sdfp_vllm.plan.schema import DraftHead, Prediction, Provenance, SkipPlan, Speeds, StoredView
from sdfp_vllm.plan.store import save_plan
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.prospects import whole_at_lowest
from sdfp_vllm.planner.search import WORTHWHILE
from sdfp_vllm.planner.work import Work

_PROBED_LAYERS = 8  # as many of the model's layers, with random weights, show what one costs
_PROBE_TOKENS, _PROBES = 32, 12
_PROBE_DRAFTS = 2
_NEW_TOKENS = 40


def engine_is_here() -> bool:
    """Whether vLLM is installed; plans can be made without it, from torch's own products."""
    return find_spec("vllm") is not None


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


def with_check(work: Work, plan: SkipPlan, prompts: list[list[int]]) -> SkipPlan:
    """`plan`, saved in the job's folder, with what plain decoding and the plan give on the engine, and a verdict from that.

    Args:
        prompts: Token ids; none that drafts were tried on.
    """
    if not engine_is_here() or plan.costs is None:
        return plan
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    options = work.options
    dtype, stored = plan.costs.dtype, stored_dtype(work.model_dir)
    turns = one_by_one(prompts, _NEW_TOKENS)
    settings = engine_settings(work.identity, max(map(len, prompts)) + _NEW_TOKENS, options)

    def spec(speculative: dict[str, str] | None, kind: str, own: list[Turn]) -> EngineSpec:
        return EngineSpec(
            model=str(work.model_dir),
            turns=own,
            warm_up=prompts[0],
            speculative=speculative,
            dtype=kind,
            seed=None,  # a seed would fix the draft lengths
            ignore_eos=True,  # an answer of one token has no speed
            engine=settings,
            environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
        )

    drafts = [t.model_copy(update={"copies": copies}) for t in turns for copies in (False, True)]
    specs = [spec(None, dtype, turns), spec({"method": "sdfp", "model": str(work.folder)}, dtype, drafts)]
    if stored != dtype:
        specs.append(spec(None, stored, turns))
    with work.bar.step("Check on the engine", sum(1 + len(s.turns) for s in specs)) as advance:
        step = lambda engine, done: advance(1)  # noqa: E731
        try:
            results, _ = run_as_memory_allows(specs, plan.extra_bytes, step)
        except SdfpError:
            if len(specs) == 2:
                raise
            # The machine may not run the checkpoint's own dtype: what was asked for is checked all the same.
            results, _ = run_as_memory_allows(specs[:2], plan.extra_bytes, step)
    plain, ours, *other = results
    alone, copying = (Measurement(**{**dict(ours), "turns": ours.turns[i::2]}) for i in (0, 1))
    whole = alone.whole
    wanted = [t.token_ids for t in plain.turns]
    speeds = Speeds(
        plain=plain.decode_tokens_per_second,
        drafted=alone.decode_tokens_per_second,
        copies=copying.decode_tokens_per_second,
        other=other[0].decode_tokens_per_second if other else None,
        other_dtype=stored if other else None,
        acceptance_rate=whole.acceptance_rate or 0.0,
        mean_accepted_length=whole.mean_accepted_length or 1.0,
        prompts=len(prompts),
        identical=sum(t.token_ids == w for t, w in zip(alone.turns, wanted, strict=True)),
        engine="eager" if options.eager else "compiled",
    )
    worthwhile = max(speeds.drafted, speeds.copies) > WORTHWHILE * speeds.plain
    return plan.model_copy(update={"check": speeds, "worthwhile": worthwhile})


def engine_settings(identity: Fingerprint, positions: int, options: PlanOptions) -> dict[str, object]:
    """Arguments of an engine for one request of `positions` tokens of text."""
    settings: dict[str, object] = {
        "max_model_len": positions + 32,
        "enforce_eager": options.eager,
        "trust_remote_code": options.trust_remote_code,
    }
    if identity.architecture in MULTIMODAL:
        settings["language_model_only"] = True  # loads no encoder, and tries none with its largest image
    if torch.cuda.is_available():  # this process keeps some of the GPU
        free, total = torch.cuda.mem_get_info()
        settings["gpu_memory_utilization"] = round(0.9 * free / total, 2)
    return settings


def stored_dtype(model_dir: Path) -> str:
    """The checkpoint's own dtype, which vLLM serves by default."""
    config = json.loads((model_dir / "config.json").read_text())
    config = config | (config.get("text_config") or {})
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
