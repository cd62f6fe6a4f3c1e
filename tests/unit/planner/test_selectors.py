"""The selectors: nested families, learned gates, and a local search that mends what FIT got wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.planner import gradient, local
from sdfp_vllm.planner.families import evenly_spaced, fit_branches, nested_keep_sets
from sdfp_vllm.planner.first_step import FirstStep
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.rounds import AcceptedRuns
from sdfp_vllm.planner.search import Choice, Trial, best_trial
from sdfp_vllm.planner.selectors import SELECTORS, Problem, check_selector, most_steps
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.tiny_models import tiny_ids
from tests.unit.planner.test_cost import cost
from tests.unit.planner.test_rollout import _tiny
from tests.unit.planner.test_search import flat_cost, scores

# Of these scores FIT keeps layers 0, 1 and 3 before 2; what really works is set by `idle`.
MISLEADING = [9.0, 5.0, 1.0, 8.0]


def idle(stack: DecoderStack, attention=(), mlp=()) -> DecoderStack:
    with torch.no_grad():
        for i in attention:
            stack.layers[i].self_attn.o_proj.weight.zero_()
        for i in mlp:
            stack.layers[i].mlp.down_proj.weight.zero_()
    return stack


def problem(stack: DecoderStack, **changes) -> Problem:
    text = greedy_continuations(stack, tiny_ids(8, 8), 24)
    judging, held = text.split(4)
    assert held is not None
    fields = {
        "judging": DraftRollout(stack, judging),
        "held": DraftRollout(stack, held),
        "scores": scores(MISLEADING),
        "cost": flat_cost(4),
    }
    return Problem(**(fields | changes))


def trial(choice: Choice) -> Trial:
    return Trial(choice.keep, choice.runs, choice.draft_tokens, choice.prediction.speedup)


# ---------------------------------------------------------------- families
def test_nested_sets_fill_the_time_asked_for():
    values = torch.tensor([[9.0, 1.0], [2.0, 8.0], [3.0, 4.0], [7.0, 6.0]])
    measured = flat_cost(4)  # attention 1/4, MLP 3/4
    family = nested_keep_sets(values, measured, [1, 2, 3])
    assert family == [
        KeepSet(attention=(0,), mlp=(1,)),
        KeepSet(layers=(3,), attention=(0,), mlp=(1,)),
        KeepSet(layers=(2, 3), attention=(0,), mlp=(1,)),
    ]
    for keep, size in zip(family, (1, 2, 3), strict=True):
        assert measured.layers_ms(keep, 1) <= size


def test_equal_values_come_together_and_a_set_without_attention_is_left_out():
    tied = torch.tensor([[5.0, 5.0], [1.0, 1.0], [1.0, 1.0], [3.0, 3.0]])
    assert nested_keep_sets(tied, flat_cost(4), [1, 2, 3]) == [KeepSet((0,)), KeepSet((0, 3))]
    mlp_first = torch.tensor([[0.0, 9.0], [0.0, 0.0]])
    assert nested_keep_sets(mlp_first, flat_cost(2), [1]) == []


def test_evenly_spaced_layers():
    assert evenly_spaced(9, [1, 2, 3, 5]) == [
        KeepSet((0,)),
        KeepSet((0, 8)),
        KeepSet((0, 4, 8)),
        KeepSet((0, 2, 4, 6, 8)),
    ]
    assert all(len(set(k.layers)) == n for n in range(1, 16) for k in evenly_spaced(16, [n]))


def test_fit_ranks_branches_by_score_over_time_and_ends_first():
    values = fit_branches(scores([1.0, 1.0, 4.0, 1.0]), cost(), "trace")  # a branch scores as its layer
    assert values[2, 0] == pytest.approx(16.0) and values[2, 1] == pytest.approx(16 / 3)
    assert values[0].min() >= values[1:3].max() and values[3].min() >= values[1:3].max()


# ---------------------------------------------------------------- gradient
def test_gates_learn_which_branches_do_nothing():
    stack = idle(_tiny(), attention=(1,), mlp=(1, 2))
    given = problem(stack)
    logits = gradient.learn_gates(FirstStep(given.judging), given.cost, steps=12)
    useless = [logits[1, 0], logits[1, 1], logits[2, 1]]
    useful = [logits[0, 0], logits[0, 1], logits[3, 0], logits[3, 1]]
    assert max(useless) < min(useful)
    assert torch.equal(logits, gradient.learn_gates(FirstStep(given.judging), given.cost, steps=12))


# ---------------------------------------------------------------- local search
def test_auto_finds_the_layer_that_fit_ranked_last():
    stack = idle(_tiny(), attention=(1, 3), mlp=(1, 3))  # only 0 and 2 do anything
    given = problem(stack)
    fit = SELECTORS["fit"](given)
    assert given.held is not None
    auto = local.LocalSearch(given.judging, given.held, given.cost, whole=True).improve([trial(fit)])
    assert auto.keep == KeepSet((0, 2)) and auto.prediction.acceptance_rate == 1.0
    assert auto.prediction.speedup > fit.prediction.speedup
    assert auto.keep in [c.keep for c in auto.curve]
    chosen = next(c for c in auto.curve if c.keep == auto.keep)
    assert chosen.speedup[auto.draft_tokens] == auto.prediction.speedup


def test_auto_splits_a_layer_whose_mlp_does_nothing():
    stack = idle(_tiny(), attention=(1, 2), mlp=(1, 2, 3))
    auto = SELECTORS["auto"](problem(stack))
    assert auto.keep == KeepSet(layers=(0,), attention=(3,)) and auto.prediction.acceptance_rate == 1.0


def test_a_cost_that_is_fixed_is_not_exceeded():
    stack = idle(_tiny(), attention=(1, 3), mlp=(1, 3))
    for name in SELECTORS:
        choice = SELECTORS[name](problem(stack, layers=1, draft_tokens=2))
        assert flat_cost(4).layers_ms(choice.keep, 1) <= 1.0 and choice.draft_tokens == 2


def test_no_move_is_taken_without_a_gain_on_held_out_text():
    stack = idle(_tiny(), attention=(1, 3), mlp=(1, 3))
    given = problem(stack)
    start = SELECTORS["fit"](given)

    class Hostile(DraftRollout):
        """On this text all but the start's drafts are wrong."""

        def run(self, keep, steps, *args, **kwargs):
            runs = super().run(keep, steps)
            if KeepSet.of(keep) == start.keep:
                return runs
            return dataclasses.replace(runs, lengths=torch.zeros_like(runs.lengths))

    held = Hostile(stack, given.judging.text)
    stayed = local.LocalSearch(given.judging, held, given.cost).improve([trial(start)])
    moved = local.LocalSearch(given.judging, given.held, given.cost).improve([trial(start)])
    assert stayed.keep == start.keep != moved.keep


