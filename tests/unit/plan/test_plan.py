"""The plan file: what is written is read back, and nothing damaged, foreign or unsafe gets through."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sdfp_vllm.errors import PlanError, SdfpError
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.parcel import PLAN_FILE
from sdfp_vllm.plan.schema import (
    DraftHead,
)
from sdfp_vllm.plan.store import default_plan_dir, load_plan, save_plan
from sdfp_vllm.plan.window import DraftWindow
from tests.support.plans import (
    VIEW,
    bridged_and_restricted,
    edit,
    make_plan,
    write_model,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_plan(make_plan(), tmp_path)
    return tmp_path


def test_round_trip_from_folder_and_from_file(folder):
    assert load_plan(folder) == load_plan(folder / PLAN_FILE) == make_plan()


def test_plans_of_single_branches(folder):
    """Whole layers may be none where branches of others are kept; each has its own precision."""
    assert load_plan(folder).keep == KeepSet((0, 3)) and load_plan(folder).view.branches == VIEW
    edit(
        folder,
        view__attention=["full", "skip", "int8", "skip"],
        view__mlp=["skip", "skip", "skip", "int8"],
    )
    plan = load_plan(folder)
    assert plan.keep == KeepSet(attention=(0, 2), mlp=(3,))
    assert plan.view.branches.as_units() == {
        ("attention", 0): "full",
        ("attention", 2): "int8",
        ("mlp", 3): "int8",
    }
    edit(folder, view__attention=["skip", "full", "skip", "skip"], view__mlp=["skip", "full", "skip", "skip"])
    assert load_plan(folder).view.branches == KeepSet((1,))


def test_what_is_left_out_has_a_value_that_says_so(folder):
    """Costs, chances and check are optional; without a head it is the target's own."""
    optional = ("costs", "chances", "check", "extra_bytes", "draft_tokens_by_batch")
    edit(folder, view__head=..., view__bridges=..., view__window=..., **dict.fromkeys(optional, ...))
    plan = load_plan(folder)
    assert plan.view.head == DraftHead() and plan.view.bridges is None and plan.extra_bytes == 0
    assert plan.view.window is None
    assert plan.costs is plan.chances is plan.check is plan.pacing is None
    assert plan.promised_speedup == plan.prediction.speedup == 1.4
    assert make_plan().promised_speedup == pytest.approx(14 / 10)  # where it was measured, the measurement


def test_pacing_comes_from_costs_and_chances():
    plan = make_plan()
    pacing, costs = plan.pacing, plan.costs
    assert pacing is not None and costs is not None
    assert pacing.rows == [1, 2, 3] and pacing.acceptance == [0.8, 0.7]
    assert pacing.target_ms == [costs.target_ms(m) for m in (1, 2, 3)]
    assert pacing.draft_ms == [costs.step_ms(VIEW, m) for m in (1, 2, 3)]
    assert (pacing.draft_overhead_ms, pacing.round_overhead_ms) == (0.1, 0.2)
    assert pacing.draft_ms[0] == pytest.approx(0.125 + 0.75 + 0.25 + 0.375 + 2 * 0.01 + 0.05)
    assert make_plan(costs=None).pacing is None and make_plan(chances=None).pacing is None


def test_the_same_plan_without_rounded_copies():
    plan, _, _ = bridged_and_restricted()
    full = plan.at_full_precision()
    assert full.view.branches == KeepSet((0, 3)) == plan.keep
    wide = 4 if plan.costs.dtype == "float32" else 2  # the rows of its restricted head are then in full
    assert full.extra_bytes == plan.view.head.tokens * plan.fingerprint.hidden_size * wide > 0
    assert full.used_precisions() == {"full"} and plan.used_precisions() == {"full", "int8"}
    assert full.view.bridges == plan.view.bridges
    assert full.view.window == plan.view.window == DraftWindow(last=1024)
    assert full.view.head == plan.view.head.model_copy(update={"precision": "full"})
    assert full.pacing is not None and plan.pacing is not None
    assert min(a - b for a, b in zip(full.pacing.draft_ms, plan.pacing.draft_ms, strict=True)) > 0
    assert full.at_full_precision() == full


