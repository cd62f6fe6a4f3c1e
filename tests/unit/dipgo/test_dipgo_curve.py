"""The search for one budget or several: more of it never ends worse, a larger budget neither, and what fits few images is not believed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sdfp_vllm.common.progress import stages
from sdfp_vllm.dipgo import curve
from sdfp_vllm.dipgo.curve import JUDGE, Ended, find_curve, without_dips
from sdfp_vllm.dipgo.descent import greedy, path
from sdfp_vllm.dipgo.job import SearchOptions, find
from sdfp_vllm.dipgo.layout import Layout, Stream, Unit
from sdfp_vllm.dipgo.macs import MacCount
from sdfp_vllm.dipgo.prediction import Surrogate
from sdfp_vllm.dipgo.quality import psnr
from sdfp_vllm.dipgo.refine import Reference, likeness
from sdfp_vllm.dipgo.surrogate import _weights, record, seen
from sdfp_vllm.dipgo.task import Pattern, task_of
from tests.support.tiny_pipelines import tiny_sampler

STEPS = 6
OPTIONS = SearchOptions(steps=STEPS, budget=0.5, images=2, projections=2, rounds=1)


def judged(sampler, found):
    """PSNR in dB on the images that decide in a search."""
    judges = Reference.of(sampler, [JUDGE + i for i in range(6 * OPTIONS.images)])
    kinds = found.forecasts
    pattern = Pattern.of(found.gates, str(found.task.order)) if kinds is None else Pattern(found.gates, kinds)
    return likeness(found.task, pattern, judges).mean().item()


def test_more_rounds_never_end_worse():
    ends = []
    for rounds in (0, 1, 3):
        sampler = tiny_sampler("dit", steps=STEPS)
        with stages(None) as progress:
            options = replace(OPTIONS, rounds=rounds, granularity="branch")
            ends.append(judged(sampler, find(sampler, options, progress)))
    assert ends == sorted(ends)


def test_a_larger_budget_never_ends_worse():
    sampler = tiny_sampler("dit", steps=STEPS)
    budgets = [0.4, 0.8, 0.6, 0.5]
    with stages(None) as progress:
        found = find_curve(sampler, replace(OPTIONS, rounds=0), budgets, progress)
    assert [f.task.budget for f in found] == sorted(budgets, reverse=True)
    assert all(f.task.fits(f.gates) for f in found)
    ends = [judged(sampler, f) for f in found]
    assert ends == sorted(ends, reverse=True)


def test_what_a_smaller_budget_ended_with_takes_the_place_of_what_is_less_near():
    task = task_of(tiny_sampler("dit", steps=STEPS), "step", "output", 0, 0.8)
    ends = [
        Ended("step", replace(task, budget=budget), Pattern.of(np.ones((STEPS, 1), dtype=bool), kind), torch.tensor([db]))
        for budget, kind, db in ((0.8, "0", 40.0), (0.6, "1", 30.0), (0.5, "2", 35.0), (0.4, "h", 20.0))
    ]  # fmt: skip
    kept = without_dips(ends)
    assert [e.reached.item() for e in kept] == [40.0, 35.0, 35.0, 20.0]
    assert [e.task.budget for e in kept] == [0.8, 0.6, 0.5, 0.4]
    assert kept[1].pattern is ends[2].pattern


def test_a_refinement_that_only_fits_its_own_seeds_is_rejected(monkeypatch):
    sampler = tiny_sampler("dit", steps=STEPS)
    misled = []

    def refine(task, pattern, recorded, compare, *_):
        # As if it were far the best on the images that it was compared on.
        gates = np.zeros_like(pattern.gates)
        gates[0] = True
        misled.append(Pattern.of(gates, "0"))
        return [pattern, misled[-1]]

    monkeypatch.setattr(curve, "refine", refine)
    with stages(None) as progress:
        found = find(sampler, OPTIONS, progress)
    assert misled and not any(
        (found.gates == p.gates).all() for p in misled if p.gates.shape == found.gates.shape
    )


def chain(units=4):
    streams = (Stream(argument="hidden_states", place=0),)
    return Layout(
        tuple(Unit(name=f"b{i}", inputs=(i - 1,) if i else (), streams=streams) for i in range(units))
    )


class FewProjections:
    """Independent errors of all gates, seen through few projections; `truth` sees them through many."""

    def __init__(self, seed, seen=8, many=2000, steps=12, units=6):
        draw = np.random.default_rng(seed)
        self.layout = chain(units)
        sampler = tiny_sampler("dit", steps=steps)
        task = task_of(sampler, "block", "residual", 0, 1.0)
        self.task = replace(
            task,
            layout=self.layout,
            macs=(macs := MacCount(units=[1] * units, rest=0)),
            cost=macs,
            budget=0.5,
        )
        # The size of a gate's error, which is the same in every projection, and its sign and share, which are not.
        size = np.exp(draw.standard_normal((units, steps)))
        self.tables = []
        for count in (seen, many):
            table = np.zeros((count, units, steps, steps))
            for t in range(steps):
                table[:, :, t, t] = draw.standard_normal((count, units)) * size[:, t]
            self.tables.append(table)
        self.steps, self.units = steps, units

    def surrogate(self, which, caution=0.0):
        table = self.tables[which]
        everything = np.ones((self.steps, self.units), dtype=bool)
        return Surrogate(
            table, self.layout, "residual", 0, everything, np.zeros(len(table)), (0,), caution=caution
        )


def test_caution_keeps_the_search_from_errors_that_cancel_on_few_projections_only():
    true = {0.0: [], 0.5: []}
    for seed in range(6):
        case = FewProjections(seed)
        truth = case.surrogate(1)
        for caution, losses in true.items():
            surrogate = case.surrogate(0, caution)
            pattern = greedy(case.task, surrogate)
            pattern = [pattern, *path(case.task, surrogate, pattern)][-1]
            assert case.task.fits(pattern.gates)
            losses.append(truth.loss(pattern.gates, pattern.kinds))
    assert np.mean(true[0.5]) < 0.9 * np.mean(true[0.0])


def test_an_image_that_errs_much_counts_as_one_that_errs_little():
    draw = np.random.default_rng(0)
    size = np.array([1.0, 10.0, 0.0])[:, None, None, None]  # the last image moves by nothing
    one = draw.standard_normal((3, 2, 4, 4)) * size
    weights = _weights([one, -one], projections=2)
    assert weights.tolist()[:3] == weights.tolist()[3:]
    own = (np.diagonal(one, -1, axis1=-2, axis2=-1) - np.diagonal(one, 0, axis1=-2, axis2=-1)[..., 1:]) ** 2
    assert weights[0] * own[0].mean() == pytest.approx(weights[1] * own[1].mean())
    assert weights[2] == pytest.approx(1000 * weights[1])  # and is no division by nothing
    assert (_weights([np.zeros((3, 2, 4, 4))], projections=1) == 1).all()


def test_what_is_beyond_the_range_of_images_hardly_counts():
    sampler = tiny_sampler("dit", steps=2)
    latents = torch.tensor([0.5, 0.6, 2.0, 3.0, -3.0]).reshape(1, 1, 1, 5)
    images = seen(sampler, latents)
    assert images.flatten().tolist() == pytest.approx([0.5, 0.6, 1.1, 1.2, -1.2])
    assert torch.equal(psnr(images, latents * 0), psnr(latents, latents * 0))


@pytest.mark.parametrize("kinds", ["1", "01h"])
def test_the_best_swap_is_the_best_of_all_swaps(kinds):
    sampler = tiny_sampler("dit", steps=5)
    task = task_of(sampler, "block", "residual", 1, 0.7)
    surrogate = record(sampler, task.layout, "residual", 1, [21, 22], 2)
    gates = np.ones((5, 3), dtype=bool)
    gates[1:3] = False
    start = Pattern.of(gates, "1")
    assert task.fits(gates)
    trials = []
    for t, i in np.argwhere(~gates):
        for s, j in [(None, None), *((s, j) for s, j in np.argwhere(gates) if s)]:
            for kind in kinds:
                trial = Pattern(gates.copy(), start.kinds.copy())
                trial.gates[t, i] = True
                if s is not None:
                    trial.gates[s, j], trial.kinds[s, j] = False, kind
                if task.fits(trial.gates):
                    trials.append(surrogate.loss(trial.gates, trial.kinds))
    (best,) = path(task, surrogate, start, kinds, swaps_at_most=1)
    chosen = surrogate.loss(best.gates, best.kinds)
    assert min(trials) < surrogate.loss(gates, start.kinds)
    # After a swap forecasts are chosen again, where there is a choice.
    assert chosen == pytest.approx(min(trials)) if kinds == "1" else chosen <= min(trials)
