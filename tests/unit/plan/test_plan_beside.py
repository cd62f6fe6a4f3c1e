"""A plan that travels with its model: beside the model's files, in a folder or on a hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from sdfp_vllm.engine.arguments import sdfp_settings
from sdfp_vllm.errors import PlanError, SdfpError
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.head_file import pack_head
from sdfp_vllm.plan.model_files import is_same_model
from sdfp_vllm.plan.store import default_plan_dir, find_plan, save_plan
from tests.support.hub import hub_of_this_process
from tests.support.plans import VIEW, make_plan, stored, write_model

ID, PLANS = "someone/model", "someone/plans"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache-of-plans"))


@pytest.fixture(name="model")
def _model(tmp_path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture(name="hub")
def _hub(tmp_path):
    with hub_of_this_process(tmp_path / "cache") as hub:
        yield hub


def write(model: Path, folder: Path, draft_tokens: int = 2) -> Path:
    """A plan with a restricted head, so that it has a second file."""
    head, tokens = pack_head(torch.tensor([1, 3, 5]), 0.9, "int8")
    identity = fingerprint(model)
    plan = make_plan(fingerprint=identity, view=stored(VIEW, head=head), num_speculative_tokens=draft_tokens)
    save_plan(plan, folder, head_tokens=tokens)
    return folder


def test_a_plan_beside_the_model_is_found_and_is_no_part_of_it(model):
    before = fingerprint(model)
    with pytest.raises(PlanError, match=r"has no plan yet \(looked for .* and .*/sdfp\)"):
        find_plan(str(model))
    write(model, model / "sdfp")
    assert fingerprint(model) == before
    found = find_plan(str(model))
    assert found.source == str(model / "sdfp") and found.tokens().tolist() == [1, 3, 5]


def test_what_was_planned_here_goes_first(model):
    write(model, model / "sdfp", 2)
    write(model, default_plan_dir(fingerprint(model)), 1)
    assert find_plan(str(model)).plan.num_speculative_tokens == 1
    for named in (model / "sdfp", model, model / "sdfp" / "plan.json"):  # unless the other is named
        assert find_plan(str(model), str(named)).plan.num_speculative_tokens == 2, named


def test_another_models_plan_is_refused_beside_it_too(model, tmp_path):
    other = write_model(tmp_path / "other", weights=b"weightz")
    write(other, model / "sdfp")
    with pytest.raises(PlanError, match="was made for another model"):
        find_plan(str(model))


def test_a_hub_repository_brings_its_plan(hub, model):
    write(model, model / "sdfp")
    hub.push(ID, model)
    assert find_plan(ID).tokens().tolist() == [1, 3, 5]
    assert find_plan(ID, ID).plan.num_speculative_tokens == 2


@pytest.mark.parametrize("inside", ["", "sdfp"])
def test_a_repository_of_plans(hub, model, tmp_path, inside, monkeypatch):
    write(model, tmp_path / "plans" / inside)
    (tmp_path / "plans" / "large.safetensors").write_bytes(b"large")
    hub.push(PLANS, tmp_path / "plans")
    assert find_plan(str(model), PLANS).tokens().tolist() == [1, 3, 5]
    assert "large.safetensors" not in hub.fetched
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # the cache does without the hub
    assert find_plan(str(model), PLANS).tokens().tolist() == [1, 3, 5]


def test_a_repository_without_a_plan_or_out_of_reach_is_named(hub, model):
    hub.push(PLANS, model)
    with pytest.raises(SdfpError, match=rf"plan '{PLANS}': is a Hugging Face repository without plan\.json"):
        find_plan(str(model), PLANS)
    with pytest.raises(
        SdfpError, match=r"plan 'no/where': is neither a folder nor a Hugging Face repository"
    ):
        find_plan(str(model), "no/where")


def test_a_user_without_a_home_finds_the_plan_beside_the_model(model, monkeypatch):
    """As in a container: the default place is somebody else's, or there is none."""
    from sdfp_vllm.plan import store

    def none():
        raise SdfpError("cache folder", "is not there", "Set SDFP_CACHE_DIR.")

    monkeypatch.setattr(store, "plans_root", none)
    with pytest.raises(SdfpError, match="SDFP_CACHE_DIR"):
        find_plan(str(model))
    write(model, model / "sdfp")
    assert find_plan(str(model)).source == str(model / "sdfp")


@pytest.mark.parametrize("typed", ["../plan", "~/plan", "./plan", "plans/plan.json", "a/b/c"])
def test_what_cannot_be_an_id_is_a_path(hub, model, typed):
    with pytest.raises(PlanError, match="no such plan"):
        find_plan(str(model), typed)


def test_one_model_by_several_names(model, tmp_path):
    assert is_same_model("org/model", "org/model") and not is_same_model("org/model", "org/other")
    assert is_same_model(str(model), f"{model}/") and not is_same_model(str(model), str(tmp_path))
    offline = "/cache/models--org--model/snapshots/abc"
    assert is_same_model("org/model", offline) and not is_same_model("org/other", offline)


def asked(model: object, served: object, method: str | None = None, revision: str | None = None):
    return sdfp_settings(
        SimpleNamespace(
            model=str(served),
            revision=revision,
            speculative_config=None,
            spec_method=method,
            spec_model=str(model),
            spec_tokens=None,
        )
    )


def test_the_served_model_itself_asks_for_its_plan(hub, model, tmp_path):
    assert asked(model, model) is None  # no plan: vLLM's own draft model
    write(model, model / "sdfp")
    assert asked(model, model) == {"method": "sdfp", "model": str(model)}
    assert asked(model, tmp_path / "large") is None  # a draft model that has a plan for itself
    assert asked(model, tmp_path / "large", "sdfp") == {"method": "sdfp", "model": str(model)}
    assert asked(ID, ID) is None
    hub.push(ID, model, branch="v2")
    assert asked(ID, ID) is None  # of another branch
    assert asked(ID, ID, revision="v2") == {"method": "sdfp", "model": ID}
    hub.push(ID, model)
    assert asked(ID, ID) == {"method": "sdfp", "model": ID}