class Scripted:
    """Stands in for a rollout over 8 sequences of one round each: `accepted[keep]` says how many drafts each yields."""

    def __init__(self, accepted: dict[KeepSet, list[int]]):
        self.accepted, self.asked = accepted, []

    def run(self, keep, steps, proceed=None):
        self.asked.append(keep)
        lengths = torch.tensor(self.accepted[keep])[:, None].expand(-1, 4)
        return AcceptedRuns(lengths, torch.full((len(lengths),), 4), steps)


A, B, C = (KeepSet((i,)) for i in (0, 1, 2))


def pick(judging: dict, held: dict) -> tuple[KeepSet, list[KeepSet]]:
    """Which of the starts is taken at 4 draft tokens, and what was run on the held-out text."""
    texts, measured = (Scripted(judging), Scripted(held)), flat_cost(4)
    search = local.LocalSearch(*texts, measured, draft_tokens=4)  # type: ignore[arg-type]
    starts = [best_trial(keep, texts[0].run(keep, 4), measured, [4]) for keep in judging]
    return search._start(starts)[0].keep, texts[1].asked


def test_close_starts_are_decided_on_both_texts():
    noisy, steady = [4, 0, 4, 0, 4, 0, 4, 0], [2, 2, 2, 2, 2, 2, 2, 1]
    far = [0, 0, 0, 1, 0, 0, 1, 0]
    judging = {A: noisy, B: steady, C: far}
    better_held = {A: [0] * 8, B: [3] * 8}
    assert pick(judging, better_held) == (B, [A, B])  # C is far behind and costs no rollout
    assert pick(judging, {A: [3] * 8, B: [2] * 8})[0] == A
    clear = {A: [3, 3, 3, 3, 3, 3, 3, 4], B: [1, 1, 1, 2, 1, 1, 1, 1]}
    assert pick(clear, {A: [0] * 8, B: [4] * 8}) == (A, [A])


