"""Guidance as a unit: the half of the batch without the condition is told from the other, by a difference that is reused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdfp_vllm.common.progress import stages
from sdfp_vllm.dipgo import apply_dipgo, load_plan
from sdfp_vllm.dipgo.job import SearchOptions, find
from sdfp_vllm.dipgo.options import check
from sdfp_vllm.dipgo.plan import DipgoPlan
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.signature import check_layout
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import macs_of, task_of
from sdfp_vllm.errors import SdfpError
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import make_plan
from tests.unit.dipgo.test_dipgo_search import SEEDS, projected

MORE = ("pixart", "sdxl", "sana", "hunyuan", "cogvideox", "ltx")
KINDS = ["dit", "sd", "sd3", *(pytest.param(kind, marks=pytest.mark.more) for kind in MORE)]
GATES = np.array([[1, 1], [1, 1], [0, 1], [0, 0], [1, 1]], dtype=bool)  # all, all, the half, nothing, all


def batches(sampler):
    """The rows of each call that computes, as the first layer of a block or so sees them."""
    rows = []
    inner = next(m for m in sampler.denoiser.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    return rows, inner.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_or_nothing_runs_where_the_plan_says_so(kind, tmp_path):
    sampler = tiny_sampler(kind)
    full = sampler.latents(SEEDS)
    with apply_dipgo(sampler.pipe, make_plan(sampler, granularity="guidance")):
        assert torch.equal(sampler.latents(SEEDS), full)
    plan = make_plan(sampler, GATES, "guidance")
    assert load_plan(plan.save(tmp_path)) == plan
    rows, handle = batches(sampler)
    with apply_dipgo(sampler.pipe, tmp_path):
        skipped = sampler.latents(SEEDS)
        whole = rows[0]
        assert [r for r in rows if r in (whole, whole // 2)] == [whole, whole, whole // 2, whole]
        assert torch.equal(sampler.latents(SEEDS), skipped)  # a second generation starts afresh
    handle.remove()
    assert torch.isfinite(skipped).all() and not torch.equal(skipped, full)
    assert torch.equal(sampler.latents(SEEDS), full)


@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_the_other_half_differs_by_what_it_did_before(kind):
    sampler = tiny_sampler(kind)
    given = []
    gates = np.ones_like(GATES)
    gates[2, 0] = False
    with Skipping(sampler.denoisers, sampler.layout("guidance"), gates, "output", 0, sampler.rhythm):
        handle = sampler.denoiser.register_forward_hook(lambda *call: given.append(call[2][0].clone()))
        sampler.latents(SEEDS)
        handle.remove()
    first, second = (torch.stack(half) for half in zip(*(g.chunk(2) for g in given), strict=True))
    kept, other = (
        (first, second) if kind == "dit" else (second, first)
    )  # the condition is first in DiT's batch
    assert torch.equal(other[2], kept[2] + (other[1] - kept[1]))
    assert not torch.equal(kept[2], kept[1])


@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_macs_are_those_of_a_whole_generation(kind):
    sampler = tiny_sampler(kind)
    layout = sampler.layout("guidance")
    counter = FlopCounterMode(display=False)
    skipping = Skipping(sampler.denoisers, layout, GATES, "output", 0, sampler.rhythm)
    with skipping, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        sampler.latents([5])
    counted = sum(counter.get_flop_counts()[type(sampler.denoiser).__name__].values())
    macs = macs_of(sampler, layout)
    assert macs.per_image(GATES) == counted // 2
    assert macs.share(GATES) == pytest.approx(3.5 / 5)


@pytest.mark.parametrize("kind", ["dit", "sd"])
@pytest.mark.parametrize("closed", [[0], [0, 1]])
@pytest.mark.usefixtures("latents_seen")
def test_the_prediction_is_exact_where_the_generation_is_linear(kind, closed):
    sampler = tiny_sampler(kind)
    task = task_of(sampler, "guidance", "output", 0, 1.0)
    full = sampler.latents(SEEDS)
    surrogate = record(sampler, task.layout, "output", 0, SEEDS, 3)
    gates = np.ones((sampler.calls, 2), dtype=bool)
    assert surrogate.loss(gates) == 0
    gates[-1, closed] = False
    real = projected(sampler, task.run(gates, SEEDS), full, 3)
    assert surrogate.loss(gates) == pytest.approx((real**2).mean(), rel=1e-2) and (real**2).mean() > 0


@pytest.mark.usefixtures("latents_seen")
def test_the_prediction_holds_near_the_recorded_generation():
    sampler = tiny_sampler("dit")
    task = task_of(sampler, "guidance", "output", 0, 1.0)
    full = sampler.latents(SEEDS)
    surrogate = record(sampler, task.layout, "output", 0, SEEDS, 3, GATES, full)
    real = projected(sampler, task.run(GATES, SEEDS), full, 3)
    assert surrogate.loss(GATES) == pytest.approx((real**2).mean(), rel=1e-3)


def test_a_search_chooses_between_halves_and_steps():
    sampler = tiny_sampler("dit", steps=6)
    full = sampler.latents(SEEDS)
    options = SearchOptions(steps=6, granularity="guidance", budget=0.6, images=2, projections=2, rounds=1)
    with stages(None) as progress:
        found = find(sampler, options, progress)
    assert found.granularity == "guidance" and found.task.reuse == "output" and found.task.fits(found.gates)
    assert not (found.gates[:, 0] & ~found.gates[:, 1]).any()  # of a step that is reused no half runs
    assert torch.equal(sampler.latents(SEEDS), full)  # nothing of the search is left on the denoiser


@pytest.mark.parametrize("kind, guidance", [("flux", 3.0), ("qwen", 3.0), ("dit", 1.0), ("sd", 1.0)])
def test_pipelines_without_guidance_in_one_batch_are_refused(kind, guidance):
    with pytest.raises(SdfpError, match="--granularity guidance: is for pipelines that ask"):
        tiny_sampler(kind, guidance=guidance).layout("guidance")


def test_what_goes_not_with_guidance_is_refused():
    with pytest.raises(SdfpError, match="is not for the learned search"):
        check(SearchOptions(granularity="guidance", method="learned"))
    with pytest.raises(SdfpError, match="guidance reuses outputs"):
        check(SearchOptions(granularity="guidance", reuse="residual"))


def test_a_generation_that_is_not_guided_by_half_of_its_batch_is_refused():
    """Half of it would be told from other people's images."""
    plan = make_plan(tiny_sampler("sd"), GATES, "guidance")
    for seeds in ([1], [1, 2], [1, 2, 3]):
        other = tiny_sampler("sd", guidance=1.0)
        with apply_dipgo(other.pipe, plan), pytest.raises(SdfpError, match="is not guided by a second half"):
            other.latents(seeds)
        other.latents(seeds)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"executed": ["11", "11", "10", "01", "11"]},
            "a step that reuses the whole network runs no half of it",
        ),
        ({"granularity": "step"}, "guidance goes with granularity guidance"),
        ({"granularity": "block"}, "guidance goes with granularity guidance"),
    ],
)
def test_a_plan_whose_halves_cannot_be_is_refused(changes, says):
    plan = make_plan(tiny_sampler("sd"), GATES, "guidance")
    with pytest.raises(ValueError, match=says):
        DipgoPlan(**(plan.model_dump() | changes))


def test_a_described_half_is_refused():
    sampler = tiny_sampler("sd")
    with pytest.raises(SdfpError, match=r"layout: units\[0\].guidance: is no block"):
        check_layout(sampler.layout("guidance"), sampler.denoiser, *sampler.first_call())
