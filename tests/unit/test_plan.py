"""The plan file: what is written is read back, and nothing damaged, foreign or unsafe gets through."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdfp_vllm.errors import PlanError, SdfpError
from sdfp_vllm.fingerprint import Fingerprint, fingerprint
from sdfp_vllm.keep import KeepSet
from sdfp_vllm.plan import (
    PLAN_FILE,
    Candidate,
    CostModel,
    FitScore,
    LayerScore,
    Prediction,
    Provenance,
    SkipPlan,
    default_plan_dir,
    load_plan,
)

LAYERS = 4


def make_plan(**changes) -> SkipPlan:
    score = FitScore(fisher_trace=1.0, perturbation_variance=0.5, trace_score=0.5, diagonal_score=0.25)
    plan = SkipPlan(
        model="org/model",
        fingerprint=Fingerprint(
            architecture="LlamaForCausalLM", num_layers=LAYERS, hidden_size=8, vocab_size=16, sha256="a" * 64
        ),
        kept_layers=[0, 3],
        num_speculative_tokens=2,
        draft_tokens_by_batch=[(1, 2), (8, 1), (32, 0)],
        worthwhile=True,
        prediction=Prediction(acceptance_rate=0.8, mean_accepted_length=2.4, speedup=1.4),
        scores=[LayerScore(layer=i, total=score, attention=score, mlp=score) for i in range(LAYERS)],
        curve=[
            Candidate(kept_layers=[0, 3], acceptance=[0.8, 0.7], speedup=[1.0, 1.3, 1.4]),
            Candidate(
                kept_layers=[3], kept_attention=[0], kept_mlp=[1], acceptance=[0.8], speedup=[1.0, 1.2]
            ),
        ],
        cost=CostModel(
            layer_ms=1.0,
            head_ms=0.1,
            verify_ms=[4.1, 4.2, 4.3],
            draft_overhead_ms=0.1,
            round_overhead_ms=0.2,
            device="cpu",
            dtype="float32",
            threads=2,
        ),
        made=Provenance(
            calibration="stdlib",
            calibration_tokens=100,
            seed=0,
            selector="fit",
            created="2026-01-01",
            sdfp_version="0",
            torch_version="0",
            transformers_version="0",
        ),
    )
    return plan.model_copy(update=changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_plan().save(tmp_path)
    return tmp_path


def edit(folder: Path, **changes) -> Path:
    path = folder / PLAN_FILE
    raw = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = raw
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    path.write_text(json.dumps(raw))
    return path


def test_round_trip_from_folder_and_from_file(folder):
    assert load_plan(folder) == load_plan(folder / PLAN_FILE) == make_plan()


def test_plans_of_single_branches(folder):
    """Whole layers may be none where branches of others are kept; a plan from before has no branches."""
    assert load_plan(folder).keep == KeepSet((0, 3))
    edit(folder, kept_layers=[], kept_attention=[0, 2], kept_mlp=[3])
    assert load_plan(folder).keep == KeepSet(attention=(0, 2), mlp=(3,))
    edit(folder, kept_layers=[1], kept_attention=..., kept_mlp=..., cost__attention_ms=..., cost__mlp_ms=...)
    assert load_plan(folder).keep == KeepSet((1,)) and load_plan(folder).cost.mlp_ms is None


def test_bridges_belong_to_whole_layers(folder):
    runs = [{"first": 1, "last": 2, "regularisation": 0.1, "error": 0.5}]
    edit(folder, bridges={"kind": "bias", "rank": 0, "runs": runs, "sha256": "a" * 64}, kept_mlp=[1])
    with pytest.raises(PlanError, match="bridges belong to whole layers"):
        load_plan(folder)


def test_saving_again_replaces_and_leaves_nothing_else(folder):
    make_plan(num_speculative_tokens=1).save(folder)
    assert load_plan(folder).num_speculative_tokens == 1
    assert [p.name for p in folder.iterdir()] == [PLAN_FILE]


def test_failed_write_keeps_the_old_plan(folder, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(PlanError, match=r"plan\.json.*No space left.*-o"):
        make_plan(num_speculative_tokens=1).save(folder)
    monkeypatch.undo()
    assert load_plan(folder) == make_plan()
    assert [p.name for p in folder.iterdir()] == [PLAN_FILE]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema_version.*99.*Upgrade"),
        ({"schema_version": ...}, "schema_version.*None"),
        ({"kept_layers": [0, 4]}, "layer 4.*4 layers"),
        ({"kept_layers": [-1]}, "kept_layers"),
        ({"kept_layers": [3, 0]}, "ascend"),
        ({"kept_layers": [1, 1]}, "ascend"),
        ({"kept_layers": []}, "kept_layers.*all empty"),
        ({"kept_attention": [4]}, "kept_attention names layer 4"),
        ({"kept_attention": [2, 1]}, "kept_attention must ascend"),
        ({"kept_mlp": [-1]}, "kept_mlp"),
        ({"kept_mlp": [1, 1]}, "kept_mlp must ascend"),
        ({"kept_mlp": True}, "kept_mlp"),
        ({"kept_attention": [0]}, r"must not share layers, but share \[0\]"),
        ({"kept_attention": [1], "kept_mlp": [1]}, r"must not share layers, but share \[1\]"),
        ({"curve__1__kept_mlp": [9]}, r"curve\[1\]\.kept_mlp names layer 9"),
        ({"curve__1__kept_attention": [3]}, r"curve\[1\]\.kept_layers.*share \[3\]"),
        (
            {"kept_mlp": [1], "fingerprint__architecture": "Gemma3ForCausalLM"},
            "Gemma3ForCausalLM.*whole layers",
        ),
        ({"kept_layers": [1.5]}, "kept_layers"),
        ({"kept_layers": ["0"]}, "kept_layers"),
        ({"curve__0__kept_layers": [9]}, r"curve\[0\].*layer 9"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 1000}, "num_speculative_tokens"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens"),
        ({"prediction__speedup": float("nan")}, "speedup"),
        ({"prediction__acceptance_rate": 1.5}, "acceptance_rate"),
        ({"scores__0__total__fisher_trace": float("inf")}, "fisher_trace"),
        ({"scores__0__layer": 2}, "scores must list layers"),
        ({"draft_tokens_by_batch": [[8, 1], [1, 2]]}, "ascend"),
        ({"bridges": "../../etc/passwd"}, "bridges"),
        ({"unknown_field": 1}, "unknown_field"),
        ({"fingerprint__sha256": "zz"}, "sha256"),
        ({"fingerprint__num_layers": 10**18}, "num_layers"),  # must not be counted out
        ({"fingerprint__num_layers": 90_000}, "scores must list layers"),
        ({"fingerprint": ...}, "fingerprint"),
        ({"made": ...}, "made"),
    ],
)
def test_damage_is_named(folder, changes, message):
    path = edit(folder, **changes)
    with pytest.raises(PlanError, match=message) as e:
        load_plan(folder)
    assert str(path) in str(e.value)
    assert e.value.way_out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "not JSON|nested"),
        (b'{"schema_version": 2}', "fingerprint|model"),
    ],
)
def test_not_a_plan_at_all(tmp_path, content, message):
    (tmp_path / PLAN_FILE).write_bytes(content)
    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path)


def test_missing_plan_says_how_to_make_one(tmp_path):
    with pytest.raises(PlanError, match="sdfp plan MODEL"):
        load_plan(tmp_path / "nowhere")


def test_plan_for_another_model_names_the_differences(folder):
    other = make_plan().fingerprint.model_copy(update={"hidden_size": 9, "sha256": "b" * 64})
    with pytest.raises(PlanError, match=r"hidden_size is 8 in the plan but 9.*sha256"):
        load_plan(folder, expected=other)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def paths(node, prefix=()):
    """Every place in a JSON tree."""
    yield prefix
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from paths(child, (*prefix, key))


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mutation_gives_a_plan_or_our_error(tmp_path_factory, data):
    """10,000 mutations of structure or bytes: a valid plan, or PlanError. Nothing else leaves load_plan."""
    folder = _fuzz_folder(tmp_path_factory)
    partial = {"kept_layers": [0], "kept_attention": [1, 2], "kept_mlp": [3]}
    text = make_plan(**partial if data.draw(st.booleans()) else {}).model_dump_json()
    if data.draw(st.booleans()):
        raw = json.loads(text)
        for _ in range(data.draw(st.integers(1, 3))):
            *parents, last = data.draw(st.sampled_from([p for p in paths(raw) if p]))
            node = raw
            for key in parents:
                node = node[key]
            if data.draw(st.booleans()):
                node[last] = data.draw(_JSON)
            elif isinstance(node, dict):
                node[data.draw(st.text(max_size=4))] = node.pop(last)
            else:
                node.pop(last)
        blob = json.dumps(raw).encode()
    else:
        blob = bytearray(text.encode())
        for _ in range(data.draw(st.integers(1, 8))):
            blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
        blob = (
            bytes(blob[: data.draw(st.integers(0, len(blob)))]) if data.draw(st.booleans()) else bytes(blob)
        )
    (folder / PLAN_FILE).write_bytes(blob)
    try:
        plan = load_plan(folder)
    except PlanError as e:
        assert str(folder) in str(e) and e.way_out
    else:
        assert 0 <= min(plan.keep.touched()) <= max(plan.keep.touched()) < plan.fingerprint.num_layers
    assert [p.name for p in folder.iterdir()] == [PLAN_FILE]


_folders: list[Path] = []


def _fuzz_folder(factory) -> Path:
    if not _folders:
        _folders.append(factory.mktemp("fuzz"))
    return _folders[0]


# ---------------------------------------------------------------- fingerprint
def write_model(folder: Path, weights: bytes = b"weights", **config) -> Path:
    folder.mkdir(exist_ok=True)
    base = dict(architectures=["LlamaForCausalLM"], num_hidden_layers=4, hidden_size=8, vocab_size=16)
    (folder / "config.json").write_text(json.dumps({**base, **config}))
    header = json.dumps(
        {"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    return folder


def test_fingerprint_sees_weights_shape_and_config_but_not_volatile_keys(tmp_path):
    base = fingerprint(write_model(tmp_path / "a"))
    assert fingerprint(write_model(tmp_path / "b", transformers_version="9", torch_dtype="float16")) == base
    assert fingerprint(write_model(tmp_path / "c", weights=b"weightz")) != base
    assert fingerprint(write_model(tmp_path / "d", rope_theta=1.0)) != base
    assert fingerprint(write_model(tmp_path / "e", hidden_size=9)) != base
    assert default_plan_dir(base) != default_plan_dir(fingerprint(tmp_path / "c"))


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"architectures": ["A"], "hidden_size": 8}',
        '{"num_hidden_layers": 0, "hidden_size": 8, "vocab_size": 9}',
    ],
)
def test_bad_config_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SdfpError, match=r"config\.json"):
        fingerprint(tmp_path)


def test_errors_cross_process_boundaries():
    import pickle

    error = PlanError("file", "is wrong", "Mend it.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is PlanError and str(again) == "file: is wrong. Mend it."
