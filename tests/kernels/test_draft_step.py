"""draft_step against a row-by-row account, its noise against the distribution it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdfp_vllm.kernels.draft_noise import gumbel_noise_reference
from sdfp_vllm.kernels.draft_step import DraftWorkspace, KvSlots, draft_step, reference

LIMIT, STATES, DRAFTS, POISON = 96, 160, 4, -77


def a_step(
    rows: int, vocab: int, groups: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """Rows in random order of state, one in four padding, one in three greedy, some at the last position."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=dtype)

    positions = integers(0, LIMIT, rows)
    if rows:
        positions[0] = LIMIT - 1  # the next one is past the limit
    sizes = (8, 16, 32)[:groups]
    idx = torch.randperm(STATES, generator=g)[:rows].int()
    idx[3::4] = -1
    logits = torch.randn(rows, vocab + 5, generator=g).to(dtype)[:, :vocab]
    return dict(
        logits=logits,
        idx_mapping=idx,
        temperature=torch.rand(STATES, generator=g) * (torch.arange(STATES) % 3 > 0),
        seeds=integers(-(1 << 62), 1 << 62, STATES),
        step=torch.tensor(1),
        positions=positions,
        seq_lens=(positions + 1).int(),
        input_ids=torch.full((rows + 2,), POISON, dtype=torch.int32),
        draft_tokens=torch.full((rows + 2, DRAFTS), POISON),
        slots=KvSlots(
            tuple(integers(1, 500, STATES, LIMIT // size, dtype=torch.int32) for size in sizes),
            sizes,
            torch.full((groups, rows + 3), POISON),
        ),
        max_model_len=LIMIT,
        logits_cache=torch.full((STATES, DRAFTS, vocab), float(POISON), dtype=dtype),
    )


def run(op, s: dict[str, Any]) -> None:
    if op is draft_step:
        s = s | {"workspace": DraftWorkspace(len(s["idx_mapping"]), s["logits"].shape[1], "cpu")}
    op(**s)


def check_step(s: dict[str, Any], before: dict[str, Any]) -> None:
    rows, vocab = s["logits"].shape
    assert (s["input_ids"][rows:] == POISON).all() and (s["draft_tokens"][rows:] == POISON).all()
    assert (s["draft_tokens"][:, [0, 2, 3]] == POISON).all()
    assert (s["slots"].slot_mapping[:, rows:] == POISON).all()
    cached = set()
    for t in range(rows):
        state, position = int(s["idx_mapping"][t]), int(before["positions"][t])
        if state < 0:
            assert (s["slots"].slot_mapping[:, t] == -1).all()
            assert s["input_ids"][t] == POISON and s["draft_tokens"][t, 1] == POISON
            assert s["positions"][t] == position and s["seq_lens"][t] == before["seq_lens"][t]
            continue
        score = s["logits"][t].double()
        if s["temperature"] is not None and (temperature := float(s["temperature"][state])) > 0:
            seed, at = s["seeds"][state : state + 1], torch.tensor([position])
            score = score / temperature + gumbel_noise_reference(seed, at, torch.arange(vocab))[0].double()
        token = int(s["draft_tokens"][t, 1])
        assert score[token] >= score.max() - 1e-4  # float32 may settle a tie otherwise
        assert s["input_ids"][t] == token
        assert s["positions"][t] == min(position + 1, LIMIT - 1)
        assert s["seq_lens"][t] == min(before["seq_lens"][t] + 1, LIMIT)
        for table, size, slot in zip(
            s["slots"].block_tables, s["slots"].block_sizes, s["slots"].slot_mapping[:, t], strict=True
        ):
            after = position + 1
            want = -1 if after >= LIMIT else int(table[state, after // size]) * size + after % size
            assert slot == want
        if s["logits_cache"] is not None:
            assert torch.equal(s["logits_cache"][state, 1], s["logits"][t])
            cached.add(state)
    if s["logits_cache"] is not None:
        for state in range(STATES):
            others = [0, 2, 3] if state in cached else range(DRAFTS)
            assert (s["logits_cache"][state, list(others)] == POISON).all()


def copies(s: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("op", [draft_step, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab", "groups"), [(1, 61, 1), (3, 4096, 2), (5, 9001, 3), (123, 300, 2), (0, 61, 1)]
)
def test_every_output_row_by_row(op, rows, vocab, groups, dtype):
    s = a_step(rows, vocab, groups, dtype)
    before = copies(s)
    run(op, s)
    check_step(s, before)


@pytest.mark.parametrize("op", [draft_step, reference], ids=["kernel", "reference"])
def test_greedy_without_temperatures(op):
    s = a_step(5, 9001) | {"temperature": None, "seeds": None, "logits_cache": None}
    before = copies(s)
    run(op, s)
    check_step(s, before)
    live = s["idx_mapping"] >= 0
    assert torch.equal(s["draft_tokens"][:5, 1][live], s["logits"].argmax(-1)[live])


def test_ties_go_to_the_lowest_token_and_nan_stays_in_the_vocabulary():
    s = a_step(3, 9001) | {"temperature": None, "seeds": None}
    s["logits"].fill_(-1.0)
    s["logits"][0, [8, 5000]] = 2.0
    s["logits"][1] = float("nan")
    run(draft_step, s)
    assert s["draft_tokens"][0, 1] == 8 and s["draft_tokens"][2, 1] == 0
    assert 0 <= s["draft_tokens"][1, 1] < 9001


def test_a_workspace_serves_step_after_step():
    """The count of programs that arrived is back at zero, so that the next launch reduces again."""
    s = a_step(5, 9001)
    workspace = DraftWorkspace(8, 9001, "cpu")
    for j in range(DRAFTS):
        s["step"].fill_(j)
        draft_step(**s, workspace=workspace)
        assert (workspace.arrived == 0).all()
        other = a_step(5, 9001)
        other["step"].fill_(j)
        other["positions"].copy_((a_step(5, 9001)["positions"] + j).clamp_max(LIMIT - 1))
        reference(**other)
        assert torch.equal(s["draft_tokens"][:, j], other["draft_tokens"][:, j])


def test_the_noise_is_gumbel_and_another_for_every_key():
    tokens = torch.arange(20_000)
    noise = gumbel_noise_reference(torch.tensor([7, 7, 8]), torch.tensor([3, 4, 3]), tokens)
    # Mean is Euler's constant, variance pi^2 / 6; 20,000 draws give 0.009 and 0.03 of standard error.
    torch.testing.assert_close(noise.mean(1), torch.full((3,), 0.5772), atol=0.045, rtol=0)
    torch.testing.assert_close(noise.var(1), torch.full((3,), 1.645), atol=0.15, rtol=0)
    assert noise.corrcoef()[~torch.eye(3, dtype=torch.bool)].abs().max() < 0.04
    assert noise.isfinite().all()


def test_draws_follow_the_softmax():
    """4,000 positions of one request: counts within 5 standard errors, and a wrong temperature far outside."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    positions, temperature = torch.arange(4_000), 0.7
    noise = gumbel_noise_reference(torch.full((4_000,), 11), positions, torch.arange(5))
    counts = torch.bincount((logits / temperature + noise).argmax(-1), minlength=5).float()

    def worst(t: float) -> float:
        p = (logits / t).softmax(-1)
        return float(((counts / 4_000 - p).abs() / (p * (1 - p) / 4_000).sqrt()).max())

    assert worst(temperature) < 5 < worst(0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(step=torch.tensor(1, dtype=torch.int32)), "step is torch.int32"),
        (dict(positions=torch.zeros(3, dtype=torch.int32)), "positions is torch.int32"),
        (dict(seq_lens=torch.zeros(2, dtype=torch.int32)), "seq_lens has 2 rows"),
        (dict(seeds=None), "come together"),
        (dict(seeds=torch.zeros(7, dtype=torch.int64)), "seeds has shape"),
        (dict(logits_cache=torch.zeros(STATES, DRAFTS, 60)), "logits_cache has shape"),
        (dict(workspace=DraftWorkspace(3, 4096, "cpu")), "workspace for"),
        (dict(idx_mapping=torch.zeros(4, dtype=torch.int32)), "idx_mapping has shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = a_step(3, 9001) | {"workspace": DraftWorkspace(3, 9001, "cpu")}
    with pytest.raises(ValueError, match=message):
        draft_step(**(fits | change))


@pytest.mark.parametrize(
    ("tables", "sizes", "message"),
    [
        ((torch.zeros(2, 3, dtype=torch.int32),), (8, 16), "block sizes"),
        ((torch.zeros(2, 3),), (8,), r"block_tables\[0\] is torch.float32"),
    ],
)
def test_slots_that_do_not_fit_are_refused(tables, sizes, message):
    with pytest.raises(ValueError, match=message):
        KvSlots(tables, sizes, torch.zeros(1, 4, dtype=torch.int64))
