"""Budgets in latency, on a clock that advances by what units are said to take when they really run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.common.progress import stages
from sdfp_vllm.dipgo import stopwatch
from sdfp_vllm.dipgo.budget import TOLERANCE
from sdfp_vllm.dipgo.job import SearchOptions, check, find
from sdfp_vllm.dipgo.latency import Latency
from sdfp_vllm.dipgo.plan import load_plan
from sdfp_vllm.dipgo.report import verdict
from sdfp_vllm.dipgo.task import task_of
from sdfp_vllm.errors import PlanError, SdfpError
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_plan import make_plan as saved_plan
from tests.unit.dipgo.test_dipgo_runtime import gates_of

UNITS, REST = (0.5, 2.0, 4.0), 0.25  # seconds


@pytest.fixture
def timed(monkeypatch):
    """A tiny DiT whose blocks take `UNITS` and whose head takes `REST`; and its clock, a list of one number."""
    sampler, clock = tiny_sampler("dit", steps=6), [0.0]

    def takes(module, seconds):
        module.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + seconds))

    for block, seconds in zip(sampler.denoiser.transformer_blocks, UNITS, strict=True):
        takes(block.ff, seconds)
    takes(sampler.denoiser.proj_out_2, REST)
    monkeypatch.setattr(stopwatch, "now", lambda _: clock[0])
    return sampler, clock


@pytest.mark.parametrize("order", [0, 1])
def test_what_is_measured_predicts_every_plan(timed, order):
    sampler, clock = timed
    task = task_of(sampler, "block", "residual", order, 1.0, "latency")
    assert task.cost.units == pytest.approx(UNITS) and task.cost.rest == pytest.approx(REST)
    assert task.cost.full == pytest.approx(sampler.calls * (REST + sum(UNITS)))
    for seed in range(3):
        gates = gates_of(sampler, task.layout, seed)
        began = clock[0]
        task.run(gates, [1])
        assert task.cost.seconds(gates) == pytest.approx(clock[0] - began)
        assert task.cost.share(gates) == pytest.approx((clock[0] - began) / task.cost.full)


@pytest.mark.parametrize("method", ["fisher", "learned"])
def test_a_budget_in_latency_is_kept_in_latency(timed, method):
    sampler, clock = timed
    options = SearchOptions(
        steps=6, budget=0.6, cost="latency", granularity="block", method=method, images=2, rounds=1, iterations=3
    )  # fmt: skip
    with stages(None) as progress:
        found = find(sampler, options, progress)
    assert isinstance(found.task.cost, Latency)
    began = clock[0]
    found.task.run(found.gates, [1])
    assert 0 < (clock[0] - began) / found.task.cost.full <= 0.6 + TOLERANCE


def test_a_latency_budget_spends_where_time_is_saved(timed):
    """The blocks have the same MACs; closing the slow one saves most of the time."""
    sampler, _ = timed
    for cost in ("macs", "latency"):
        task = task_of(sampler, "block", "residual", 0, 0.75, cost)
        closed_last = np.ones((sampler.calls, 3), bool)
        closed_last[1:4, 2] = False  # 12 of 40.5 seconds, 3 of 18 blocks
        assert task.fits(closed_last) == (cost == "latency")


def test_measuring_leaves_nothing_behind(timed):
    sampler, _ = timed
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in sampler.denoiser.modules()]
    full = sampler.latents([3])
    task_of(sampler, "block", "residual", 1, 1.0, "latency")
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in sampler.denoiser.modules()]
    assert (sampler.latents([3]) == full).all()


def latency(**changes):
    fields = {"machine": "Abacus 9", "images": 2, "units": [1.0, 3.0], "rest": 0.5, "full": 12.0}
    return Latency(**(fields | changes))


def test_a_plan_keeps_it_with_the_machines_name(tmp_path):
    plan = saved_plan(latency=latency())
    loaded = load_plan(plan.save(tmp_path))
    assert loaded == plan
    gates = loaded.gates
    assert loaded.latency_share == pytest.approx((3 * 0.5 + gates[:, 0].sum() + 3 * gates[:, 1].sum()) / 12)
    assert "of the full run's time" in verdict(loaded) and "Abacus 9" in verdict(loaded)
    assert saved_plan().latency_share is None and "time" not in verdict(saved_plan())
    with pytest.raises(ValueError, match=r"latency\.units has 1"):
        saved_plan(latency=latency(units=[1.0]))


@pytest.mark.parametrize("wrong", [{"full": 0.0}, {"rest": float("nan")}, {"units": [1.0, -1.0]}])
def test_a_damaged_latency_is_refused_by_name(tmp_path, wrong):
    path = saved_plan(latency=latency()).save(tmp_path)
    field, value = next(iter(wrong.items()))
    content = json.loads(path.read_text())
    content["latency"][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="latency"):
        load_plan(path)


def sdfp(*arguments):
    return CliRunner().invoke(app, ["dipgo", *map(str, arguments)])


def test_another_budget_in_latency(tmp_path):
    path = saved_plan(latency=latency()).save(tmp_path)
    new = tmp_path / "other.json"
    result = sdfp("budget", path, 0.6, "--cost", "latency", "-o", new)
    assert result.exit_code == 0, result.output
    other = load_plan(new)
    assert other.made.cost == "latency" and other.latency_share <= 0.6 + TOLERANCE
    saved_plan().save(path)
    result = sdfp("budget", path, 0.6, "--cost", "latency", "-o", new)
    assert result.exit_code == 2 and "searched without measuring it" in result.output
    assert "--cost: joules is unknown" in sdfp("budget", path, 0.6, "--cost", "joules", "-o", new).output


@pytest.mark.parametrize(
    ("changes", "flag"), [({"cost": "joules"}, "--cost"), ({"latency_images": 0}, "--latency-images")]
)
def test_bad_options_are_refused(changes, flag):
    with pytest.raises(SdfpError, match=f"^{flag}"):
        check(SearchOptions(**changes))


def test_a_budget_that_the_clock_cannot_meet_is_refused(timed):
    with pytest.raises(SdfpError, match="of the latency"):
        task_of(timed[0], "block", "residual", 0, 0.1, "latency")
