"""Weights that are loaded into a running engine, as reinforcement learning does: drafts follow, answers stay exact.

That the rounded copies are the new weights' is `test_rounded_drafts.py`'s.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdfp_vllm.engine.draft import rounded_weights
from sdfp_vllm.plan.schema import DraftHead, StoredView
from sdfp_vllm.plan.view import DraftView
from tests.support.bridged_plans import write_bridged_plan
from tests.support.engines import assert_identical, engine, spec_counters, tokens, write_plan

pytestmark = pytest.mark.engine
LAYERS = 16
ALL_INT8 = DraftView.at(range(LAYERS), "int8")


@pytest.fixture(scope="module")
def trained_on(target, tmp_path_factory) -> Path:
    """The target after what might be a few steps of training; its embedding, which is also its head, as it was.

    On a CPU vLLM keeps the tied head that it packed first, whatever is loaded.
    """
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "trained-on"
    shutil.copytree(target, folder)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: t + 0.05 * t.float().std() * torch.randn(t.shape, generator=generator).to(t.dtype)
        if t.ndim == 2 and "embed" not in name
        else t
        for name, t in load_file(target / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rounded(model: Path, folder: Path) -> dict[str, str]:
    view = StoredView.of(ALL_INT8, LAYERS, head=DraftHead(precision="int8"))
    return {"method": "sdfp", "model": write_plan(model, folder, ALL_INT8, 3, view=view)}


def rate(llm: Any, before: dict[str, Any] | None = None) -> float:
    now, before = spec_counters(llm), before or {}
    accepted, drafted = (
        now[name] - before.get(name, 0) for name in ("num_accepted_tokens", "num_draft_tokens")
    )
    return accepted / drafted


def test_acceptance_is_that_of_an_engine_started_with_the_new_weights(target, trained_on, prompts, tmp_path):
    with engine(trained_on, rounded(trained_on, tmp_path / "new")) as llm:
        want = tokens(llm, prompts[:16])
        fresh = rate(llm)
    with engine(target, rounded(target, tmp_path / "old")) as llm:
        before = tokens(llm, prompts[:16])
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(trained_on)})
        llm.reset_prefix_cache()
        counters = spec_counters(llm)
        assert_identical(tokens(llm, prompts[:16]), want)
        reloaded = rate(llm, counters)
    assert before != want
    assert abs(reloaded - fresh) < 0.02 and fresh > 0.6


def answer(llm: Any, prompt: list[int], new: Path, at: int | None) -> tuple[int, list[int]]:
    """Greedy tokens, with `new` weights from the first step on after which there are `at` tokens or more; and how many
    those were. The request is paused meanwhile and kept, as `pause_generation(mode="keep")` does."""
    from vllm import SamplingParams

    core = llm.llm_engine
    core.add_request(
        "a", {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    )
    changed, got = 0, []
    while core.has_unfinished_requests():
        for out in core.step():
            got = list(out.outputs[0].token_ids)
        if at is not None and not changed and len(got) >= at:
            changed = len(got)
            core.engine_core.engine_core.pause_scheduler(mode="keep", clear_cache=False)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
            core.engine_core.engine_core.resume_scheduler()
    return changed, got


def test_a_request_under_way_goes_on_with_the_new_weights_exactly(target, trained_on, prompts, tmp_path):
    prompt = next(p for p in prompts if 40 < len(p) < 80)
    with engine(target, rounded(target, tmp_path), enable_prefix_caching=False) as llm:
        at, got = answer(llm, prompt, trained_on, 17)
        assert spec_counters(llm)["num_accepted_tokens"] > 0
    with engine(target, enable_prefix_caching=False) as llm:
        changed, want = answer(llm, prompt, trained_on, at)
        assert changed == at  # plain vLLM reaches every length
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(target)})
        _, old = answer(llm, prompt, trained_on, None)
    assert_identical([got], [want])
    assert want[:at] == old[:at] and want != old


def test_bridges_of_the_old_weights_are_kept_with_one_warning(
    target, trained_on, prompts, tmp_path, monkeypatch
):
    told: list[str] = []
    monkeypatch.setattr(rounded_weights.logger, "warning", lambda text, *values: told.append(text % values))
    plan, _ = write_bridged_plan(target, tmp_path / "plan", [0, 5, 15], 3)
    with engine(target) as llm:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(trained_on)})
        want = tokens(llm, prompts[:4])
    assert not told
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        assert not told
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(trained_on)})
        assert_identical(tokens(llm, prompts[:4]), want)
    (line,) = told
    assert f"bridges of the plan {plan}" in line and "`sdfp plan`" in line
