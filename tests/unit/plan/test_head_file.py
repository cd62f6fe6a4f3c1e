"""The tokens of a draft head beside the plan: nothing damaged or foreign gets through."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan.head_file import pack_head
from sdfp_vllm.plan.parcel import HEAD_FILE, PLAN_FILE
from sdfp_vllm.plan.schema import DraftHead, SkipPlan
from sdfp_vllm.plan.store import load_parcel, load_plan, save_plan
from sdfp_vllm.plan.tensor_file import pack_tensors
from tests.support.plans import VIEW, make_plan, stored

TOKENS = [0, 3, 4, 15]  # make_plan: a vocabulary of 16


def described(tokens=TOKENS) -> tuple[SkipPlan, bytes]:
    head, content = pack_head(torch.tensor(tokens), coverage=0.75)
    return make_plan(view=stored(VIEW, head=head)), content


@pytest.fixture
def folder(tmp_path):
    plan, content = described()
    save_plan(plan, tmp_path, head_tokens=content)
    return tmp_path


def forge(folder, tensors: dict) -> None:
    """Puts `tensors` in place of the tokens, with a plan that vouches for them."""
    content, sha256 = pack_tensors(tensors)
    (folder / HEAD_FILE).write_bytes(content)
    raw = json.loads((folder / PLAN_FILE).read_text())
    raw["view"]["head"] |= {"sha256": sha256, "tokens": len(next(iter(tensors.values())))}
    (folder / PLAN_FILE).write_text(json.dumps(raw))


def test_round_trip_and_the_plan_stays_small(folder):
    plan = load_plan(folder)
    assert plan == described()[0] and plan.view.head.tokens == 4
    tokens = load_parcel(folder).tokens()
    assert tokens is not None and tokens.tolist() == TOKENS and tokens.dtype == torch.int64
    assert "15" not in json.dumps(json.loads((folder / PLAN_FILE).read_text())["view"]["head"]["tokens"])


def test_a_plan_without_a_restricted_head_replaces_one_with_it(folder):
    save_plan(make_plan(view=stored(VIEW)), folder)
    assert load_plan(folder).view.head == DraftHead() and load_parcel(folder).tokens() is None
    assert [p.name for p in folder.iterdir()] == [PLAN_FILE]


def test_plan_and_tokens_are_saved_together(tmp_path):
    plan, content = described()
    with pytest.raises(ValueError, match="tensors"):
        save_plan(plan, tmp_path)
    with pytest.raises(ValueError, match="tensors"):
        save_plan(make_plan(), tmp_path, head_tokens=content)


def test_tokens_travel_with_the_plan(folder, tmp_path_factory):
    there = tmp_path_factory.mktemp("there")
    load_parcel(folder).write(there)
    tokens = load_parcel(there).tokens()
    assert tokens is not None and tokens.tolist() == TOKENS


@pytest.mark.parametrize("precision", ["full", "int8", "int4"])
def test_the_heads_precision_is_described(tmp_path, precision):
    head, content = pack_head(torch.tensor(TOKENS), coverage=0.75, precision=precision)
    save_plan(make_plan(view=stored(VIEW, head=head)), tmp_path, head_tokens=content)
    read = load_plan(tmp_path).view.head
    assert (read.precision, read.coverage, read.tokens) == (precision, 0.75, 4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"tokens": torch.tensor([0, 3, 3, 15], dtype=torch.int32)}, "ascend"),
        ({"tokens": torch.tensor([3, 0, 4, 15], dtype=torch.int32)}, "ascend"),
        ({"tokens": torch.tensor([0, 3, 4, 16], dtype=torch.int32)}, "0 to 16.*0 to 15"),
        ({"tokens": torch.tensor([-1, 3, 4, 15], dtype=torch.int32)}, "-1 to 15"),
        ({"tokens": torch.tensor(TOKENS)}, "int64.*not int32"),
        ({"tokens": torch.tensor([TOKENS], dtype=torch.int32)}, r"\(1, 4\).*\(1,\)"),
        ({"others": torch.tensor(TOKENS, dtype=torch.int32)}, "tensor"),
        ({"tokens": torch.arange(16, dtype=torch.int32)}, "16 tokens of a vocabulary of 16"),
    ],
)
def test_wrong_tokens_are_named_even_if_the_hash_is_right(folder, tensors, message):
    forge(folder, tensors)
    with pytest.raises(PlanError, match=message):
        load_plan(folder)


def test_missing_and_other_tokens_are_named(folder):
    (folder / HEAD_FILE).write_bytes(described([1, 2, 3, 4])[1])
    with pytest.raises(PlanError, match="SHA-256 differs"):
        load_plan(folder)
    (folder / HEAD_FILE).unlink()
    with pytest.raises(
        PlanError, match=r"head\.safetensors.*missing.*restricted draft head.*sdfp plan MODEL"
    ):
        load_plan(folder)


def test_a_plan_replaced_while_the_engine_starts_changes_nothing(folder):
    """What was read goes with the plan that was read."""
    parcel = load_parcel(folder)
    plan, content = described([1, 2])
    save_plan(plan, folder, head_tokens=content)
    tokens = parcel.tokens()
    assert tokens is not None and tokens.tolist() == TOKENS
    assert parcel.plan == described()[0] != load_plan(folder)


@pytest.mark.parametrize(
    "head",
    ["restricted", 5, None, {"tokens": 4}, {"tokens": 4, "coverage": 1.5, "sha256": "a" * 64}, {"tokens": 0, "coverage": 1, "sha256": "a" * 64},
     {"tokens": 4, "coverage": 1.0, "sha256": "a" * 64, "file": "../../etc/passwd"}],
)  # fmt: skip
def test_a_wrong_description_is_refused(folder, head):
    raw = json.loads((folder / PLAN_FILE).read_text())
    raw["view"]["head"] = head
    (folder / PLAN_FILE).write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="head"):
        load_plan(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), vouched=st.booleans())
def test_any_mutation_of_the_tokens_gives_a_head_or_our_error(tmp_path_factory, data, vouched):
    """Bytes changed or cut; half of the time the plan vouches for them, so that the parser meets them."""
    import hashlib

    folder = tmp_path_factory.getbasetemp() / "head-fuzz"
    plan, content = described()
    blob = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        blob = blob[: data.draw(st.integers(0, len(blob)))]
    if vouched:
        sha256 = hashlib.sha256(bytes(blob)).hexdigest()
        head = plan.view.head.model_copy(update={"sha256": sha256})
        plan = make_plan(view=stored(VIEW, head=head))
    save_plan(plan, folder, head_tokens=bytes(blob))
    try:
        read = load_parcel(folder).tokens().tolist()
    except PlanError as e:
        assert str(folder) in str(e) and e.way_out
    else:
        assert read == sorted(set(read)) and read[0] >= 0 and read[-1] < 16
        assert vouched or bytes(blob) == content


def test_the_file_holds_the_ids_and_nothing_else(folder):
    assert list(safetensors.torch.load((folder / HEAD_FILE).read_bytes())) == ["tokens"]
