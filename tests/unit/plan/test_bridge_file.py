"""Bridge tensors beside the plan: what is written is read back, and nothing damaged or foreign gets through."""

from __future__ import annotations

import hashlib
import json

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.bridge_file import pack_bridges
from sdfp_vllm.plan.parcel import BRIDGE_FILE, PLAN_FILE
from sdfp_vllm.plan.schema import BridgeRun, SkipPlan, runs_skipped
from sdfp_vllm.plan.store import load_parcel, load_plan, save_plan
from tests.support.plans import VIEW, make_plan, stored

HIDDEN, RUN = 8, (1, 2)  # make_plan: 4 layers, 0 and 3 kept


def bridge(kind: str, rank: int = 3) -> Bridge:
    g = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if kind == "bias":
        return Bridge(noise(HIDDEN))
    if kind == "affine":
        return Bridge(noise(HIDDEN), scale=noise(HIDDEN))
    return Bridge(noise(HIDDEN), mean=noise(HIDDEN), down=noise(rank, HIDDEN), up=noise(rank, HIDDEN))


def described(kind: str = "low-rank") -> tuple[SkipPlan, bytes]:
    runs = [BridgeRun(first=1, last=2, regularisation=0.1, error=0.5)]
    description, content = pack_bridges(runs, {RUN: bridge(kind)})
    return make_plan(view=stored(VIEW, bridges=description)), content


@pytest.fixture
def folder(tmp_path):
    plan, content = described()
    save_plan(plan, tmp_path, content)
    return tmp_path


def forge(folder, content: bytes) -> None:
    """Puts `content` in place of the tensors, with a plan that vouches for it."""
    (folder / BRIDGE_FILE).write_bytes(content)
    raw = json.loads((folder / PLAN_FILE).read_text())
    raw["view"]["bridges"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / PLAN_FILE).write_text(json.dumps(raw))


@pytest.mark.parametrize("kind", ["bias", "affine", "low-rank"])
def test_round_trip(tmp_path, kind):
    plan, content = described(kind)
    save_plan(plan, tmp_path, content)
    assert load_plan(tmp_path) == plan
    (read,) = load_parcel(tmp_path).bridges().values()
    want = bridge(kind)
    assert read.kind == kind and read.tensors().keys() == want.tensors().keys()
    for name, tensor in want.tensors().items():
        assert torch.equal(read.tensors()[name], tensor)
    assert sorted(p.name for p in tmp_path.iterdir()) == [BRIDGE_FILE, PLAN_FILE]


def test_formulas():
    h = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for kind in ("bias", "affine", "low-rank"):
        b = bridge(kind).to(dtype=torch.float64)
        for row, got in zip(h, b.apply(h), strict=True):
            want = row + b.shift
            if kind == "affine":
                want = b.scale * row + b.shift
            if kind == "low-rank":
                want = (
                    row + b.shift + sum((d @ (row - b.mean)) * u for d, u in zip(b.down, b.up, strict=True))
                )
            torch.testing.assert_close(got, want)


def test_a_plan_without_bridges_replaces_one_with_them(folder):
    save_plan(make_plan(), folder)
    assert load_plan(folder).view.bridges is None and load_parcel(folder).bridges() == {}
    assert [p.name for p in folder.iterdir()] == [PLAN_FILE]


def test_plan_and_tensors_are_saved_together(tmp_path):
    plan, content = described()
    with pytest.raises(ValueError, match="tensors"):
        save_plan(plan, tmp_path)
    with pytest.raises(ValueError, match="tensors"):
        save_plan(make_plan(), tmp_path, content)


def test_a_failed_write_of_the_plan_is_noticed_not_served(folder, monkeypatch):
    """New tensors beside the old plan, as a crash between the two writes leaves them."""
    _, other = described("affine")
    (folder / BRIDGE_FILE).write_bytes(other)
    with pytest.raises(PlanError, match="SHA-256 differs"):
        load_plan(folder)