def test_bridges_belong_to_whole_layers(folder):
    runs = [{"first": 1, "last": 2, "regularisation": 0.1, "error": 0.5}]
    edit(
        folder,
        view__bridges={"kind": "bias", "rank": 0, "runs": runs, "sha256": "a" * 64},
        view__mlp=["full", "full", "skip", "full"],
    )
    with pytest.raises(PlanError, match="bridges belong to whole layers"):
        load_plan(folder)


def test_a_plan_of_the_release_before_is_refused_in_one_line(tmp_path):
    """Schema 2 had lists of layers; nothing of it is guessed at."""
    old = {
        "schema_version": 2,
        "model": "org/model",
        "kept_layers": [0, 3],
        "bridges": "none",
        "head": "full",
    }
    (tmp_path / PLAN_FILE).write_text(json.dumps(old))
    with pytest.raises(PlanError, match=r"schema_version.*2.*reads 3.*`sdfp plan MODEL`") as e:
        load_plan(tmp_path)
    assert "\n" not in str(e.value)
    assert default_plan_dir(make_plan().fingerprint).parent.name == "v3"


def test_saving_again_replaces_and_leaves_nothing_else(folder):
    save_plan(make_plan(num_speculative_tokens=1), folder)
    assert load_plan(folder).num_speculative_tokens == 1
    assert [p.name for p in folder.iterdir()] == [PLAN_FILE]


