"""SdfpConfig: the speculative config that carries a plan's decisions to every process.

Settings travel in this object, never in environment variables: Ray hands only some of those on.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Any, Literal

from pydantic import ValidationError

from sdfp_vllm.common.machine import processor
from sdfp_vllm.engine.drafting import check_batch_table, decide_drafting
from sdfp_vllm.engine.refusals import refuse_synthetic_on_cpu, refuse_unsupported
from sdfp_vllm.engine.upstream.symbols import SpeculativeConfig, config, current_platform, init_logger
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.parcel import PlanParcel
from sdfp_vllm.plan.schema import SkipPlan
from sdfp_vllm.plan.store import find_plan
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.plan.window import parse_window

logger = init_logger(f"vllm.{__name__}")

# What a user may set beside the plan; anything else in speculative_config is refused by name.
SETTINGS = {
    "method",
    "model",
    "num_speculative_tokens",
    "draft_sample_method",
    "rejection_sample_method",
    "synthetic_acceptance_rates",
    "synthetic_acceptance_length",
    "num_speculative_tokens_per_batch_size",
    "enable_adaptive_verification",
    "enforce_eager",
    "adapters",
    "adaptive",
    "ngram",
    "precision",
    "window",
}


@config
class SdfpConfig(SpeculativeConfig):
    """vLLM's speculative config with a keep set instead of a second model."""

    method: Literal["sdfp"] = "sdfp"  # type: ignore[assignment]
    parcel: Any = None
    """The `PlanParcel`: the plan, its bridges and the tokens of its head. No worker opens a path."""
    drafting: Any = None
    """The `Drafting`: how many tokens are drafted, and who decides that."""
    own_adapters: bool = True
    """Whether drafts run the LoRA adapter of their request."""

    def __post_init__(self) -> None:
        # Upstream's own resolves a second model's config; here the draft is the target.
        self.draft_model_config = copy.copy(self.target_model_config)
        self.draft_parallel_config = self.target_parallel_config
        self._patch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._patch()

    @staticmethod
    def _patch() -> None:
        from sdfp_vllm.engine.patches import patch_engine

        patch_engine()

    def uses_draft_model(self) -> bool:
        return True

    @property
    def plan(self) -> SkipPlan:
        return self.parcel.plan

    @property
    def view(self) -> DraftView:
        """What drafts, and at which precision."""
        return self.plan.view.branches

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        return 0  # no draft prefill: nothing is fed beyond what the target verifies

    def compute_hash(self) -> str:
        """Adds the view, bridges and head included: vLLM keys compiled graphs by this, and others are another graph.

        A window is none: attention reads another table in the same graph.
        """
        factors = f"{super().compute_hash()} sdfp {self.plan.view.model_dump_json(exclude={'window'})}"
        return hashlib.sha256(factors.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"SdfpConfig(plan={self.model!r}, view='{self.view}', {self.drafting})"


def build_config(args: Any, settings: dict[str, Any], model_config: Any, parallel_config: Any) -> SdfpConfig:
    """Builds the config from the user's settings and the plan they lead to.

    Args:
        args: vLLM's EngineArgs, read for features SDFP does not work with.
        settings: Merged speculative settings (`arguments.sdfp_settings`).

    Raises:
        SdfpError: For a setting, feature or plan that cannot be used; before any weight is read.
    """
    if unknown := sorted(set(settings) - SETTINGS):
        raise SdfpError(
            f"speculative_config[{unknown[0]!r}]",
            "is not a setting of method 'sdfp'",
            f"Remove it; the settings are {', '.join(sorted(SETTINGS))}.",
        )
    refuse_unsupported(args, model_config, parallel_config)
    refuse_synthetic_on_cpu(settings)
    check_batch_table(settings.get("num_speculative_tokens_per_batch_size"))  # before a plan is looked for
    asked = settings.get("model")
    if asked is not None and not isinstance(asked, str):
        raise SdfpError("speculative_config['model']", f"is {asked!r}", 'Give a plan folder, or "sdfp".')
    parcel = at_precision(
        find_plan(model_config.model, asked, model_config.revision, args.download_dir),
        settings.get("precision", "planned"),
    )
    parcel = at_window(parcel, settings.get("window", "planned"))
    plan, path = parcel.plan, parcel.source
    refuse_missing_kernels(plan, model_config)
    drafting = decide_drafting(plan, settings, spare_slots=current_platform.is_cpu())
    warn_of_other_conditions(plan, path, model_config)
    # A model that drafts with itself has a full distribution to sample from, and sampling from it
    # is accepted more often than its argmax; greedy requests are not affected.
    passed = {"draft_sample_method": "probabilistic", **settings}
    for ours in ("adapters", "adaptive", "ngram", "precision", "window"):
        passed.pop(ours, None)
    passed.update(
        method="sdfp",
        model=path,
        num_speculative_tokens=drafting.slots,
        num_speculative_tokens_per_batch_size=drafting.table,
    )
    try:
        return SdfpConfig(
            parcel=parcel,
            drafting=drafting,
            own_adapters=own_adapters(settings.get("adapters", "auto")),
            target_model_config=model_config,
            target_parallel_config=parallel_config,
            **passed,
        )
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise SdfpError(
            f"speculative_config[{name!r}]",
            f"{first['msg']}, got {first['input']!r}",
            "Correct it, or leave it out.",
        ) from e


def warn_of_other_conditions(plan: SkipPlan, path: str, model_config: Any) -> None:
    """Warns where the plan was made for another dtype, kind of engine or machine, or promises nothing."""
    served = str(model_config.dtype).removeprefix("torch.")
    if plan.costs and plan.costs.dtype != served:
        logger.warning(
            "The plan %s was made for %s, and the model is served in %s: drafts stay exact, but costs and acceptance are "
            "others. Serve with --dtype %s, or plan with `sdfp plan %s --dtype %s`.",
            path,
            plan.costs.dtype,
            served,
            plan.costs.dtype,
            plan.model_argument,
            served,
        )
    how = "eager" if model_config.enforce_eager else "compiled"
    if plan.costs and plan.costs.engine not in (None, how):
        logger.warning(
            "The plan %s was made for %s engine, and this one is %s: drafts stay exact, but costs are others. Serve as it was planned, "
            "or plan with `sdfp plan %s%s`.",
            path,
            {"eager": "an eager", "compiled": "a compiled"}.get(plan.costs.engine, plan.costs.engine),
            how,
            plan.model_argument,
            " --eager" if how == "eager" else "",
        )
    here = processor() if current_platform.is_cpu() else current_platform.get_device_name()
    if plan.costs and here not in plan.costs.device:
        logger.warning(
            "The plan %s was measured on %s, and this is %s: how often drafts are accepted holds here too, what they cost was "
            "not measured. `sdfp plan --refresh-costs %s` does that.",
            path,
            plan.costs.device,
            here,
            path,
        )
    if not plan.worthwhile:
        logger.warning(
            "The plan %s promises no gain over plain decoding on the machine that made it (%.2fx). Serving goes on "
            "with it as asked.",
            path,
            plan.promised_speedup,
        )


def at_precision(parcel: PlanParcel, asked: Any) -> PlanParcel:
    """The plan as it is ("planned"), or the same branches without rounded copies ("full").

    Raises:
        SdfpError: For anything else.
    """
    if asked not in ("planned", "full"):
        raise SdfpError(
            "speculative_config['precision']",
            f"is {asked!r}",
            'Give "planned", or "full" for drafts without rounded copies of weights.',
        )
    return parcel if asked == "planned" else replace(parcel, plan=parcel.plan.at_full_precision())


def own_adapters(asked: Any) -> bool:
    """Whether drafts run the LoRA adapter of their request ("own"), or the base model alone ("base").

    "auto" is "base" on a CPU, where an adapter's part costs a draft step as much as one of the target, and "own" elsewhere.

    Raises:
        SdfpError: For anything else.
    """
    if asked not in ("auto", "own", "base"):
        raise SdfpError(
            "speculative_config['adapters']",
            f"is {asked!r}",
            'Give "own" for drafts with the adapter of their request, "base" for drafts without, or "auto".',
        )
    return asked == "own" or (asked == "auto" and not current_platform.is_cpu())


def at_window(parcel: PlanParcel, asked: Any) -> PlanParcel:
    """The plan as it is ("planned"), or with drafts that attend to as much of a long context as asked.

    Raises:
        SdfpError: If `asked` is neither that nor what `parse_window` reads.
    """
    if asked == "planned":
        return parcel
    window = parse_window("speculative_config['window']", asked)
    return replace(parcel, plan=parcel.plan.with_window(window))


def refuse_missing_kernels(plan: SkipPlan, model_config: Any) -> None:
    """Raises SdfpError if this machine has no kernel for a precision that the plan's view uses."""
    used = sorted({*plan.used_precisions(), plan.view.head.precision} - {"full"})
    if not used:
        return
    from sdfp_vllm.engine.draft.rounded_linear import refusal

    hidden = plan.fingerprint.hidden_size
    # Where there is a GPU, the front end must not touch it: the workers try their kernels themselves.
    tried = current_platform.is_cpu()
    for precision in used:
        if why := refusal(precision, model_config.dtype, hidden, hidden, tried=tried):  # type: ignore[arg-type]  # no "skip"
            raise SdfpError(
                f"plan {plan.model}: precision {precision}",
                f"cannot run here: {why}",
                "Make a plan on this machine with `sdfp plan MODEL`, or with `--precision full`; or serve this one "
                'with {"precision": "full"} in speculative_config.',
            )
