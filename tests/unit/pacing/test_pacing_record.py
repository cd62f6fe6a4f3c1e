"""The costs and chances that a plan records."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sdfp_vllm.pacing.record import CONFIDENCE_EDGES, confidence_bin
from tests.support.pacing_traffic import BINS, costs


def test_a_draft_step_is_padded_to_the_rows_that_are_fastest():
    """As on processors whose matrix products are slow for few rows."""
    pacing = costs(
        rows=[1, 2, 3, 4, 8], target_ms=[9.0, 10.0, 8.0, 7.0, 8.0], draft_ms=[5.0, 6.0, 4.06, 4.0, 5.0]
    )
    assert [pacing.step_rows(batch) for batch in (1, 2, 3, 4, 8, 20)] == [
        4,
        4,
        3,
        4,
        8,
        20,
    ]  # 3: not worth it
    assert pacing.padded_batches() == [4, 4]
    assert pacing.step_ms(1) == pacing.step_ms(2) == 4.0
    assert costs().padded_batches() == []


def test_bins():
    assert confidence_bin(0.0) == 0 and confidence_bin(1.0) == BINS - 1
    assert confidence_bin(0.5) == confidence_bin(0.55) == CONFIDENCE_EDGES.index(0.5) + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [2, 64]},
        {"rows": [64, 1]},
        {"target_ms": [1.0]},
        {"draft_ms": [0.0, 1.0]},
        {"target_ms": [float("nan"), 1.0]},
        {"confidence": [0.5]},
        {"acceptance": []},
        {"acceptance": [1.5]},
        {"unknown": 1},
    ],
)
def test_a_record_that_cannot_be_is_refused(changes):
    with pytest.raises(ValidationError):
        costs(**changes)


def test_times_are_linear_between_and_beyond_the_measured_rows():
    pacing = costs(rows=[1, 2, 4], target_ms=[1.0, 2.0, 3.0], draft_ms=[1.0, 1.0, 1.0])
    assert [pacing.verify_ms(m) for m in (1, 2, 3, 4, 6)] == [1.0, 2.0, 2.5, 3.0, 4.0]
    assert costs(rows=[1], target_ms=[2.0], draft_ms=[1.0]).verify_ms(3) == 6.0
