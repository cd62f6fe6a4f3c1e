"""`sdfp plan --refresh-costs`: a plan of another machine, priced on this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.common.machine import processor
from sdfp_vllm.plan.parcel import HEAD_FILE, PLAN_FILE
from sdfp_vllm.plan.store import find_plan, load_parcel, load_plan
from sdfp_vllm.planner import refresh
from tests.unit.planner.test_job import SMALL, TEXT, save_tiny


def run(*arguments: object):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory) -> tuple[Path, Path]:
    """A model, and its plan as another machine would have made it: a layer takes a second there."""
    work = tmp_path_factory.mktemp("made")
    model, text, out = save_tiny(work / "model"), work / "text.txt", work / "plan"
    text.write_text(TEXT * 600)
    fixed = ["--calibration", text, *SMALL, "--layers", 2, "--head", 60]
    assert (done := run("plan", model, *fixed, "-o", out)).exit_code == 0, done.output
    content = json.loads((out / PLAN_FILE).read_text())
    costs = content["costs"]
    costs["device"] = "NVIDIA L4"
    for branch in ("attention", "mlp"):
        costs[branch]["full"] = [1000.0] * len(costs["rows"])
    content["num_speculative_tokens"] = 1
    content["prediction"]["speedup"] = 9.0
    (out / PLAN_FILE).write_text(json.dumps(content))
    return model, out


def test_costs_are_this_machines_and_all_else_is_kept(made, tmp_path):
    _, folder = made
    before = load_parcel(folder)
    done = run(
        "plan", "--refresh-costs", folder, "--no-check", "-o", tmp_path / "new"
    )  # the plan's own model
    assert done.exit_code == 0, done.output
    after = load_parcel(tmp_path / "new")
    old, new = before.plan, after.plan
    assert new.costs is not None and processor() in new.costs.device and max(new.costs.mlp["full"]) < 100.0
    assert new.costs.draft_head is not None  # timed as a share of the whole head
    shares = [part / whole for part, whole in zip(new.costs.draft_head, new.costs.head["full"], strict=True)]
    assert max(shares) == pytest.approx(min(shares)) and shares[0] != 1.0
    for kept in ("view", "scores", "chances", "made", "fingerprint", "extra_bytes"):
        assert getattr(new, kept) == getattr(old, kept), kept
    assert after.files == before.files
    # What follows from costs: lengths, predictions and the curve.
    k, view = new.num_speculative_tokens, new.view.branches
    length = new.prediction.mean_accepted_length
    assert new.prediction.speedup == pytest.approx(new.costs.speedup(view, k, length)) != 9.0
    tokens, reached = [1.0], 1.0
    for rate in new.chances.acceptance:
        reached *= rate
        tokens.append(tokens[-1] + reached)
    gains = [new.costs.speedup(view, n, tokens[n]) for n in range(1, len(tokens))]
    assert new.prediction.speedup == pytest.approx(max(gains)) and k == 1 + gains.index(max(gains))
    assert [size for size, _ in new.draft_tokens_by_batch] == [size for size, _ in old.draft_tokens_by_batch]
    assert new.check is None and "Not checked on an engine" in done.output
    assert [c.acceptance for c in new.curve] == [c.acceptance for c in old.curve]
    assert [c.speedup for c in new.curve] != [c.speedup for c in old.curve]


def test_a_shared_plan_beside_its_model_stays_and_this_machines_goes_first(made, tmp_path, monkeypatch):
    model, folder = made
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(model, tmp_path / "moved")  # the path that the plan names is another
    shared = Path(shutil.copytree(folder, tmp_path / "moved" / "sdfp"))
    before = (shared / PLAN_FILE).read_bytes()
    done = run("plan", "--refresh-costs", shared, "--no-check")
    assert done.exit_code == 0, done.output
    assert (shared / PLAN_FILE).read_bytes() == before
    found = find_plan(str(tmp_path / "moved"))
    assert found.plan.model == str(tmp_path / "moved") and found.plan.costs.device != "NVIDIA L4"
    assert sorted(f.name for f in Path(found.source).iterdir()) == sorted([PLAN_FILE, HEAD_FILE])
    assert "--speculative-model sdfp" in done.output


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(made, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(refresh, "load_target", lambda *_: pytest.fail("loaded"))
    refused = run("plan", "--refresh-costs", made[1], "--no-check", "-o", tmp_path / "file" / "plan")
    assert refused.exit_code == 2 and "cannot be written" in refused.stderr


def test_another_view_is_named_only_where_it_would_be_faster(made):
    plan = load_plan(made[1])
    view = plan.view.branches
    others = [c for c in plan.curve if c.view != view]
    slow = [c.model_copy(update={"speedup": [1.0] + [0.9] * len(c.acceptance)}) for c in others]
    own = [c for c in plan.curve if c.view == view]
    prediction = plan.prediction.model_copy(update={"speedup": 1.2})
    plan = plan.model_copy(update={"prediction": prediction, "curve": [*slow, *own]})
    assert refresh._faster(plan) == (None, 0.0)
    # Of none that pays, the first is no advice.
    assert (
        refresh._faster(
            plan.model_copy(update={"prediction": prediction.model_copy(update={"speedup": 0.5})})
        )[0]
        is None
    )
    fast = own[0].model_copy(update={"attention": ["full"] * 4, "mlp": ["full"] * 4, "speedup": [1.0, 1.5]})
    assert fast.view != view
    assert refresh._faster(plan.model_copy(update={"curve": [*slow, fast]})) == (fast, 1.5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--layers", "2"], r"--layers: means nothing with --refresh-costs"),
        (["--window", "auto"], r"--window: means nothing with --refresh-costs"),
    ],
)
def test_what_belongs_to_a_search_is_refused(made, more, says):
    refused = run("plan", "--refresh-costs", made[1], *more)
    assert refused.exit_code == 2 and says in refused.stderr, refused.output


def test_refusals_leave_the_plan_as_it_was(made, tmp_path):
    other = save_tiny(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    before = (made[1] / PLAN_FILE).read_bytes()
    refused = run("plan", other, "--refresh-costs", made[1], "--no-check")
    assert refused.exit_code == 2 and "was made for another model" in refused.stderr
    assert (made[1] / PLAN_FILE).read_bytes() == before
    assert "no such plan" in run("plan", "--refresh-costs", tmp_path / "none").stderr
    assert "MODEL: is missing" in run("plan").stderr


def test_a_precision_without_a_kernel_here_is_named(made, tmp_path, monkeypatch):
    from sdfp_vllm.errors import SdfpError

    def none_here(weights, dtype, asked):
        if asked != "auto":
            raise SdfpError(f"--precision {asked}", "has no kernel on this machine", "Use another.")
        return []

    monkeypatch.setattr(refresh, "usable_precisions", none_here)
    content = json.loads((made[1] / PLAN_FILE).read_text())
    kept = content["view"]["mlp"].index("full")
    content["view"]["mlp"][kept] = "int8"
    for branch in ("attention", "mlp"):
        content["costs"][branch]["int8"] = content["costs"][branch]["full"]
    folder = tmp_path / "plan"
    folder.mkdir()
    (folder / PLAN_FILE).write_text(json.dumps(content))
    (folder / HEAD_FILE).write_bytes((made[1] / HEAD_FILE).read_bytes())
    refused = run("plan", "--refresh-costs", folder, "--no-check")
    assert (
        refused.exit_code == 2 and "drafts in int8, for which this machine has no kernel" in refused.stderr
    ), refused.output