def test_a_move_has_to_be_better_on_either_text_and_clearly_on_both():
    measured = flat_cost(4)

    def taken(ours: tuple[list[int], list[int]], theirs: tuple[list[int], list[int]]) -> bool:
        judging, held = (
            Scripted(dict(zip((A, B), both, strict=True))) for both in zip(ours, theirs, strict=True)
        )
        search = local.LocalSearch(judging, held, measured, draft_tokens=4)  # type: ignore[arg-type]
        new, now = (best_trial(keep, judging.run(keep, 4), measured, [4]) for keep in (A, B))
        return search._judge(new, now, held.run(B, 4)) is not None

    some, more = [1, 2, 1, 2, 1, 2, 1, 2], [2, 2, 2, 2, 2, 3, 2, 2]
    noisy = [3, 1, 1, 1, 3, 1, 2, 1]  # more than `some`, by less than its error
    assert taken((more, more), (some, some))
    assert taken((noisy, more), (some, some))  # uncertain on one text, certain on both
    assert not taken((noisy, noisy), (some, some))
    assert not taken((more, [0] * 8), (some, [0] * 8))  # no better on the held-out text
    assert not taken(([1] * 8, [4] * 8), (some, some))  # worse on the judging text


def test_never_below_fit_on_the_texts_it_judges_on_and_bounded():
    for seed in range(2):
        stack = DecoderStack(_tiny().model)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for layer in stack.layers:
                layer.mlp.down_proj.weight.mul_(torch.rand(1, generator=generator))
                layer.self_attn.o_proj.weight.mul_(torch.rand(1, generator=generator))
        news: list[str] = []
        given = problem(stack, advance=news.append)
        assert given.held is not None
        fit, auto = SELECTORS["fit"](given), SELECTORS["auto"](given)
        runs = local.pooled(given.judging.run(fit.keep, 8), given.held.run(fit.keep, 8))
        on_both = best_trial(fit.keep, runs, given.cost, [fit.draft_tokens])
        assert auto.prediction.speedup >= on_both.speedup * (1 - 1e-9)
        assert len(news) <= most_steps("fit", 4, None) + most_steps("auto", 4, None)


def test_gain_and_its_error_are_the_jackknifes():
    ends = torch.tensor([4, 4])
    ours = AcceptedRuns(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]]), ends, 1)
    theirs = AcceptedRuns(torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]]), ends, 1)
    a, b = (Trial(KeepSet((0,)), runs, 1, 0.0) for runs in (ours, theirs))
    # Rounds of one draft: ours yield 4 tokens in 2 rounds and 5 in 3; theirs 5 in 3 and 4 in 4.
    tokens = [(4, 2), (5, 3)], [(5, 3), (4, 4)]
    assert [[tuple(map(int, row)) for row in local._tokens_and_rounds(t)] for t in (a, b)] == list(tokens)
    gain, error = local.log_gain(a, b, flat_cost(4))
    assert gain == pytest.approx(math.log(9 / 5 / (9 / 7)))
    left = [math.log(5 / 3 / (4 / 4)), math.log(4 / 2 / (5 / 3))]
    mean = sum(left) / 2
    assert error == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in left) / 2))
    assert local.log_gain(a, a, flat_cost(4)) == (0.0, 0.0)


def test_moves_of_a_keep_set():
    keep = KeepSet(layers=(0, 1), attention=(3,))
    assert local.without(keep, (("mlp", 0),)) == KeepSet(layers=(1,), attention=(0, 3))
    assert local.with_(keep, (("mlp", 3),)) == KeepSet(layers=(0, 1, 3))
    assert local.shifts(keep, 5) == [
        KeepSet(layers=(1, 2), attention=(3,)),
        KeepSet(layers=(0, 2), attention=(3,)),
        KeepSet(layers=(0, 1), attention=(2,)),
        KeepSet(layers=(0, 1), attention=(4,)),
    ]
    assert list(local.units(KeepSet((0,)), 2, kept=True, whole=True)) == [(("attention", 0), ("mlp", 0))]
    assert len(list(local.units(keep, 5, kept=False, whole=False))) == 1 + 3 + 3


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_where_branches_cannot_run_alone_none_is_proposed(name):
    """Gemma's branches have norms behind them, which the engine would have to run apart."""
    stack = _tiny("gemma3_text")
    assert not stack.has_sublayers
    choice = SELECTORS[name](problem(stack))
    assert not any(c.keep.partial for c in choice.curve) and not choice.keep.partial


def test_an_unknown_selector_is_refused_by_name():
    with pytest.raises(SdfpError, match=r"--selector: 'best'.*auto, fit, gradient"):
        check_selector("best")
