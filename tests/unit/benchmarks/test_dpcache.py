"""DPCache's dynamic programme finds the optimum, and what it is given is what forecasts err by."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from benchmarks.rivals.dpcache import (
    KINDS,
    NORMS,
    cost_tensor,
    listening,
    path_cost,
    recorded,
    search,
)
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.dipgo.schedule import best_path
from sdfp_vllm.dipgo.task import task_of
from tests.toy.digits.pipelines import digits_folder, digits_pipeline

STEPS = 8


def random_cost(seed: int) -> np.ndarray:
    """Costs of any three steps in order; no other are possible."""
    h, i, j = np.ogrid[: STEPS + 2, : STEPS + 2, : STEPS + 2]
    return np.where((h < i) & (i < j), np.random.default_rng(seed).random((STEPS + 2,) * 3), np.inf)


def enumerated(cost: np.ndarray, count: int, first_full: int = 1) -> list[int]:
    """The cheapest of all schedules, looked at one by one."""
    first = tuple(range(first_full))
    rest = combinations(range(first_full, STEPS), count - first_full)
    return list(min((first + r for r in rest), key=lambda steps: path_cost(cost, steps)))


@pytest.mark.parametrize("first_full", [1, 3])
@pytest.mark.parametrize("count", range(3, STEPS + 1))
def test_the_programme_finds_what_enumeration_finds(count, first_full):
    for seed in range(20):
        found = best_path(random_cost(seed), count, range(first_full))
        assert found == enumerated(random_cost(seed), count, first_full)
        assert len(found) == count and found[:first_full] == list(range(first_full))


@pytest.mark.parametrize("count", [1, 2])
def test_the_shortest_schedules(count):
    for seed in range(20):
        assert best_path(random_cost(seed), count) == enumerated(random_cost(seed), count)


def test_a_table_of_two_steps_would_miss_it():
    """The same programme on costs without what was computed before: so the tensor's third axis is used, and the test above sees it."""
    missed = 0
    for seed in range(20):
        cost = random_cost(seed)
        possible = np.isfinite(cost)
        mean = np.where(possible, cost, 0).sum(0) / np.maximum(possible.sum(0), 1)
        flat = np.where(possible, mean, np.inf)
        missed += best_path(flat, 4) != enumerated(cost, 4)
    assert missed > 10


def test_what_forecasts_err_by():
    line = torch.arange(6.0)[:, None].expand(6, 3) * 2  # each step 2 more than the one before
    last, straight = (cost_tensor(line, kind, NORMS["absolute"]) for kind in "01")
    for h, i, j in combinations(range(6), 3):
        assert straight[h + 1, i + 1, j + 1] == pytest.approx(0, abs=1e-5)
        assert last[h + 1, i + 1, j + 1] == pytest.approx(sum(2 * (t - i) for t in range(i + 1, j)))
    assert straight[0, 1, 4] == pytest.approx(2 + 4)  # with one value there is no line to go on in
    assert np.isinf(last[0, 2:]).all() and np.isinf(last[3, 2]).all()
    assert best_path(straight, 2) == [0, 1]
    assert best_path(last, 3) == [0, 2, 4]
    squared = cost_tensor(line, "0", NORMS["squared"])
    assert squared[0, 1, 3] == pytest.approx(4) and squared[0, 1, 4] == pytest.approx(4 + 16)


@pytest.fixture(scope="module")
def sampler():
    pipe = digits_pipeline("dit")
    return Sampler(pipe, load_conditions(pipe, digits_folder("dit")), 6, 2.0)


@pytest.mark.parametrize(("granularity", "reuse"), [("step", "output"), ("block", "residual")])
def test_what_is_recorded_is_what_is_reused(sampler, granularity, reuse):
    """In a step that is skipped, the runtime passes on what was recorded of the step before."""
    task = task_of(sampler, granularity, reuse, 0, 1.0)
    full = recorded(task, [1, 2])
    gates = np.ones((6, len(task.layout.units)), dtype=bool)
    gates[1] = False
    noted: list[torch.Tensor] = []
    with listening(task, noted.append):
        task.run(gates, [1, 2])
    skipped = torch.stack(noted).flatten(1)
    assert torch.allclose(skipped[1], full[0], atol=1e-5) and torch.equal(skipped[0], full[0])
    assert not torch.allclose(full[1], full[0], atol=1e-3)


def test_schedules_for_budgets(sampler):
    tasks = [task_of(sampler, "step", "output", 0, 1.0), task_of(sampler, "block", "residual", 0, 1.0)]
    half, third = search(tasks, (0.5, 0.34), 0.005, [1, 2])
    for schedule, count in ((half, 3), (third, 2)):
        runs = schedule.gates.any(1)
        assert runs.sum() == count and runs[0]
        assert (schedule.gates == runs[:, None]).all()  # whole steps
        assert set(schedule.forecasts.flat) <= set(KINDS)
        assert schedule.task.macs.share(schedule.gates) <= (0.5 if count == 3 else 0.34) + 0.005
