"""Which tokens a draft head holds, what it does to acceptance, and when it is chosen."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner import head_search
from sdfp_vllm.planner.bridged_search import BridgedChoice
from sdfp_vllm.planner.bridges import FittedBridges
from sdfp_vllm.planner.head import RolledHead, head_bytes, head_sizes, measure_heads, rank_tokens
from sdfp_vllm.planner.head_search import check_head, search_head
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.search import search
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.tiny_models import VOCAB, tiny_ids, tiny_model
from tests.unit.planner.test_search import flat_cost, scores

KEEP = [0, 1, 2]
SHARE = {"full": 1.0, "int8": 0.5}  # of the full-precision head's time


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def rollout(request) -> DraftRollout:
    stack = DecoderStack(tiny_model(request.param))
    return DraftRollout(stack, greedy_continuations(stack, tiny_ids(6, 4), 20))


def test_ranking_goes_by_frequency_then_by_id():
    long, short = torch.tensor([0, 50, 0, 50, 900, 0]), torch.tensor([0, 0, 0, 1, 0, 1])
    # Shares: 0, .05, 0, .05 + .5, .9, .5
    assert rank_tokens([long, short]).tolist() == [4, 3, 5, 1, 0, 2]
    assert rank_tokens([long, short], always=[2, 99]).tolist() == [2, 4, 3, 5, 1, 0]
    assert rank_tokens([torch.zeros(4, dtype=torch.int64)]).tolist() == [0, 1, 2, 3]  # nothing counted


def test_sizes_are_fractions_below_the_vocabulary():
    assert head_sizes(151936) == [4800, 9536, 19008, 38016, 75968]
    assert head_sizes(61) == [] and head_sizes(300) == [64, 128, 192]
    assert all(n % 64 == 0 for n in head_sizes(32000))


def test_the_restricted_argmax_is_the_full_heads_among_the_tokens(rollout):
    tokens = torch.arange(0, VOCAB, 3)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = rollout.stack.head(x)
        assert torch.equal(RolledHead(rollout.stack, tokens)(x), logits[:, tokens])
        assert torch.equal(RolledHead(rollout.stack, None)(x), logits)


def test_a_head_of_all_tokens_changes_nothing_and_acceptance_never_exceeds_the_coverage(rollout):
    full = rollout.run(KEEP, 3)
    every = RolledHead(rollout.stack, torch.arange(VOCAB))
    assert torch.equal(rollout.run(KEEP, 3, head=every).lengths, full.lengths)
    half = torch.arange(0, VOCAB, 2)
    part = RolledHead(rollout.stack, half)
    runs = rollout.run(KEEP, 3, head=part)
    assert not torch.equal(runs.lengths, full.lengths)
    # With all layers kept the draft is the target: accepted is what lies in the part, and nothing else.
    own = rollout.run(range(4), 1, head=part).lengths
    inside = torch.isin(rollout.target, half)
    inside &= (
        torch.arange(rollout.text.first, inside.shape[1] + rollout.text.first) < rollout.text.ends[:, None]
    )
    assert torch.equal(own.bool(), inside)


def found(rollout: DraftRollout, **changes) -> BridgedChoice:
    cost = flat_cost(4, **changes)
    choice = search(rollout, scores([4.0, 3.0, 2.0, 1.0]), cost)
    return BridgedChoice(choice, FittedBridges(), cost, choice.prediction.speedup)


@pytest.fixture
def by_hand(monkeypatch):
    """A head costs in proportion to its tokens; sizes that fit a tiny vocabulary."""
    monkeypatch.setattr(head_search, "head_sizes", lambda vocab: [VOCAB // 4, VOCAB // 2])
    monkeypatch.setattr(
        head_search,
        "measure_heads",
        lambda stack, ranking, heads: {(n, p): SHARE[p] * n / len(ranking) for n, p in heads},
    )


def own_ranking(rollout: DraftRollout) -> torch.Tensor:
    return rank_tokens([torch.bincount(rollout.text.written(), minlength=VOCAB)])


def test_a_dear_head_is_restricted_and_the_prediction_is_the_rollouts(rollout, by_hand):
    before = found(rollout, head=[8.0] * 9)
    got = search_head("auto", before, rollout, lambda: own_ranking(rollout), VOCAB)
    assert got.tokens is not None and len(got.tokens) in (15, 30)
    choice, cost = got.found.choice, got.found.cost
    assert choice.prediction.speedup > 1.02 * before.choice.prediction.speedup
    head = got.rolled(rollout.stack)
    assert head is not None and head.tokens is not None and head.tokens.tolist() == got.tokens.tolist()
    rounds = rollout.run(choice.keep, choice.draft_tokens, head=head).rounds(choice.draft_tokens)
    want = cost.speedup(choice.keep, choice.draft_tokens, rounds.mean_accepted_length)
    assert choice.prediction.speedup == pytest.approx(want)
    assert cost.draft_head == pytest.approx([8.0 * len(got.tokens) / VOCAB] * 9)
    assert cost.head == before.cost.head  # the target's is as it was
    assert got.coverage == torch.isin(rollout.text.written(), got.tokens).double().mean().item()
    (on_curve,) = [c for c in choice.curve if c.view == choice.keep]
    assert on_curve.speedup[choice.draft_tokens] == pytest.approx(choice.prediction.speedup)


def test_a_cheap_head_stays_full_and_nothing_is_counted(rollout, by_hand):
    def counted() -> torch.Tensor:
        raise AssertionError("tokens were counted where no head could matter")

    before = found(rollout, head=[0.01] * 9)
    for request in ("auto", "full"):
        got = search_head(request, before, rollout, counted, VOCAB)
        assert got.tokens is None and got.found is before and got.rolled(rollout.stack) is None
    assert search_head("full", found(rollout, head=[8.0] * 9), rollout, counted, VOCAB).tokens is None


def test_a_head_that_lacks_what_the_target_writes_stays_full(rollout, by_hand):
    before = found(rollout, head=[2.0] * 9)
    never = own_ranking(rollout).flip(0)
    assert search_head("auto", before, rollout, lambda: never, VOCAB).tokens is None


def test_a_number_is_taken_even_where_it_is_slower(rollout, by_hand):
    before = found(rollout, head=[0.01] * 9)
    got = search_head(7, before, rollout, lambda: own_ranking(rollout), VOCAB, draft_tokens=2)
    assert got.tokens is not None and len(got.tokens) == 7 and got.found.choice.draft_tokens == 2
    assert got.tokens.tolist() == sorted(set(got.tokens.tolist()))


def test_what_there_is_no_memory_for_is_not_taken(rollout, by_hand):
    before = found(rollout, head=[8.0] * 9)

    def search(request, most: int):
        return search_head(
            request,
            before,
            rollout,
            lambda: own_ranking(rollout),
            VOCAB,
            admits=lambda view, tokens, precision: (
                tokens <= most and view in [c.view for c in before.choice.curve]
            ),
        )

    assert search("auto", 0).tokens is None
    assert len(search("auto", VOCAB // 4).tokens) == VOCAB // 4
    assert len(search(7, 7).tokens) == 7
    with pytest.raises(SdfpError, match=r"--head 7.*--extra-memory"):
        search(7, 6)


def test_fewer_tokens_are_tried_at_the_heads_precision_too(rollout, by_hand, monkeypatch):
    rolled = []

    def head(stack, tokens, precision):  # rounds nothing: what is cheaper wins
        rolled.append((len(tokens), precision))
        return RolledHead(stack, tokens)

    monkeypatch.setattr(head_search, "RolledHead", head)
    before = found(rollout, head=[8.0] * 9, rounded=SHARE, draft_head=[4.0] * 9)
    got = search_head("auto", before, rollout, lambda: own_ranking(rollout), VOCAB, precision="int8")
    assert got.tokens is not None and got.precision == "int8" and {p for _, p in rolled} == {"int8"}
    assert got.found.cost.draft_head == pytest.approx([4.0 * len(got.tokens) / VOCAB] * 9)
    whole = search_head("full", before, rollout, lambda: own_ranking(rollout), VOCAB, precision="int8")
    assert (whole.tokens, whole.precision, whole.found) == (None, "int8", before)


def test_bytes_of_a_heads_rows():
    assert head_bytes(100, 64, "full", torch.bfloat16) == 100 * 64 * 2
    assert head_bytes(100, 64, "full", torch.float32) == 100 * 64 * 4
    assert head_bytes(100, 64, "int8", torch.bfloat16) == 100 * 64 + 4 * 100


def test_measured_shares(rollout):
    heads = [(8, "full"), (32, "full"), (VOCAB, "full")]
    shares = measure_heads(rollout.stack, torch.arange(VOCAB), heads)
    assert set(shares) == set(heads) and all(s > 0 for s in shares.values())


@pytest.mark.parametrize("request_", ["", "none", "0", "-3", "61", "1e3", "2.5"])
def test_requests_that_no_head_can_meet(request_):
    with pytest.raises(SdfpError, match=r"--head.*auto, full, or a number of tokens from 1 to 60"):
        check_head(request_, VOCAB)


def test_requests():
    assert [check_head(r, VOCAB) for r in ("auto", "full", "60")] == ["auto", "full", 60]
