"""Drafts under a top-k or top-p: against vLLM's own cut, a reference in float64, and counted draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdfp_vllm.engine.v1.sampling import CANDIDATES, cut, draw, tempered

SMALL, LARGE = 50, 20 * CANDIDATES


def logits(rows: int, vocabulary: int, spread: float = 2.0, seed: int = 0) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def ks(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)  # as vLLM's batch has them


def ps(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def reference(row: Tensor, top_k: int, top_p: float) -> Tensor:
    """One row's cut as `cut` promises it, with a sorted vocabulary, float64: [V] -> [V]."""
    row = row.double()
    order = row.argsort(descending=True, stable=True)
    ends = row[order].cumsum(0)
    kept, mass = len(row), 1.0
    if top_k <= CANDIDATES and top_k < len(row):
        kept = top_k
        mass = float(ends[kept - 1])
    if top_p < 1 and (mass < 1 or ends[: min(CANDIDATES, len(row))][-1] >= top_p):
        kept = min(kept, int((ends < top_p * mass).sum()) + 1)
    row = row.masked_fill(row < row[order[kept - 1]], 0.0)
    return row / row.sum()


def of_vllm(scores: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    return apply_top_k_top_p_pytorch(scores.clone(), top_k, top_p).softmax(-1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "top_k, top_p",
    [
        (ks(1, 3, 20, 49), None),
        (None, ps(0.1, 0.5, 0.9, 0.999)),
        (ks(20, 20, 3, 40), ps(0.95, 0.5, 0.9, 0.2)),
        (ks(SMALL, 5, SMALL, 5), ps(0.9, 1.0, 1.0, 0.8)),  # as vLLM marks what a request does not ask for
    ],
    ids=["top-k", "top-p", "both", "a mixture"],
)
def test_the_cut_is_vllms_where_the_candidates_are_the_vocabulary(top_k, top_p, seed):
    scores = logits(4, SMALL, seed=seed)
    ours = cut(tempered(scores.clone(), torch.ones(4)), top_k, top_p)
    torch.testing.assert_close(ours, of_vllm(scores, top_k, top_p), atol=1e-6, rtol=1e-5)


def test_temperature_comes_before_the_cut():
    scores, temperature = logits(3, SMALL), torch.tensor([0.5, 1.0, 1.7])
    top_k, top_p = ks(10, 10, 10), ps(0.8, 0.8, 0.8)
    ours = cut(tempered(scores.clone(), temperature), top_k, top_p)
    torch.testing.assert_close(ours, of_vllm(scores / temperature[:, None], top_k, top_p))


@pytest.mark.parametrize("spread", [0.1, 2.0, 5.0], ids="spread {}".format)
def test_a_large_vocabulary_is_cut_as_promised(spread):
    asked = [
        (1, 1.0), (20, 1.0), (20, 0.95), (CANDIDATES, 0.9), (CANDIDATES + 1, 1.0), (CANDIDATES + 1, 0.5),
        (LARGE, 0.9), (LARGE, 0.3), (LARGE, 1.0), (LARGE - 1, 0.999),
    ]  # fmt: skip
    whole = tempered(logits(len(asked), LARGE, spread), torch.ones(len(asked)))
    ours = cut(whole.clone(), ks(*(k for k, _ in asked)), ps(*(p for _, p in asked)))
    for row, got, (k, p) in zip(whole, ours, asked, strict=True):
        torch.testing.assert_close(got.double(), reference(row, k, p), atol=1e-6, rtol=1e-4)


def test_rows_without_a_cut_do_not_change_by_a_bit():
    whole = tempered(logits(4, LARGE), torch.ones(4))
    got = cut(whole.clone(), ks(LARGE, 20, LARGE, CANDIDATES + 1), ps(1.0, 1.0, 0.3, 1.0))
    assert got[0].equal(whole[0]) and got[3].equal(whole[3])
    assert (got[1] > 0).sum() == 20 and not got[2].equal(whole[2])


def test_a_nucleus_wider_than_the_candidates_leaves_the_row_whole():
    """Flat over ten times the candidates: drafts from these alone would be accepted a tenth as often."""
    whole = torch.full((1, 10 * CANDIDATES), 0.1 / CANDIDATES)
    assert cut(whole.clone(), None, ps(0.95)).equal(whole)
    assert cut(whole.clone(), ks(5 * CANDIDATES), ps(0.95)).equal(whole)


def test_a_tiny_top_p_keeps_the_best_token():
    for p in (1e-6, 1e-30, 1e-45):
        got = cut(tempered(logits(1, SMALL), torch.ones(1)), ks(20), ps(p))
        assert got.max() == 1.0 and (got > 0).sum() == 1


def test_ties_are_kept_together():
    """As vLLM keeps them at top-k; its top-p drops some by their place in the sort."""
    probs = torch.tensor([[0.1, 0.25, 0.1, 0.25, 0.1, 0.1, 0.1]])
    third = torch.tensor([[1, 2.5, 1, 2.5, 1, 1, 1]]) / 10
    torch.testing.assert_close(cut(probs.clone(), ks(3), None), third)
    torch.testing.assert_close(third, of_vllm(probs.log(), ks(3), None))
    first = torch.tensor([[0, 0.5, 0, 0.5, 0, 0, 0]])
    torch.testing.assert_close(cut(probs.clone(), ks(1), None), first)
    torch.testing.assert_close(cut(probs.clone(), None, ps(0.2)), first)


def test_tokens_that_cannot_be_drawn_stay_so():
    """A restricted draft head gives -inf for the tokens it leaves out, be they more than top-k wants."""
    scores = logits(3, SMALL)
    scores[:, 8:] = -torch.inf
    top_k, top_p = ks(20, 4, SMALL), ps(1.0, 0.9, 0.9)
    got = cut(tempered(scores.clone(), torch.ones(3)), top_k, top_p)
    torch.testing.assert_close(got, of_vllm(scores, top_k, top_p))
    assert got[:, 8:].count_nonzero() == 0 and got[0, :8].count_nonzero() == 8
    assert draw(got.repeat(2_000, 1), {}).max() < 8


def test_logits_of_half_precision_are_tempered_in_full():
    scores = logits(2, SMALL).bfloat16()
    temperature = torch.tensor([0.7, 1.3])
    want = (scores.float() / temperature[:, None]).softmax(-1)
    got = tempered(scores, temperature)
    assert got.dtype == torch.float32 and got.equal(want)


def test_draws_follow_the_distribution():
    probs = cut(tempered(logits(2, SMALL), torch.ones(2)), ks(12, SMALL), None)
    torch.manual_seed(0)
    draws = 40_000
    drawn = draw(probs.repeat(draws, 1), {}).view(draws, 2)
    counts = torch.stack([torch.bincount(row, minlength=SMALL) for row in drawn.T])
    assert counts[probs == 0].sum() == 0
    spread = (draws * probs * (1 - probs)).sqrt()
    assert ((counts - draws * probs).abs() <= 4.5 * spread + 3).all()


def test_a_row_with_a_generator_of_its_own_draws_by_it_alone():
    probs = tempered(logits(3, SMALL), torch.ones(3))

    def drawn(others: int) -> list[list[int]]:
        torch.manual_seed(others)
        own = {1: torch.Generator().manual_seed(5)}
        return torch.stack([draw(probs, own) for _ in range(30)]).T.tolist()

    first, again = drawn(1), drawn(2)
    assert first[1] == again[1]
    assert first[0] != again[0] and first[2] != again[2]
