"""The search: which view of the target drafts fastest, and with which head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.rounding import copy_bytes
from sdfp_vllm.plan.schema import Chances, LayerScore
from sdfp_vllm.plan.view import BRANCHES, Precision
from sdfp_vllm.planner.bridged_search import VARIANTS, search_bridged
from sdfp_vllm.planner.chances import measure_chances
from sdfp_vllm.planner.head import RolledHead, head_bytes, rank_tokens
from sdfp_vllm.planner.head_search import HeadChoice, check_head, search_head
from sdfp_vllm.planner.memory import Memory, parse_memory
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.rollout import Continuations, DraftRollout
from sdfp_vllm.planner.rounded import fused_linears
from sdfp_vllm.planner.search import MAX_TRIED, candidate_sizes
from sdfp_vllm.planner.selectors import SELECTORS, Problem, most_steps
from sdfp_vllm.planner.stack import DecoderStack
from sdfp_vllm.planner.work import Work


@dataclass(frozen=True)
class Drafted:
    """The draft that was chosen: its view and head, its chances of acceptance, and what the choice was made from."""

    choice: HeadChoice
    chances: Chances
    scores: list[LayerScore]
    memory: Memory


def choose(
    work: Work, stack: DecoderStack, text: Continuations, scores: list[LayerScore], costs: Costs
) -> Drafted:
    """Tries drafts on what the target wrote; the view, head and bridges that are predicted to be fastest."""
    options, texts, bar = work.options, work.texts, work.bar
    memory = _memory(stack, costs, options)
    vocab_size, hidden_size = next(stack.head.parameters()).shape
    precisions = _asked(costs, options)
    sizes = 1 if options.layers else len(candidate_sizes(stack.num_layers))
    steps = most_steps(options.selector, stack.num_layers, options.layers, len(precisions))
    steps += sizes * len(VARIANTS[options.bridge])
    # Bridges are judged on the same text as keep sets without, and fitted on the rest.
    tried, rest = text.split(options.text_sequences)
    held = None
    if options.confirms:
        assert rest is not None
        held, rest = rest.split(options.text_sequences)
    # The head is read whole for each draft: at the lowest precision there is, unless nothing is to be rounded.
    head_precision: Precision = "full"
    if len(precisions) > 1 and memory.admits(KeepSet(), "int8"):
        head_precision = min(costs.head, key=lambda p: costs.head[p][0])
    head = RolledHead(stack, None, head_precision) if head_precision != "full" else None
    allowed, dtype = memory, next(stack.head.parameters()).dtype
    if head is not None:
        costs = costs.model_copy(update={"draft_head": costs.head[head_precision]})
        memory = memory.less(memory.head[head_precision])
    with bar.step("Trying drafts", steps) as advance:

        def news(line: str) -> None:
            advance(1, f"Trying drafts ({line})")

        rollout = DraftRollout(stack, tried, head)
        problem = Problem(
            rollout,
            DraftRollout(stack, held, head) if held else None,
            scores,
            costs,
            form=options.score_form,
            layers=options.layers,
            draft_tokens=options.draft_tokens,
            advance=news,
            precisions=precisions,
            memory=memory,
        )
        found = search_bridged(
            options.bridge,
            rollout,
            rest,
            scores,
            costs,
            unbridged=lambda: SELECTORS[options.selector](problem),
            form=options.score_form,
            layers=options.layers,
            draft_tokens=options.draft_tokens,
            advance=news,
        )
    with bar.step("Draft head", 1) as advance:
        own = (rest or held or tried).written()
        chosen = search_head(
            check_head(options.head, vocab_size),
            found,
            rollout,
            lambda: rank_tokens(texts.frequencies(own, vocab_size), always=texts.tokenizer.all_special_ids),
            vocab_size,
            draft_tokens=options.draft_tokens,
            news=lambda line: advance(0, f"Draft head ({line})"),
            precision=head_precision,
            admits=lambda view, tokens, precision: allowed.admits_bytes(
                allowed.of(view) + head_bytes(tokens, hidden_size, precision, dtype)
            ),
        )
    with bar.step("Confidence of the drafts", 1):
        chances = measure_chances(
            rollout,
            chosen.found.choice.keep,
            options.draft_tokens or MAX_TRIED,
            bridges=chosen.found.fitted.bridges,
            head=chosen.rolled(stack),
        )
    return Drafted(chosen, chances, scores, allowed)


def _memory(stack: DecoderStack, costs: Costs, options: PlanOptions) -> Memory:
    """What rounded copies take, and may."""
    dtype = next(stack.head.parameters()).dtype
    branches: dict[tuple[str, Precision], int] = {}
    layer: Any = stack.layers[0]
    for branch, module in zip(BRANCHES, (layer.self_attn, layer.mlp), strict=True):
        for p in costs.precisions:
            shapes = [w.shape for w in fused_linears(module)] if stack.can_round(branch) else []
            branches[branch, p] = sum(copy_bytes(n, k, p, dtype) for n, k in shapes)
    n, k = next(stack.head.parameters()).shape
    model_bytes = sum(p.numel() * p.element_size() for p in stack.model.parameters())
    head = {p: copy_bytes(n, k, p, dtype) for p in costs.head}
    return Memory(parse_memory(options.extra_memory, model_bytes), branches, head)


def _asked(costs: Costs, options: PlanOptions) -> tuple[Precision, ...]:
    """What branches may run at."""
    if options.precision == "full" or options.bridge not in ("none", "auto"):
        return ("full",)  # bridges are fitted over layers at full precision
    if options.precision == "auto":
        return tuple(costs.precisions)
    return ("full", options.precision)  # type: ignore[return-value]
