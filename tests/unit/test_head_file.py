"""The tokens of a draft head beside the plan: nothing damaged or foreign gets through."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_plan import make_plan

from sdfp_vllm.errors import PlanError
from sdfp_vllm.head_file import head_at, load_head, pack_head
from sdfp_vllm.plan import HEAD_FILE, PLAN_FILE, SkipPlan, load_plan
from sdfp_vllm.plan_parcel import PlanParcel
from sdfp_vllm.tensor_file import pack_tensors

TOKENS = [0, 3, 4, 15]  # make_plan: a vocabulary of 16


def described(tokens=TOKENS) -> tuple[SkipPlan, bytes]:
    head, content = pack_head(torch.tensor(tokens), coverage=0.75)
    return make_plan(head=head), content


@pytest.fixture
def folder(tmp_path):
    plan, content = described()
    plan.save(tmp_path, head_tokens=content)
    return tmp_path


def forge(folder, tensors: dict) -> None:
    """Puts `tensors` in place of the tokens, with a plan that vouches for them."""
    content, sha256 = pack_tensors(tensors)
    (folder / HEAD_FILE).write_bytes(content)
    raw = json.loads((folder / PLAN_FILE).read_text())
    raw["head"] |= {"sha256": sha256, "tokens": len(next(iter(tensors.values())))}
    (folder / PLAN_FILE).write_text(json.dumps(raw))


def test_round_trip_and_the_plan_stays_small(folder):
    plan = load_plan(folder)
    assert plan == described()[0] and plan.head.tokens == 4
    assert load_head(folder, plan).tolist() == TOKENS == head_at(folder, plan.head.sha256).tolist()
    assert head_at(folder, "") is None and load_head(folder, make_plan()) is None
    assert "15" not in json.dumps(json.loads((folder / PLAN_FILE).read_text())["head"]["tokens"])


def test_a_plan_without_a_restricted_head_replaces_one_with_it(folder):
    make_plan().save(folder)
    assert load_plan(folder).head == "full"
    assert [p.name for p in folder.iterdir()] == [PLAN_FILE]


def test_plan_and_tokens_are_saved_together(tmp_path):
    plan, content = described()
    with pytest.raises(ValueError, match="tensors"):
        plan.save(tmp_path)
    with pytest.raises(ValueError, match="tensors"):
        make_plan().save(tmp_path, head_tokens=content)


def test_tokens_travel_with_the_plan(folder, tmp_path_factory, monkeypatch):
    from sdfp_vllm import plan_parcel

    monkeypatch.setattr(plan_parcel, "find_plan", lambda model, plan: (load_plan(plan), folder))
    there = tmp_path_factory.mktemp("there")
    PlanParcel.read("model", str(folder)).write(there)
    assert load_head(there, load_plan(there)).tolist() == TOKENS


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


def test_a_plan_replaced_while_the_engine_starts_is_noticed(folder):
    sha256 = load_plan(folder).head.sha256
    plan, content = described([1, 2])
    plan.save(folder, head_tokens=content)
    with pytest.raises(PlanError, match="replaced"):
        head_at(folder, sha256)


@pytest.mark.parametrize(
    "head",
    ["restricted", 5, None, {}, {"tokens": 4, "coverage": 1.5, "sha256": "a" * 64}, {"tokens": 0, "coverage": 1, "sha256": "a" * 64},
     {"tokens": 4, "coverage": 1.0, "sha256": "a" * 64, "file": "../../etc/passwd"}],
)  # fmt: skip
def test_a_wrong_description_is_refused(folder, head):
    raw = json.loads((folder / PLAN_FILE).read_text())
    raw["head"] = head
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
        plan = plan.model_copy(update={"head": plan.head.model_copy(update={"sha256": sha256})})
    plan.save(folder, head_tokens=bytes(blob))
    try:
        read = load_head(folder, load_plan(folder)).tolist()
    except PlanError as e:
        assert str(folder) in str(e) and e.way_out
    else:
        assert read == sorted(set(read)) and read[0] >= 0 and read[-1] < 16
        assert vouched or bytes(blob) == content


def test_the_file_holds_the_ids_and_nothing_else(folder):
    assert list(safetensors.torch.load((folder / HEAD_FILE).read_bytes())) == ["tokens"]
