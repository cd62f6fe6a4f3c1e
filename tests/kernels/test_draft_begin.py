"""draft_begin against a row-by-row account of what step 0 must find."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdfp_vllm.kernels import draft_begin as module
from sdfp_vllm.kernels.draft_begin import draft_begin, reference
from sdfp_vllm.kernels.draft_step import KvSlots

LIMIT = 96  # max_model_len
STATES = 16
POISON = -77


def a_round(rows: int, all_rows: int, groups: int, seed: int = 0) -> dict[str, Any]:
    """A target step over `rows` requests of 1 to 5 tokens; some rejected, some in the middle of a prefill."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=dtype)

    lengths = integers(1, 6, rows)
    rejected = (integers(0, 5, rows) % lengths).int()
    ends = integers(6, LIMIT + 1, rows)  # positions up to the last one there is
    if rows:
        ends[0], rejected[0] = LIMIT, 0  # the next position is past the limit
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    positions = [torch.arange(e - n, e) for e, n in zip(ends.tolist(), lengths.tolist(), strict=True)]
    sizes = (8, 16, 32)[:groups]
    return dict(
        idx_mapping=torch.randperm(STATES, generator=g)[:rows].int(),
        num_sampled=(torch.arange(rows) % 3 != 1).int(),
        num_rejected=rejected,
        last_sampled=integers(0, 1000, STATES, dtype=torch.int64),
        query_start_loc=starts,
        target_positions=torch.cat([*positions, torch.zeros(0, dtype=torch.int64)]),
        target_seq_lens=ends,
        draft_idx=torch.full((all_rows,), POISON, dtype=torch.int64),
        input_ids=torch.full((all_rows,), POISON, dtype=torch.int32),
        positions=torch.full((all_rows,), POISON, dtype=torch.int64),
        seq_lens=torch.full((all_rows,), POISON, dtype=torch.int32),
        draft_query_start_loc=torch.full((all_rows + 1,), POISON, dtype=torch.int32),
        slots=KvSlots(
            tuple(integers(1, 500, STATES, LIMIT // size) for size in sizes),
            sizes,
            torch.full((groups, all_rows + 3), POISON, dtype=torch.int64),
        ),
        max_model_len=LIMIT,
    )


def check_round(r: dict[str, Any]) -> None:
    rows, all_rows = len(r["idx_mapping"]), len(r["draft_idx"])
    slots = r["slots"]
    for t in range(all_rows):
        if t >= rows:
            assert (r["draft_idx"][t], r["seq_lens"][t]) == (-1, 0)
            assert (slots.slot_mapping[:, t] == -1).all()
            continue
        state = int(r["idx_mapping"][t])
        last = int(r["query_start_loc"][t + 1]) - 1 - int(r["num_rejected"][t])
        after = int(r["target_positions"][last]) + 1
        drafting = int(r["num_sampled"][t]) > 0 and state >= 0
        assert r["draft_idx"][t] == (state if drafting else -1)
        assert r["input_ids"][t] == (r["last_sampled"][state] if state >= 0 else 0)
        assert r["positions"][t] == min(after, LIMIT - 1)
        assert r["seq_lens"][t] == min(after + 1, LIMIT)
        for table, size, slot in zip(
            slots.block_tables, slots.block_sizes, slots.slot_mapping[:, t], strict=True
        ):
            inside = drafting and after < LIMIT
            assert slot == (int(table[state, after // size]) * size + after % size if inside else -1)
    assert r["draft_query_start_loc"].tolist() == [min(t, rows) for t in range(all_rows + 1)]
    assert (slots.slot_mapping[:, all_rows:] == POISON).all(), "wrote past its rows"


@pytest.mark.parametrize("run", [draft_begin, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("rows", "all_rows", "groups"), [(1, 1, 1), (3, 8, 2), (5, 5, 3), (13, 300, 1), (0, 4, 1)]
)
def test_step_0_finds_what_it_must(run: Any, rows: int, all_rows: int, groups: int):
    for seed in range(3):
        r = a_round(rows, all_rows, groups, seed)
        run(**r)
        check_round(r)


def test_a_dummy_batch_touches_no_request(monkeypatch: pytest.MonkeyPatch):
    r = a_round(4, 6, 2)
    r["idx_mapping"] = torch.full((4,), -1, dtype=torch.int32)
    draft_begin(**r)
    check_round(r)
    assert (r["slots"].slot_mapping[:, :6] == -1).all()


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "reference", lambda *a, **k: pytest.fail("the torch path ran"))
    draft_begin(**a_round(2, 2, 1))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("seq_lens", torch.zeros(8, dtype=torch.int64)),
        ("query_start_loc", torch.zeros(3, dtype=torch.int32)),
        ("target_positions", torch.zeros(64, dtype=torch.int64)[::2]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, wrong: torch.Tensor):
    with pytest.raises(ValueError, match=name):
        draft_begin(**{**a_round(3, 8, 1), name: wrong})
