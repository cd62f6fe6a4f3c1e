"""PlanParcel: a plan and its files, read once, checked, and carried to whoever needs them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import shutil

import pytest
import torch

from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan.head_file import pack_head
from sdfp_vllm.plan.parcel import BRIDGE_FILE, HEAD_FILE, PLAN_FILE, PlanParcel
from sdfp_vllm.plan.store import load_parcel, save_plan
from tests.support.plans import VIEW, bridged_and_restricted, make_plan, stored

FILES = {BRIDGE_FILE: "bridges", HEAD_FILE: "a restricted draft head"}


@pytest.fixture
def folder(tmp_path):
    plan, tensors, tokens = bridged_and_restricted()
    save_plan(plan, tmp_path / "plan", tensors, tokens)
    return tmp_path / "plan"


def contents(parcel: PlanParcel) -> tuple[list[float], list[int]]:
    (bridge,) = parcel.bridges().values()
    tokens = parcel.tokens()
    assert tokens is not None
    return bridge.shift.tolist(), tokens.tolist()


WANTED = ([1.0] * 8, [0, 3, 15])


def test_it_holds_the_plan_and_its_files(folder):
    parcel = load_parcel(folder)
    assert parcel.plan == bridged_and_restricted()[0] and parcel.source == str(folder)
    assert set(parcel.files) == set(FILES) and contents(parcel) == WANTED
    assert list(parcel.bridges()) == [(1, 2)]
    assert load_parcel(folder / PLAN_FILE) == parcel


def test_a_plan_of_layers_alone_has_none(tmp_path):
    save_plan(make_plan(view=stored(VIEW)), tmp_path)
    parcel = load_parcel(tmp_path)
    assert parcel.files == {} and parcel.bridges() == {} and parcel.tokens() is None


@pytest.mark.parametrize("carry", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy, copy.copy])
def test_it_travels_to_other_processes(folder, carry):
    parcel = load_parcel(folder)
    view = parcel.plan.view.branches  # asked before: nothing that is kept beside the fields may be in the way
    assert view.precision(0, "attention") == "int8"
    there = carry(parcel)
    assert there == parcel and there.sha256 == parcel.sha256
    assert there.plan.view.branches == VIEW and contents(there) == WANTED


def test_nobody_reads_the_folder_again(folder):
    parcel = load_parcel(folder)
    sent = pickle.dumps(parcel)
    shutil.rmtree(folder)
    for held in (parcel, pickle.loads(sent)):
        assert contents(held) == WANTED
        assert dataclasses.replace(held, plan=held.plan.at_full_precision()).tokens() is not None


def test_it_is_written_as_it_was_read(folder, tmp_path):
    parcel = load_parcel(folder)
    (tmp_path / "there").mkdir()
    there = load_parcel(parcel.write(tmp_path / "there"))
    assert (there.plan, there.files, there.sha256) == (parcel.plan, parcel.files, parcel.sha256)
    assert sorted(f.name for f in (tmp_path / "there").iterdir()) == sorted([PLAN_FILE, *FILES])


def test_its_hash_is_that_of_all_it_holds(folder):
    parcel = load_parcel(folder)
    plan = parcel.plan.model_copy(update={"num_speculative_tokens": 1})
    other_file = {**parcel.files, HEAD_FILE: parcel.files[BRIDGE_FILE]}
    changed = [dataclasses.replace(parcel, plan=plan), dataclasses.replace(parcel, files=other_file)]
    elsewhere = dataclasses.replace(parcel, source="elsewhere")
    assert len({p.sha256 for p in (parcel, *changed)}) == 3 and elsewhere.sha256 == parcel.sha256


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_the_plans_is_refused(folder, tmp_path, name):
    _, tensors, _ = bridged_and_restricted()
    _, other_tokens = pack_head(torch.tensor([1, 2, 3]), coverage=0.5)
    foreign = {BRIDGE_FILE: tensors[:-1] + b"\x01", HEAD_FILE: other_tokens}[name]
    (folder / name).write_bytes(foreign)
    with pytest.raises(PlanError, match="SHA-256 differs") as e:
        load_parcel(folder)
    assert str(folder / name) in str(e.value) and e.value.way_out
    (folder / name).unlink()
    with pytest.raises(PlanError, match=f"is missing, and the plan beside it has {FILES[name]}"):
        load_parcel(folder)
    (folder / name).mkdir()
    with pytest.raises(PlanError, match="cannot be read"):
        load_parcel(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_parcel_put_together_wrongly_is_refused_where_it_is_opened(folder, name):
    """Whoever makes one without reading a folder: its content is still checked against the plan."""
    parcel = load_parcel(folder)
    other = next(f for f in FILES if f != name)
    swapped = dataclasses.replace(parcel, files={**parcel.files, name: parcel.files[other]})
    with pytest.raises(PlanError, match="tensor"):
        swapped.bridges() if name == BRIDGE_FILE else swapped.tokens()


def test_files_that_no_plan_names_are_left_alone(folder):
    (folder / "other.safetensors").write_bytes(b"?")
    assert set(load_parcel(folder).files) == set(FILES)
    save_plan(make_plan(), folder)
    (folder / HEAD_FILE).write_bytes(b"?")
    assert load_parcel(folder).files == {}