def test_failed_write_keeps_the_old_plan(folder, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(PlanError, match=r"plan\.json.*No space left.*-o"):
        save_plan(make_plan(num_speculative_tokens=1), folder)
    monkeypatch.undo()
    assert load_plan(folder) == make_plan()
    assert [p.name for p in folder.iterdir()] == [PLAN_FILE]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema_version.*99.*Upgrade"),
        ({"schema_version": ...}, "schema_version.*None"),
        ({"view": ...}, "view"),
        ({"view": ["full"] * 4}, "view"),
        ({"view__attention": ["full"] * 5}, "view has 5 attention and 4 mlp, the model 4 layers"),
        ({"view__attention": ["full"] * 3}, "view has 3 attention and 4 mlp"),
        ({"view__mlp": ["full"] * 5}, "view has 4 attention and 5 mlp"),
        ({"view__attention": []}, "view.attention"),
        ({"view__attention": ...}, "view.attention"),
        ({"view__mlp": ...}, "view.mlp"),
        ({"view__attention": ["skip"] * 4, "view__mlp": ["skip"] * 4}, "view skips every branch"),
        ({"view__attention__1": "int3"}, r"view\.attention\.1"),
        ({"view__attention__0": 1.5}, r"view\.attention\.0"),
        ({"view__attention__0": None}, r"view\.attention\.0"),
        ({"view__mlp__3": 0}, r"view\.mlp\.3"),
        ({"view__mlp__3": "FULL"}, r"view\.mlp\.3"),
        ({"view__mlp": True}, r"view\.mlp"),
        ({"view__mlp": "full"}, r"view\.mlp"),
        ({"view__kept_layers": [0]}, r"view\.kept_layers"),
        ({"view__head": None}, r"view\.head"),
        ({"view__window": 1024}, r"view\.window"),
        ({"view__window": {"sinks": 4}}, r"view\.window\.last"),
        ({"view__window": {"last": 0}}, r"view\.window\.last"),
        ({"view__window": {"last": 1.5}}, r"view\.window\.last"),
        ({"view__window": {"last": 10**18}}, r"view\.window\.last"),
        ({"view__window": {"last": 8, "sinks": -1}}, r"view\.window\.sinks"),
        ({"view__window": {"last": 8, "beyond": -1}}, r"view\.window\.beyond"),
        ({"view__head": {"precision": "int3"}}, r"view\.head\.precision"),
        ({"view__head": {"tokens": 4}}, r"view\.head.*a file with a hash"),
        ({"view__head": {"sha256": "a" * 64}}, r"view\.head.*a file with a hash"),
        ({"view__head": {"tokens": 16, "sha256": "a" * 64}}, "head has 16 tokens of a vocabulary of 16"),
        ({"kept_layers": [0]}, "kept_layers"),
        ({"curve__1__mlp": ["full"] * 9}, r"curve\[1\] has 4 attention and 9 mlp"),
        ({"curve__1__attention": ["skip"] * 4, "curve__1__mlp": ["skip"] * 4}, r"curve\[1\] skips every"),
        ({"curve__0__attention": [9] * 4}, r"curve\.0\.attention"),
        (
            {"view__mlp__1": "full", "fingerprint__architecture": "Gemma3ForCausalLM"},
            "Gemma3ForCausalLM.*whole layers",
        ),
        ({"extra_bytes": -1}, "extra_bytes"),
        ({"extra_bytes": 1.5}, "extra_bytes"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 1000}, "num_speculative_tokens"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens"),
        ({"prediction__speedup": float("nan")}, "speedup"),
        ({"prediction__acceptance_rate": 1.5}, "acceptance_rate"),
        ({"scores__0__total__fisher_trace": float("inf")}, "fisher_trace"),
        ({"scores__0__layer": 2}, "scores must list layers"),
        ({"draft_tokens_by_batch": [[8, 1], [1, 2]]}, "ascend"),
        ({"view__bridges": "../../etc/passwd"}, r"view\.bridges"),
        ({"view__bridges": {}}, r"view\.bridges"),
        ({"scores__0__mlp__rounding_scores": {"int3": 1.0}}, "rounding_scores"),
        ({"scores__0__mlp__rounding_scores": {"int8": -1.0}}, "rounding_scores"),
        ({"costs__num_layers": 3}, "costs are of 3 layers, the model has 4"),
        ({"costs__mlp__int8": ...}, "costs have no times for int8"),
        ({"costs__attention__full": ...}, "attention must have the times at full precision"),
        ({"costs__attention__int8": [1.0]}, "attention needs one time for each of rows"),
        ({"costs__head__full__0": float("nan")}, "costs"),
        ({"costs__head__full__0": -1.0}, "costs"),
        ({"costs__rows": [1, 1, 2]}, "rows must ascend from 1"),
        ({"costs__draft_head": [1.0]}, "draft_head needs one time"),
        ({"costs__layer_overhead_ms": 1e308}, "the full model must take time at each of rows"),
        (
            {
                f"costs__{name}__{p}": [0.0] * 3
                for name in ("attention", "mlp", "head")
                for p in ("full", "int8")
            }
            | {"costs__layer_overhead_ms": 0.0},
            "the full model must take time at each of rows",
        ),
        (
            {f"costs__{name}": {"full": [0.0] * 3, "int8": [0.0] * 3} for name in ("attention", "mlp")}
            | {"costs__layer_overhead_ms": 0.0, "costs__draft_head": [0.0] * 3},
            "a draft step must take time at each of rows",
        ),
        ({"chances__acceptance": []}, "acceptance"),
        ({"chances__acceptance__0": 1.5}, "acceptance"),
        ({"chances__confidence": [0.5]}, "confidence"),
        ({"check__plain": 0.0}, "check.plain"),
        ({"check__engine": "fast"}, "check.engine"),
        ({"check__prompts": 0}, "check.prompts"),
        ({"made__score_text": "other"}, "made.score_text"),
        ({"windows": [{"context": 1, "last": 0}]}, r"windows\.0\.last"),
        ({"unknown_field": 1}, "unknown_field"),
        ({"fingerprint__sha256": "zz"}, "sha256"),
        ({"fingerprint__num_layers": 10**18}, "num_layers"),  # must not be counted out
        ({"fingerprint__num_layers": 90_000}, "view has 4 attention and 4 mlp, the model 90000 layers"),
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
        (b'{"schema_version": 3}', "fingerprint|model"),
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
