"""Schedules of whole steps: the programme against enumeration, and on a recorded prediction."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sdfp_vllm.dipgo import schedule
from sdfp_vllm.dipgo.outputs import Outputs
from sdfp_vllm.dipgo.schedule import best_path, predicted, scheduled
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import task_of
from tests.support.tiny_pipelines import tiny_sampler


def summed(cost, steps):
    nodes = [0, *(s + 1 for s in steps), len(cost) - 1]
    return sum(cost[a, b, c] for a, b, c in zip(nodes, nodes[1:], nodes[2:], strict=False))


@pytest.mark.parametrize("forced", [(0,), (0, 1, 2), (0, 4)])
@pytest.mark.parametrize("count", [3, 5, 8])
def test_no_schedule_costs_less(count, forced):
    cost = np.random.default_rng(count).random((10, 10, 10)) ** 3  # of eight steps
    h, i, j = np.ogrid[:10, :10, :10]
    cost[(h >= i) | (i >= j)] = np.inf
    schedules = [s for s in combinations(range(8), count) if set(forced) <= set(s)]
    best = min(schedules, key=lambda s: summed(cost, s))
    found = best_path(cost, count, forced)
    assert tuple(found) == best
    assert len(found) == count


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("granularity, reuse", [("block", "residual"), ("step", "output")])
def test_a_schedule_is_the_best_of_all_by_the_errors_of_its_steps_taken_alone(granularity, reuse, power):
    sampler = tiny_sampler("dit", steps=6)
    task = task_of(sampler, granularity, reuse, 1, 0.55)
    surrogate = record(sampler, task.layout, reuse, 1, [11, 12], 2, cautious=True)
    pattern = scheduled(task, predicted(surrogate, power), "012hH")
    assert task.fits(pattern.gates) and (pattern.gates == pattern.gates[:, :1]).all()
    runs = np.flatnonzero(pattern.gates[:, 0])
    assert len(runs) == 3 and runs[0] == 0
    assert set(pattern.kinds.flat) <= set("01h")

    whole = surrogate.whole()

    def loss(steps, kind_of):
        """The errors of the steps left out, each on its own."""
        total = 0.0
        for t in range(6):
            if t not in steps:
                values = tuple(sorted((s for s in steps if s < t), reverse=True)[:2])
                total += whole.error(0, t, kind_of(t), values)[1] ** power
        return total

    own = loss(runs, lambda t: str(pattern.kinds[t, 0]))
    for steps in combinations(range(6), 3):
        if steps[0] == 0:
            for kind in "01h":
                assert own <= loss(steps, lambda t, kind=kind: kind) * (1 + 1e-9)


def test_first_steps_are_kept_where_the_budget_holds_them():
    sampler = tiny_sampler("dit", steps=6)
    task = task_of(sampler, "block", "residual", 1, 0.55)
    surrogate = record(sampler, task.layout, "residual", 1, [11], 1, cautious=True)
    errors = predicted(surrogate, 1.0)
    assert scheduled(task, errors, "01", first=3).gates[:3].all()
    assert scheduled(task, errors, "01", first=5) is None


def test_experts_are_forecast_from_their_own_steps():
    sampler = tiny_sampler("wan", steps=8)
    task = task_of(sampler, "block", "residual", 1, 0.7)
    assert len(task.stages) == 2
    surrogate = record(sampler, task.layout, "residual", 1, [11], 1, cautious=True)
    pattern = scheduled(task, predicted(surrogate, 1.0), "01")
    assert task.fits(pattern.gates) and pattern.gates[list(task.stages)].all()
    assert surrogate.loss(pattern.gates, pattern.kinds) < float("inf")


@pytest.mark.parametrize("granularity, reuse", [("block", "output"), ("branch", "residual")])
def test_a_schedule_by_what_outputs_err_by_serves_any_units(granularity, reuse):
    sampler = tiny_sampler("dit", steps=6)
    with Outputs(sampler).listening() as outputs:
        sampler.latents([11, 12])
    task, errors = task_of(sampler, granularity, reuse, 1, 0.7), outputs.errors("absolute")
    pattern = scheduled(task, errors, "1")
    runs = np.flatnonzero(pattern.gates.any(1))
    assert task.fits(pattern.gates) and (pattern.gates == pattern.gates[:, :1]).all() and len(runs) in (3, 4)

    def loss(steps):
        left = [t for t in range(6) if t not in steps]
        return sum(errors(t, "1", tuple(sorted((s for s in steps if s < t), reverse=True)[:2])) for t in left)

    assert all(loss(runs) <= loss((0, *s)) * (1 + 1e-9) for s in combinations(range(1, 6), len(runs) - 1))


def test_no_more_steps_are_left_out_in_a_row_than_the_budget_asks_for(monkeypatch):
    sampler = tiny_sampler("dit", steps=12)
    task = task_of(sampler, "step", "output", 1, 0.51)
    early = lambda step, kind, values: float(step < 6)  # noqa: E731  # what is left out late costs nothing
    assert np.flatnonzero(scheduled(task, early, "0").gates[:, 0]).tolist() == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(schedule, "_LONGEST", 1)  # and four times the mean: 8
    late = scheduled(task, early, "0").gates[:, 0]
    assert late.sum() == 6 and late[:5].all()
    monkeypatch.setattr(schedule, "_MOST_STEPS", 11)
    assert scheduled(task, early, "0") is None
