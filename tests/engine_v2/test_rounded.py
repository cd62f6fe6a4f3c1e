"""Rounded drafts in the V2 runner: what V1 drafts with the same view, and plain vLLM's answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sdfp_vllm.engine.draft.rounded_weights import copy_of
from sdfp_vllm.plan.schema import DraftHead, StoredView
from sdfp_vllm.plan.view import DraftView
from tests.engine_v2.test_same_drafts import greedy_drafts
from tests.support.engines import assert_identical, engine, spec_counters, tokens, write_plan

pytestmark = pytest.mark.engine
VIEW = DraftView.from_units(
    {("attention", 0): "int8", ("mlp", 5): "int8", ("attention", 15): "full", ("mlp", 15): "int8"}
)


def test_v1_and_v2_draft_the_same_tokens_and_answers_are_plain_vllms(
    target: Path, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    view = StoredView.of(VIEW, 16, head=DraftHead(precision="int8"))
    plan = write_plan(target, tmp_path, VIEW, 3, view=view)
    some = [p[:30] for p in prompts[:2]]
    with engine(target) as llm:
        want = tokens(llm, some, max_tokens=8)
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        assert_identical(tokens(llm, some, max_tokens=8), want)
        assert spec_counters(llm)["num_draft_tokens"] > 0
    v2 = greedy_drafts(target, plan, some)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert len(v2) > 4 and v2 == greedy_drafts(target, plan, some)


def test_weights_loaded_anew_reach_the_copies(target: Path, prompts: list[list[int]], tmp_path: Path):
    """As reinforcement learning does; answers are those of plain vLLM after the same."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(target, other)
    weights = {
        name: t * 1.1 if "layers.5.mlp" in name and t.ndim == 2 else t
        for name, t in load_file(target / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    some = [p[:30] for p in prompts[:2]]
    with engine(target) as llm:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        want = tokens(llm, some, max_tokens=6)
    plan = write_plan(target, tmp_path / "plan", VIEW, 3, view=StoredView.of(VIEW, 16))
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        linear = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers[
            5
        ].mlp.down_proj
        x = torch.ones(2, linear.input_size)
        old = copy_of(linear)(x)  # type: ignore[misc]
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert torch.allclose(copy_of(linear)(x), 1.1 * old, rtol=0.02, atol=0.02 * float(old.abs().max()))  # type: ignore[misc]
        assert not torch.equal(copy_of(linear)(x), old)  # type: ignore[misc]
        assert_identical(tokens(llm, some, max_tokens=6), want)
        assert spec_counters(llm)["num_draft_tokens"] > 0
