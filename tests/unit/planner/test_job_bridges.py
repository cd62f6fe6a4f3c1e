"""`sdfp plan --bridge`, from the command line to the files beside the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.plan.parcel import BRIDGE_FILE, PLAN_FILE
from sdfp_vllm.plan.store import load_parcel, load_plan
from tests.unit.planner.test_job import SMALL, TEXT, save_tiny


@pytest.fixture(scope="module", name="arguments")
def _arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    text = folder / "calibration.txt"
    text.write_text(TEXT * 600)
    fixed = [*SMALL, "--layers", "2", "--draft-tokens", "3"]
    return ["plan", str(save_tiny(folder / "model")), "--calibration", str(text), *fixed]


def run(arguments: list[str], out: Path, bridge: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments, "--bridge", bridge, "-o", str(out)])


def test_bridges_are_fitted_saved_and_shown_and_go_with_the_next_plan(arguments, tmp_path):
    made = run(arguments, tmp_path, "low-rank")
    assert made.exit_code == 0, made.output
    plan = load_plan(tmp_path)
    bridges = plan.view.bridges
    assert bridges is not None and bridges.kind == "low-rank" and bridges.rank == 16
    assert [(r.first, r.last) for r in bridges.runs] == [(1, 2)]
    (bridge,) = load_parcel(tmp_path).bridges().values()
    assert bridge.hidden_size == plan.fingerprint.hidden_size and bridge.up.abs().max() > 0
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(tmp_path)])
    assert "low-rank of rank 16 over layers" in shown.output and "1-2" in shown.output

    without = run(arguments, tmp_path, "none")
    assert without.exit_code == 0, without.output
    assert load_plan(tmp_path).view.bridges is None
    assert [f.name for f in tmp_path.iterdir()] == [PLAN_FILE] != [BRIDGE_FILE]


def test_auto_never_predicts_less_than_no_bridge(arguments, tmp_path, monkeypatch):
    """Costs fixed, so that the two runs compare: what auto takes is predicted to be at least as fast."""
    from sdfp_vllm.planner import bridged_search, job
    from tests.unit.planner.test_search import flat_cost

    monkeypatch.setattr(job, "measure_costs", lambda stack, **settings: flat_cost(4))
    monkeypatch.setattr(bridged_search, "measure_bridge_ms", lambda stack, bridge: 0.01)
    plans = {}
    for bridge in ("none", "auto"):
        made = run(arguments, tmp_path / bridge, bridge)
        assert made.exit_code == 0, made.output
        plans[bridge] = load_plan(tmp_path / bridge)
    none, auto = plans["none"], plans["auto"]
    assert (auto.view.bridges is None) == (auto.prediction == none.prediction)
    assert auto.prediction.speedup >= none.prediction.speedup


def test_an_unknown_kind_is_refused_before_the_model_is_loaded(arguments, tmp_path):
    result = run(arguments, tmp_path, "full")
    assert result.exit_code == 2
    assert "--bridge" in result.output and "'low-rank'" in result.output
