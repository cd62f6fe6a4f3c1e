"""A bridge in the V2 runner, through its Triton kernel: what V1 drafts with it, and not what V1 drafts without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine_v2.test_same_drafts import greedy_drafts
from tests.support.bridged_plans import write_bridged_plan

pytestmark = pytest.mark.engine


def test_v1_and_v2_draft_the_same_tokens_through_a_bridge(
    target: Path,
    plan: str,
    kept: list[int],
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    some = [p[:30] for p in prompts[:2]]
    bridged, _ = write_bridged_plan(target, tmp_path, kept, k=3)
    v2 = greedy_drafts(target, bridged, some)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert len(v2) > 4 and v2 == greedy_drafts(target, bridged, some)
    assert v2 != greedy_drafts(target, plan, some)
