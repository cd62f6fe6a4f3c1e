"""Drafting: how many tokens are drafted and by whom that is decided, made once from the plan and the user's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.pacing.record import Pacing
from sdfp_vllm.plan.schema import MAX_DRAFT_TOKENS, SkipPlan

ANY_BATCH = 1 << 20  # no batch is larger
# Settings that fix how many tokens are drafted.
FIXED_LENGTHS = ("num_speculative_tokens", "num_speculative_tokens_per_batch_size")
# Longest drafts where lengths follow the traffic: as many as a round of copies may use.
LONGEST_PACED = 16

Table = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Drafting:
    """What scheduler and proposer ask, and what is logged at start.

    Attributes:
        length: Draft tokens of a round, where that is fixed; else those that the plan expects.
        slots: Longest draft of a round: the KV slots that the scheduler reserves.
        table: Draft lengths by batch size in vLLM's form, (first size, last size, length); None where one serves all.
        pacing: Costs and chances by which lengths follow the traffic; None where they are fixed.
        copies: Whether drafts may be copied from the context.
        padding: Rows, padding included, that a draft step for 1, 2, ... requests is run with; larger batches have none.
    """

    length: int
    slots: int
    table: Table | None
    pacing: Pacing | None
    copies: bool
    padding: tuple[int, ...] = ()

    def by_request(self, vllm_config: Any) -> bool:
        """Whether the proposer decides each round for each request.

        Drafts that differ in number between requests need the host between draft steps.
        """
        return self.pacing is not None and not _runs_ahead(vllm_config)

    def by_batch(self, vllm_config: Any) -> bool:
        """Whether the scheduler decides each round for the whole batch."""
        return self.pacing is not None and _runs_ahead(vllm_config)

    def __str__(self) -> str:
        if self.pacing is not None:
            return f"up to {self.slots} draft tokens, as the traffic pays" + (
                ", copies included" if self.copies else ""
            )
        if self.table is not None:
            return "draft tokens by batch size: " + ", ".join(
                f"{k} {f'up to {last}' if last < ANY_BATCH else 'beyond'}" for _, last, k in self.table
            )
        return f"{self.length} draft tokens"


def _runs_ahead(vllm_config: Any) -> bool:
    """Whether the next step is scheduled before this one's tokens are known, or is one CUDA graph."""
    return bool(
        vllm_config.scheduler_config.async_scheduling or getattr(vllm_config, "use_v2_model_runner", False)
    )


def decide_drafting(plan: SkipPlan, settings: dict[str, Any], spare_slots: bool) -> Drafting:
    """Decides from the plan and the user's speculative settings.

    Args:
        settings: With a table of lengths that was checked (`check_batch_table`), if any.
        spare_slots: Whether slots that only a paced round may use cost nothing; on a GPU each would cost a row of logits
            per request.

    Raises:
        SdfpError: For settings that contradict each other or the plan.
    """
    length = draft_tokens(plan, settings.get("num_speculative_tokens"))
    adaptive, copies = _mode(plan, settings)
    fixed = set(FIXED_LENGTHS) & set(settings)
    given = settings.get("num_speculative_tokens_per_batch_size")
    return Drafting(
        length=length,
        slots=max(length, LONGEST_PACED) if adaptive and not fixed and spare_slots else length,
        table=given if fixed else batch_table(plan, always=adaptive),
        pacing=plan.pacing if adaptive else None,
        copies=copies,
        padding=tuple(plan.pacing.padded_batches()) if plan.pacing else (),
    )


def _mode(plan: SkipPlan, settings: dict[str, Any]) -> tuple[bool, bool]:
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


def batch_table(plan: SkipPlan, always: bool = False) -> Table | None:
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
