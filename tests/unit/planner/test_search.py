"""Ranking, keep-set sizes, and the choice of keep set and draft length."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.schema import FitScore, LayerScore
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.rounds import AcceptedRuns
from sdfp_vllm.planner.search import candidate_sizes, ranked_layers, search
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.tiny_models import tiny_ids, tiny_model
from tests.unit.planner.test_cost import cost


def scores(totals: list[float], diagonal: list[float] | None = None) -> list[LayerScore]:
    def fit(trace: float, form: float) -> FitScore:
        return FitScore(fisher_trace=trace, perturbation_variance=1.0, trace_score=trace, diagonal_score=form)

    return [
        LayerScore(layer=i, total=fit(t, d), attention=fit(t, d), mlp=fit(t, d))
        for i, (t, d) in enumerate(zip(totals, diagonal or totals, strict=True))
    ]


class _Scripted:
    """Stands in for acceptance alone: every draft of a keep set is accepted `lengths[size]` deep."""

    def __init__(self, lengths: dict[int, int]):
        self.lengths, self.asked = lengths, []

    def run(self, keep, steps, proceed):
        self.asked.append(list(keep))
        runs = None
        for j in range(1, steps + 1):
            lengths = torch.full((2, 40), min(self.lengths[len(keep)], j))
            runs = AcceptedRuns(lengths, torch.tensor([40, 40]), j)
            if not proceed(runs):
                break
        return runs


def flat_cost(num_layers: int = 8, **changes):
    """Verification of up to 9 rows costs what one row costs; no overheads."""
    rows = list(range(1, 10))
    free = {"round_overhead_ms": 0.0, "draft_overhead_ms": 0.0}
    flat = {"layer": [1.0] * 9, "head": [0.0] * 9}
    return cost(rows=rows, num_layers=num_layers, **(free | flat | changes))


def test_first_and_last_lead_unless_far_below_the_median():
    assert ranked_layers(scores([2.0, 9.0, 5.0, 7.0, 1.0])) == [0, 4, 1, 3, 2]
    assert ranked_layers(scores([2.0, 9.0, 5.0, 7.0, 0.01])) == [0, 1, 3, 2, 4]
    assert ranked_layers(scores([1.0] * 4)) == [0, 3, 1, 2]


def test_ranking_follows_the_form_asked_for():
    both = scores([1.0, 5.0, 3.0, 1.0], diagonal=[1.0, 3.0, 5.0, 1.0])
    assert ranked_layers(both, "trace") == [0, 3, 1, 2]
    assert ranked_layers(both, "diagonal") == [0, 3, 2, 1]
    with pytest.raises(SdfpError, match="score-form"):
        ranked_layers(both, "other")


@pytest.mark.parametrize("layers", [2, 3, 16, 17, 18, 24, 32, 80])
def test_sizes_are_few_ascending_and_dense_where_drafts_are_short(layers):
    sizes = candidate_sizes(layers)
    assert sizes == sorted(set(sizes)) and len(sizes) <= 16
    assert sizes[0] == 1 and sizes[-1] == layers - 1
    assert sizes[:8] == list(range(1, min(layers, 9)))


def test_picks_the_fastest_of_layers_and_draft_length():
    # By hand, 8 layers: size 2 with 3 accepted: (3 + 1) * 8 / (3 * 2 + 8) = 2.29; size 1 with one
    # accepted: 2 * 8 / 9 = 1.78. Size 3 cannot win even if all 8 are: 9 * 8 / (24 + 8) = 2.25.
    rollout = _Scripted({1: 1, 2: 3, 3: 4, 4: 4, 5: 5, 6: 8, 7: 8})
    choice = search(rollout, scores([9.0, 5.0, 8.0, 7.0, 6.0, 4.0, 3.0, 9.0]), flat_cost())
    assert choice.kept_layers == [0, 7] and choice.draft_tokens == 3
    assert choice.prediction.speedup == pytest.approx(32 / 14)
    assert choice.prediction.acceptance_rate == 1.0 and choice.prediction.mean_accepted_length == 4.0
    assert choice.worthwhile
    assert choice.curve[0].speedup[1] == pytest.approx(16 / 9)
    assert rollout.asked == [[0], [0, 7]]


def test_drafting_further_stops_where_it_cannot_win():
    choice = search(_Scripted({1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 0}), scores([1.0] * 8), flat_cost())
    assert not choice.worthwhile
    assert len(choice.curve[0].acceptance) == 1 and choice.curve[0].acceptance == [0.0]
    assert choice.prediction.speedup == pytest.approx(8 / 9) and choice.draft_tokens == 1


def test_a_cliff_in_verification_shortens_the_draft():
    layer = [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    choice = search(_Scripted({n: 8 for n in range(1, 8)}), scores([1.0] * 8), flat_cost())
    cliff = cost(rows=list(range(1, 10)), layer=layer, head=[0.0] * 9, num_layers=8)
    short = search(_Scripted({n: 8 for n in range(1, 8)}), scores([1.0] * 8), cliff)
    assert choice.draft_tokens == 8 and short.draft_tokens == 2


def test_a_later_larger_set_wins_where_it_is_faster():
    rollout = _Scripted({1: 0, 2: 0, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8})
    choice = search(rollout, scores([9.0, 5.0, 8.0, 7.0, 6.0, 4.0, 3.0, 9.0]), flat_cost())
    assert rollout.asked[:3] == [[0], [0, 7], [0, 2, 7]]
    assert choice.kept_layers == [0, 2, 7] and choice.draft_tokens == 4  # 5 * 8 / (12 + 8) = 2
    assert choice.prediction.speedup == pytest.approx(2.0)


def test_fixed_layers_and_draft_tokens_are_obeyed():
    rollout = _Scripted({n: 8 for n in range(1, 8)})
    choice = search(rollout, scores([1.0] * 8), flat_cost(), layers=5, draft_tokens=2)
    assert len(choice.kept_layers) == 5 and choice.draft_tokens == 2 and choice.by_batch == []
    assert rollout.asked == [choice.kept_layers]


@pytest.mark.parametrize("asked", [{"layers": 0}, {"layers": 8}, {"draft_tokens": 0}, {"draft_tokens": 33}])
def test_out_of_range_is_refused(asked):
    with pytest.raises(SdfpError, match=r"Keep 1 to 7|Draft 1 to 32"):
        search(_Scripted({}), scores([1.0] * 8), flat_cost(), **asked)


def test_a_single_layer_is_refused():
    with pytest.raises(SdfpError, match="single decoder layer"):
        search(_Scripted({}), scores([1.0]), flat_cost(1))


def test_larger_batches_draft_less_down_to_nothing():
    rows = [*range(1, 10), 64]
    rising = [1.0 + 0.03 * (m - 1) for m in rows[:-1]] + [64.0]  # memory-bound, then compute-bound
    measured = cost(rows=rows, layer=rising, head=[0.0] * 10, num_layers=8)
    choice = search(_Scripted({n: 2 for n in range(1, 8)}), scores([1.0] * 8), measured)
    lengths = [k for _, k in choice.by_batch]
    assert choice.by_batch[0] == (1, choice.draft_tokens)
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == 0


def test_on_a_real_rollout_the_curve_agrees_with_the_cost():
    stack = DecoderStack(tiny_model("llama", eos_token_id=None))
    with torch.no_grad():  # idle middle layers, so that a pruned draft is right
        for layer in stack.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    text = greedy_continuations(stack, tiny_ids(3, 8), 24)
    measured = flat_cost(4)
    choice = search(DraftRollout(stack, text), scores([3.0, 1.0, 2.0, 3.0]), measured)
    assert choice.kept_layers == [0, 3] and choice.prediction.acceptance_rate == 1.0
    k = choice.draft_tokens
    assert choice.prediction.speedup == pytest.approx((k + 1) * 4 / (2 * k + 4))
    chosen = next(c for c in choice.curve if c.view == choice.keep)
    assert chosen.speedup[k] == choice.prediction.speedup == max(chosen.speedup)
