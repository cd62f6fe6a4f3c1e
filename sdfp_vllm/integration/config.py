"""SdfpConfig: the speculative config that carries a plan's decisions to every process.

Settings travel in this object, never in environment variables: Ray hands only some of those on.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationError

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.integration.refusals import refuse_synthetic_on_cpu, refuse_unsupported
from sdfp_vllm.integration.upstream import SpeculativeConfig, config, current_platform, init_logger
from sdfp_vllm.plan.parcel import PlanParcel
from sdfp_vllm.plan.schema import MAX_DRAFT_TOKENS, SkipPlan
from sdfp_vllm.plan.store import find_plan
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.plan.window import parse_window

logger = init_logger(f"vllm.{__name__}")

ANY_BATCH = 1 << 20  # no batch is larger

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
    "adaptive",
    "ngram",
    "precision",
    "window",
}


# Settings that fix how many tokens are drafted.
FIXED_LENGTHS = ("num_speculative_tokens", "num_speculative_tokens_per_batch_size")


# Longest drafts where lengths follow the traffic: as many as a round of copies may use.
LONGEST_PACED = 16


@config
class SdfpConfig(SpeculativeConfig):
    """vLLM's speculative config with a keep set instead of a second model."""

    method: Literal["sdfp"] = "sdfp"  # type: ignore[assignment]
    parcel: Any = None
    """The `PlanParcel`: the plan, its bridges and the tokens of its head. No worker opens a path."""
    pacing: dict[str, Any] | None = None
    """The plan's `Pacing`, where draft lengths follow the traffic; None where they are fixed."""
    ngram: bool = False
    """Whether drafts may be copied from the context."""
    step_rows: list[int] = Field(default_factory=list)
    """Rows, padding included, that a draft step for 1, 2, ... requests is run with; larger batches have none."""

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
        from sdfp_vllm.integration.patches import patch_engine

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
        # Paced, the number is that of reserved slots, and nobody's draft length.
        length = "paced" if self.pacing else self.num_speculative_tokens
        return f"SdfpConfig(plan={self.model!r}, view='{self.view}', num_speculative_tokens={length})"


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
    check_batch_table(settings.get("num_speculative_tokens_per_batch_size"))
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
    k = draft_tokens(plan, settings.get("num_speculative_tokens"))
    adaptive, ngram = drafting_mode(plan, settings)
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
    if not plan.worthwhile:
        logger.warning(
            "The plan %s promises no gain over plain decoding on the machine that made it (%.2fx). Serving goes on "
            "with it as asked.",
            path,
            plan.promised_speedup,
        )
    # A model that drafts with itself has a full distribution to sample from, and sampling from it
    # is accepted more often than its argmax; greedy requests are not affected.
    passed = {"draft_sample_method": "probabilistic", **settings, "ngram": ngram}
    for ours in ("adaptive", "precision", "window"):
        passed.pop(ours, None)
    if not set(FIXED_LENGTHS) & set(settings):
        passed["num_speculative_tokens_per_batch_size"] = batch_table(plan, always=adaptive)
        if adaptive and current_platform.is_cpu():
            # Slots that only a paced round may use; on a GPU each would cost a row of logits per request.
            k = max(k, LONGEST_PACED)
    passed.update(method="sdfp", model=path, num_speculative_tokens=k)
    try:
        return SdfpConfig(
            parcel=parcel,
            step_rows=plan.pacing.padded_batches() if plan.pacing else [],
            pacing=plan.pacing.model_dump(mode="json") if adaptive and plan.pacing else None,
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
    from sdfp_vllm.integration.rounded_linear import refusal

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


def drafting_mode(plan: SkipPlan, settings: dict[str, Any]) -> tuple[bool, bool]:
    """Whether draft lengths follow the traffic, and whether drafts may be copied from the context.

    Both by default, where the plan knows its costs; neither where the user fixes the length.

    Raises:
        SdfpError: If what is asked for contradicts itself or the plan.
    """
    for name in ("adaptive", "ngram"):
        if not isinstance(settings.get(name, False), bool):
            raise SdfpError(f"speculative_config[{name!r}]", f"is {settings[name]!r}", "Give true or false.")
    fixed = next((name for name in FIXED_LENGTHS if name in settings), None)
    adaptive = settings.get("adaptive", fixed is None and plan.pacing is not None)
    if adaptive and plan.pacing is None:
        raise SdfpError(
            "speculative_config['adaptive']",
            "needs the costs of drafting, which this plan lacks",
            f"Make the plan again with `sdfp plan {plan.model_argument}`.",
        )
    if adaptive and "num_speculative_tokens_per_batch_size" in settings:
        raise SdfpError(
            "speculative_config['adaptive']",
            "contradicts num_speculative_tokens_per_batch_size, which fixes the draft lengths",
            "Give one of the two.",
        )
    ngram = settings.get("ngram", adaptive)
    if ngram and not adaptive:
        raise SdfpError(
            "speculative_config['ngram']",
            "needs draft lengths that follow the traffic",
            "Give adaptive as true, with num_speculative_tokens as the longest, or leave ngram out.",
        )
    return adaptive, ngram


def batch_table(plan: SkipPlan, always: bool = False) -> list[tuple[int, int, int]] | None:
    """The plan's draft lengths by batch size in vLLM's form; None where one length serves all, unless `always`.

    Large batches make verification dear: there the plan drafts less, or not at all.
    """
    table = plan.draft_tokens_by_batch
    if all(k == plan.num_speculative_tokens for _, k in table):
        return [(1, ANY_BATCH, plan.num_speculative_tokens)] if always else None
    starts = [1, *(size + 1 for size, _ in table)]
    ends = [*(size for size, _ in table[:-1]), ANY_BATCH]
    return [(start, end, k) for start, end, (_, k) in zip(starts, ends, table, strict=False)]


def check_batch_table(table: Any) -> None:
    """Validates vLLM's table of draft lengths by batch size, which upstream does once weights are loaded.

    Raises:
        SdfpError: If `table` is given and not a list of (first size, last size, draft tokens) from size 1 on.
    """
    if table is None:
        return
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    try:
        validate_and_normalize_dynamic_sd_schedule(table)
    except (TypeError, ValueError) as e:
        raise SdfpError(
            "speculative_config['num_speculative_tokens_per_batch_size']",
            str(e).rstrip("."),
            "Give [[first batch size, last batch size, draft tokens], ...], starting at 1.",
        ) from e


def draft_tokens(plan: SkipPlan, asked: Any) -> int:
    """The draft length: the user's, if the plan has measured that far, else the plan's.

    Raises:
        SdfpError: For zero, a non-integer, or more than the plan knows about.
    """
    if asked is None:
        return plan.num_speculative_tokens
    where = "num_speculative_tokens"
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise SdfpError(
            where, f"must be a whole number of at least 1, got {asked!r}", "Leave it out to use the plan's."
        )
    view = plan.view.branches
    known = max((len(c.acceptance) for c in plan.curve if c.view == view), default=MAX_DRAFT_TOKENS)
    if asked > known:
        raise SdfpError(
            where,
            f"is {asked}, but the plan has measured acceptance for at most {known} draft tokens",
            f"Ask for at most {known}, or make a plan with `sdfp plan MODEL --draft-tokens {asked}`.",
        )
    return asked
