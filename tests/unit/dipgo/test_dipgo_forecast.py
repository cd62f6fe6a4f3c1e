"""Forecasts of values that are not computed: TaylorSeer's and HiCache's, predicted from the table and chosen gate by gate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState

from sdfp_vllm.dipgo import apply_dipgo, job, load_plan
from sdfp_vllm.dipgo.forecast import KINDS, coefficients
from sdfp_vllm.dipgo.history import History, recalled
from sdfp_vllm.dipgo.job import SearchOptions, search
from sdfp_vllm.dipgo.plan import forecast_rows
from sdfp_vllm.dipgo.quality import psnr
from sdfp_vllm.dipgo.refine import Reference, surest
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import Pattern, task_of
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import SEEDS, gates_of, make_plan


def taylorseer(values: dict[int, torch.Tensor], step: int, order: int) -> torch.Tensor:
    """What diffusers' TaylorSeer gives at `step` after `values` at earlier steps."""
    state = TaylorSeerState(torch.float64, max_order=order)
    for at, value in values.items():
        state.current_step = at
        state.update((value,))
    state.current_step = step
    return state.predict()[0]


@pytest.mark.parametrize("steps", [(0, 1, 2), (0, 3, 4), (1, 2, 7), (0, 2)])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylor_is_taylorseers(steps, order):
    values = {s: torch.randn(3, dtype=torch.float64) for s in steps}
    history = History(order)
    for at, value in values.items():
        history.store(at, (value, None))
    later = steps[-1] + 2
    recalled_value, nothing = history.recall(later)
    torch.testing.assert_close(recalled_value, taylorseer(values, later, order))
    assert nothing is None


def test_hermite_is_hicaches():
    # c = 0.5: h1 = 0.5 * 2 * 0.5 k; h2 = 0.25 * (4 * 0.25 k^2 - 2). Steps 0, 1, 2 and k = 2.
    h1, h2 = 1.0, 0.25 * (4.0 - 2.0)
    f = [torch.tensor(v, dtype=torch.float64) for v in (5.0, 2.0, 3.0)]  # latest first
    history = History(2)
    for at, value in zip((0, 1, 2), reversed(f), strict=True):
        history.store(at, value)
    assert history.recall(4, "h") == 5 + h1 * 3
    assert history.recall(4, "H") == 5 + h1 * 3 + h2 / 2 * (3 - -1)


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_are_those_of_the_history(kind):
    for computed in ([4], [4, 2], [4, 2, 1]):
        numbers = coefficients(kind, 6, computed)
        assert sum(numbers) == pytest.approx(1)
        values = dict(zip(computed, (2.0, 7.0, -3.0), strict=False))
        history = History(2)
        for at in sorted(computed):
            history.store(at, torch.tensor(values[at], dtype=torch.float64))
        expected = sum(c * values[s] for c, s in zip(numbers, computed, strict=False))
        assert history.recall(6, kind).item() == pytest.approx(expected)


def test_every_gate_keeps_as_many_values_as_its_kind_takes():
    taken = recalled([True, True, True, False, True, False], 0, (0,), ["0", "0", "0", "2", "0", "h"])
    assert taken[3].tolist() == [True, True, True, False, False, False]
    assert taken[5].tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("latents_seen")
def test_the_prediction_of_a_forecast_is_exact_where_the_generation_is_linear(kind):
    sampler = tiny_sampler("dit")
    task = task_of(sampler, "step", "output", 0, 1.0)
    full = sampler.latents(SEEDS)
    surrogate = record(sampler, task.layout, "output", 0, SEEDS, 3)
    gates = np.ones((sampler.calls, 1), dtype=bool)
    gates[-1] = False
    kinds = np.full(gates.shape, kind)
    moved = task.run(gates, SEEDS, kinds) - full
    draw = torch.Generator().manual_seed(SEEDS[0])
    real = np.concatenate(
        [(moved * torch.randn(full.shape, generator=draw)).flatten(1).sum(1).numpy() for _ in range(3)]
    )
    assert surrogate.loss(gates, kinds) == pytest.approx((real**2).mean(), rel=2e-3)


def test_what_is_chosen_is_predicted_no_worse_than_any_one_kind_and_none_alone_would_be_better():
    sampler = tiny_sampler("flux", steps=8)
    task = task_of(sampler, "block", "residual", 1, 1.0)
    surrogate = record(sampler, task.layout, "residual", 1, SEEDS, 4)
    gates = gates_of(sampler, task.layout, seed=2)
    kinds = surrogate.choose_kinds(gates, sweeps=50)
    loss = surrogate.loss(gates, kinds)
    assert loss < min(surrogate.loss(gates, np.full(gates.shape, kind)) for kind in KINDS)
    for place in np.argwhere(~gates):
        for kind in KINDS:
            other = kinds.copy()
            other[tuple(place)] = kind
            assert surrogate.loss(gates, other) >= loss * (1 - 1e-9)
    assert len(set(kinds[~gates].tolist())) > 1


def test_a_plan_says_each_forecast_and_runs_it(tmp_path):
    sampler = tiny_sampler("sd3", steps=8)
    layout = sampler.layout("block")
    gates = gates_of(sampler, layout, seed=2)
    kinds = np.random.default_rng(0).choice(list(KINDS), gates.shape)
    task = task_of(sampler, "block", "residual", 0, 1.0)
    plan = make_plan(sampler, gates, reuse="residual", forecasts=forecast_rows(gates, kinds))
    loaded = load_plan(plan.save(tmp_path))
    assert loaded == plan and loaded.forecasts[0] == "..."
    with apply_dipgo(sampler.pipe, loaded):
        made = sampler.latents(SEEDS)
    assert torch.equal(made, task.run(gates, SEEDS, kinds))
    assert not torch.equal(made, task.run(gates, SEEDS))
    with pytest.raises(ValueError, match="a letter for every gate that executed closes"):
        make_plan(sampler, gates, reuse="residual", forecasts=["..."] * 8)


def test_forecasts_are_taken_only_if_they_are_surely_better():
    sampler = tiny_sampler("dit", steps=8)
    task = task_of(sampler, "step", "output", 0, 1.0)
    gates = np.ones((8, 1), dtype=bool)
    gates[3:] = False  # so far ahead a parabola goes astray
    judges = Reference.of(sampler, [31, 32, 33, 34])
    last, parabola = Pattern.of(gates, "0"), Pattern.of(gates, "2")
    assert surest(task, [last, parabola], judges)[0] is last
    assert surest(task, [parabola, last], judges)[0] is last


def test_a_plans_quality_is_that_of_its_forecasts(tmp_path, monkeypatch):
    folder = tmp_path / "dit"
    tiny_sampler("dit").pipe.save_pretrained(folder)
    found = job.find_each

    def foretold(*arguments):
        return [replace(each, forecasts=np.full(each.gates.shape, "H")) for each in found(*arguments)]

    monkeypatch.setattr(job, "find_each", foretold)
    options = SearchOptions(
        steps=6, budget=0.6, granularity="block", images=1, projections=1, rounds=0, test_images=2
    )
    plan = search(folder, options, tmp_path / "plan.json")
    assert set("".join(plan.forecasts)) == {".", "H"}
    pipe = job.load_pipeline(folder)
    sampler = Sampler(pipe, load_conditions(pipe, folder), 6, options.guidance_scale)
    seeds = [3_000_000, 3_000_001]
    with torch.no_grad():
        full = sampler.decode(sampler.latents(seeds))
        with apply_dipgo(pipe, plan):
            made = sampler.decode(sampler.latents(seeds))
    assert plan.quality.psnr == pytest.approx(psnr(made, full).mean().item())