def test_missing_tensors_are_named(folder):
    (folder / BRIDGE_FILE).unlink()
    with pytest.raises(PlanError, match=r"bridges\.safetensors.*missing.*sdfp plan MODEL"):
        load_plan(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1-2.shift": None}, "lacks tensor '1-2.shift'"),
        ({"1-2.other": torch.zeros(1)}, "unknown tensor '1-2.other'"),
        ({"1-2.shift": torch.zeros(HIDDEN + 1)}, r"1-2\.shift.*\(9,\).*\(8,\)"),
        ({"1-2.down": torch.zeros(2, HIDDEN)}, r"1-2\.down.*\(2, 8\).*\(3, 8\)"),
        ({"1-2.shift": torch.zeros(HIDDEN, dtype=torch.float16)}, "float16"),
        ({"1-2.up": torch.full((3, HIDDEN), float("nan"))}, r"1-2\.up.*finite"),
        ({"1-2.mean": torch.full((HIDDEN,), float("inf"))}, r"1-2\.mean.*finite"),
    ],
)
def test_wrong_tensors_are_named_even_if_the_hash_is_right(folder, changes, message):
    tensors = safetensors.torch.load((folder / BRIDGE_FILE).read_bytes()) | changes
    forge(folder, safetensors.torch.save({k: t for k, t in tensors.items() if t is not None}))
    with pytest.raises(PlanError, match=message) as e:
        load_plan(folder)
    assert str(folder / BRIDGE_FILE) in str(e.value)


def test_a_file_of_any_size_is_not_read(folder):
    with (folder / BRIDGE_FILE).open("r+b") as f:
        f.truncate(1 << 40)  # sparse
    with pytest.raises(PlanError, match="larger than"):
        load_plan(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "full"},
        {"rank": 0},
        {"rank": 65},
        {"kind": "bias"},
        {"runs": []},
        {"runs": [{"first": 0, "last": 1, "regularisation": 0.1, "error": 0.5}]},
        {"runs": [{"first": 1, "last": 1, "regularisation": 0.1, "error": 0.5}]},
        {"runs": [{"first": 1, "last": 2, "regularisation": 0.1, "error": 0.5}] * 2},
        {"sha256": "x"},
        {"file": "../../etc/passwd"},
    ],
)
def test_a_wrong_description_is_refused(folder, changes):
    raw = json.loads((folder / PLAN_FILE).read_text())
    raw["view"]["bridges"] |= changes
    (folder / PLAN_FILE).write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="bridges"):
        load_plan(folder)


def test_runs_skipped():
    assert runs_skipped([0, 3], 4) == {(1, 2)}
    assert runs_skipped([2, 3, 6], 9) == {(0, 1), (4, 5), (7, 8)}
    assert runs_skipped([0, 1, 2], 3) == set()


@settings(max_examples=1_500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), vouched=st.booleans())
def test_any_mutation_of_the_tensors_gives_bridges_or_our_error(tmp_path_factory, data, vouched):
    """Bytes changed, cut or added; half of the time the plan vouches for them, so that the parser meets them."""
    folder = tmp_path_factory.getbasetemp() / "bridge-fuzz"
    plan, content = described()
    blob = bytearray(content)
    # The header is what a parser stumbles over: half of the changes go there.
    limit = st.sampled_from([8, 8 + int.from_bytes(content[:8], "little"), len(blob)])
    for _ in range(data.draw(st.integers(1, 6))):
        blob[data.draw(st.integers(0, data.draw(limit) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        blob = blob[: data.draw(st.integers(0, len(blob)))]
    blob += data.draw(st.binary(max_size=16))
    save_plan(plan, folder, content)
    if vouched:
        forge(folder, bytes(blob))
    else:
        (folder / BRIDGE_FILE).write_bytes(blob)
    try:
        load_plan(folder)
    except PlanError as e:
        assert str(folder) in str(e) and e.way_out
    else:
        (read,) = load_parcel(folder).bridges().values()
        assert all(torch.isfinite(t).all() for t in read.tensors().values())
        assert vouched or bytes(blob) == content
