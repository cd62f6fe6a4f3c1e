"""Families beyond DiT and Stable Diffusion: what their blocks take and give, how often they are called, what that costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdfp_vllm.common.progress import stages
from sdfp_vllm.dipgo import apply_dipgo, load_plan
from sdfp_vllm.dipgo.descent import evenly
from sdfp_vllm.dipgo.families import is_listed, layout_of
from sdfp_vllm.dipgo.history import recalled
from sdfp_vllm.dipgo.job import SearchOptions, find
from sdfp_vllm.dipgo.layout import Layout, Stream, Unit
from sdfp_vllm.dipgo.quality import ssim
from sdfp_vllm.dipgo.refine import slides
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.sampling import Conditions, _with_negative
from sdfp_vllm.dipgo.signature import check_layout, traced
from sdfp_vllm.dipgo.supernet import SuperNet
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import Pattern, macs_of, task_of
from sdfp_vllm.errors import PlanError, SdfpError
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_pipelines import ALL_KINDS, tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import SEEDS, gates_of, make_plan

CHAINS = [kind for kind in ALL_KINDS if kind not in ("sd", "sdxl", "wan_21")]


def ways(sampler):
    return (
        [("block", "residual"), ("block", "output")]
        if sampler.layout("block").residual
        else [("block", "output")]
    )


@pytest.mark.parametrize("kind", CHAINS)
def test_a_listed_class_is_what_a_traced_call_says(kind):
    sampler = tiny_sampler(kind)
    assert is_listed(sampler.denoiser)
    read, listed = traced(sampler.denoiser, *sampler.first_call()), layout_of(sampler.denoiser, "block")
    assert {u.name: set(u.streams) for u in read.units} == {u.name: set(u.streams) for u in listed.units}
    assert [u.inputs for u in read.units] == [u.inputs for u in listed.units]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_u_nets_skips_are_what_a_call_reads(kind):
    sampler = tiny_sampler(kind)
    layout = layout_of(sampler.denoiser, "block")
    check_layout(layout, sampler.denoiser, *sampler.first_call())
    units = list(layout.units)
    units[-1] = units[-1].model_copy(update={"inputs": (len(units) - 2,)})  # without its skip connection
    with pytest.raises(SdfpError, match="reads more than its blocks' description says"):
        check_layout(Layout(tuple(units)), sampler.denoiser, *sampler.first_call())


def test_both_streams_of_a_block_are_reused_together():
    """What the block returns in each place is what went in by that name, and what it added in the call before."""
    sampler = tiny_sampler("flux")
    layout, block = sampler.layout("block"), sampler.denoiser.transformer_blocks[1]
    gates = np.ones((sampler.calls, 4), dtype=bool)
    gates[2, 1] = False
    seen = []
    with Skipping(sampler.denoisers, layout, gates, "residual", 0, sampler.rhythm):
        handle = block.register_forward_hook(lambda *call: seen.append(call[2:]), with_kwargs=True)
        sampler.latents(SEEDS)
        handle.remove()
    (before, given), (told, out) = seen[1], seen[2]
    text, image = "encoder_hidden_states", "hidden_states"
    assert torch.equal(out[0], told[text] + (given[0] - before[text]))
    assert torch.equal(out[1], told[image] + (given[1] - before[image]))
    assert out[0].shape != out[1].shape


def test_a_stream_that_ends_is_none_of_the_last_block():
    sampler = tiny_sampler("sd3")
    *others, last = sampler.layout("block").units
    assert last.streams == (Stream(argument="hidden_states", place=1),)
    assert all(len(u.streams) == 2 for u in others)
    gates = np.ones((sampler.calls, 3), dtype=bool)
    gates[2:4, 2] = False
    for order in (0, 1):
        with apply_dipgo(sampler.pipe, make_plan(sampler, gates, reuse="residual", order=order)):
            assert torch.isfinite(sampler.latents(SEEDS)).all()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_macs_are_those_of_a_whole_generation(kind):
    sampler = tiny_sampler(kind)
    layout = sampler.layout("block")
    macs = macs_of(sampler, layout)
    for gates in (np.ones((sampler.calls, len(layout.units)), bool), gates_of(sampler, layout, seed=1)):
        counter = FlopCounterMode(display=False)
        skipping = Skipping(sampler.denoisers, layout, gates, "output", 0, sampler.rhythm)
        with skipping, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            sampler.latents([5])
        # Of the denoisers alone: a scheduler multiplies a few matrices too.
        counted = sum(counter.get_flop_counts()[type(sampler.denoiser).__name__].values())
        assert macs.per_image(gates) == counted // 2


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_plan_of_every_family_is_read_back_and_runs_the_same(kind, tmp_path):
    sampler = tiny_sampler(kind)
    _, reuse = ways(sampler)[0]
    plan = make_plan(sampler, gates_of(sampler, sampler.layout("block")), reuse=reuse, order=1)
    with apply_dipgo(sampler.pipe, plan):
        expected = sampler.latents(SEEDS)
    assert load_plan(plan.save(tmp_path)) == plan
    again = tiny_sampler(kind)
    with apply_dipgo(again.pipe, tmp_path):
        assert torch.equal(again.latents(SEEDS), expected)
        assert torch.equal(again.latents(SEEDS), expected)  # a second generation starts afresh


# --- how often


def test_guidance_in_calls_of_its_own_has_a_history_for_each():
    sampler = tiny_sampler("qwen")
    assert sampler.rhythm.branches == 2 and sampler.rhythm.timesteps[0] == pytest.approx(1.0)
    gates = np.array([[True], [False], [True], [True], [True]])
    given = []
    with Skipping(sampler.denoisers, sampler.layout("step"), gates, "output", 0, sampler.rhythm):
        handle = sampler.denoiser.register_forward_hook(lambda *call: given.append(call[2][0].clone()))
        sampler.latents(SEEDS)
        handle.remove()
    assert len(given) == 2 * sampler.calls
    assert torch.equal(given[2], given[0]) and torch.equal(given[3], given[1])
    assert not torch.equal(given[0], given[1])


@pytest.mark.parametrize("planned", [True, False])
def test_more_or_fewer_calls_a_step_than_planned_are_refused(planned):
    sampler = tiny_sampler("qwen", guidance=3.0 if planned else 1.0)
    other = tiny_sampler("qwen", guidance=1.0 if planned else 3.0)
    assert {sampler.rhythm.branches, other.rhythm.branches} == {1, 2}
    refused = pytest.raises(SdfpError, match=r"denoiser calls? in step 0 where the plan has")
    with apply_dipgo(other.pipe, make_plan(sampler)), refused:
        other.latents(SEEDS)
    other.latents(SEEDS)


def test_calls_that_come_in_some_steps_only_are_refused():
    """SD3's skip-layer guidance."""
    layers = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.6}
    sampler = tiny_sampler("sd3")
    plan = make_plan(sampler)
    with pytest.raises(SdfpError, match=r"1 time\(s\) in step 0 and 2 in step 1.*skipped layers"):
        type(sampler)(sampler.pipe, sampler.conditions, 5, 3.0, **layers)
    sampler._arguments |= layers
    with (
        apply_dipgo(sampler.pipe, plan),
        pytest.raises(SdfpError, match="more than 1 denoiser call in step 1"),
    ):
        sampler.latents([1])


def test_experts_take_over_with_nothing_of_each_other():
    sampler = tiny_sampler("wan", steps=8)
    rhythm = sampler.rhythm
    assert rhythm.denoisers == ("transformer", "transformer_2") and rhythm.branches == 2
    change = rhythm.stages[1]
    assert 1 < change < 7
    gates = np.zeros((8, 3), dtype=bool)
    gates[list(rhythm.stages)] = True
    plan = make_plan(sampler, gates, reuse="residual")
    ran = dict.fromkeys(rhythm.denoisers, 0)
    for name in ran:
        getattr(sampler.pipe, name).blocks[1].attn1.register_forward_hook(
            lambda *_, name=name: ran.update({name: ran[name] + 1})
        )
    with apply_dipgo(sampler.pipe, plan):
        sampler.latents(SEEDS)
    assert ran == {"transformer": 2, "transformer_2": 2}  # one step of each, with two calls
    closed = gates.copy()
    closed[change, 1] = False
    with pytest.raises(ValueError, match="first call must run every unit"):
        make_plan(sampler, closed)
    task = task_of(sampler, "block", "residual", 0, 0.6)
    assert evenly(task)[change].all() and task.fits(evenly(task))
    assert all(
        p.gates[[0, change]].all()
        for p in slides(Pattern.of(gates_of(sampler, task.layout), "0"), rhythm.stages)
    )
    assert not recalled([True] * change + [True, False], 1, rhythm.stages)[change + 1, :change].any()


def test_another_boundary_and_a_missing_expert_are_refused():
    sampler = tiny_sampler("wan")
    plan = make_plan(sampler)
    with apply_dipgo(sampler.pipe, plan):
        sampler.pipe.register_to_config(boundary_ratio=0.3)
        with pytest.raises(SdfpError, match="change over at another step"):
            sampler.latents(SEEDS)
    with pytest.raises(PlanError, match="2 denoisers in the plan but 1 in the pipeline"):
        apply_dipgo(tiny_sampler("wan_21").pipe, plan)


def test_another_size_is_another_schedule():
    """Flux shifts its timesteps by the size of the image."""
    sampler = tiny_sampler("flux")
    with apply_dipgo(sampler.pipe, make_plan(sampler)):
        sampler.latents([1])
        sampler._arguments |= {"height": 32, "width": 32}
        with pytest.raises(SdfpError, match="the timesteps differ"):
            sampler.latents([1])


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_half_precision_rounds_timesteps_and_keeps_the_plan(kind):
    sampler = tiny_sampler(kind, steps=12)
    plan = make_plan(sampler, gates_of(sampler, sampler.layout("block")), reuse="residual", order=1)
    sampler.pipe.to(torch.bfloat16)
    values = sampler.conditions.values
    values.update({k: v.bfloat16() for k, v in values.items() if v.is_floating_point()})
    with apply_dipgo(sampler.pipe, plan):
        assert torch.isfinite(sampler.latents(SEEDS)).all()


# --- the search


@pytest.mark.parametrize("kind", ["flux", "qwen", "wan", "cogvideox"])
def test_the_supernet_is_the_pipeline_and_its_hard_gates_the_runtime(kind):
    sampler = tiny_sampler(kind)
    layout = sampler.layout("block")
    gates = gates_of(sampler, layout, share=0.6)
    with SuperNet(sampler, layout, "output") as net, torch.no_grad():
        full = net.latents(SEEDS, torch.ones(gates.shape))
    with SuperNet(sampler, layout, "residual") as net, torch.no_grad():
        searched = net.latents(SEEDS, torch.tensor(gates, dtype=torch.float32))
    assert torch.equal(full, sampler.latents(SEEDS))
    with Skipping(sampler.denoisers, layout, gates, "residual", 0, sampler.rhythm), torch.no_grad():
        torch.testing.assert_close(searched, sampler.latents(SEEDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.usefixtures("latents_seen")
def test_the_prediction_is_exact_in_the_last_step(kind):
    """There the latents are linear in the prediction, whatever the scheduler and however many calls."""
    sampler = tiny_sampler(kind)
    task = task_of(sampler, "step", "output", 0, 1.0)
    with torch.no_grad():
        full = sampler.latents(SEEDS)
    surrogate = record(sampler, task.layout, "output", 0, SEEDS, 3)
    gates = np.ones((sampler.calls, 1), dtype=bool)
    assert surrogate.loss(gates) == 0
    gates[-1] = False
    draw = torch.Generator().manual_seed(SEEDS[0])
    moved = task.run(gates, SEEDS) - full
    real = np.concatenate(
        [(moved * torch.randn(full.shape, generator=draw)).flatten(1).sum(1).numpy() for _ in range(3)]
    )
    if kind == "qwen":  # it scales guided predictions to a norm
        assert surrogate.loss(gates) == pytest.approx((real**2).mean(), rel=0.5)
    else:
        assert surrogate.loss(gates) == pytest.approx((real**2).mean(), rel=2e-3)


@pytest.mark.parametrize("kind", ["wan", "flux"])
@pytest.mark.parametrize("method", ["fisher", "learned"])
def test_a_search_keeps_to_the_budget_and_to_first_steps(kind, method):
    sampler = tiny_sampler(kind)
    options = SearchOptions(
        steps=5, budget=0.7, method=method, images=1, projections=1, rounds=1, iterations=2, consistency="latents",
        granularity="block",
    )  # fmt: skip
    with stages(None) as progress:
        found = find(sampler, options, progress)
    assert found.task.macs.share(found.gates) <= 0.7 + 0.0125
    assert found.gates[list(sampler.rhythm.stages)].all()


def test_a_flow_scheduler_with_one_call_a_step_reads_as_before():
    sampler = tiny_sampler("sd3", schedule=FlowMatchEulerDiscreteScheduler(shift=2.0))
    plan = make_plan(sampler)
    old = plan.model_copy(
        update={"calls": None, "units": [Unit(name=u.name, inputs=u.inputs) for u in plan.units]}
    )
    full = sampler.latents(SEEDS)
    with apply_dipgo(sampler.pipe, old.model_copy(update={"reuse": "residual"})):
        assert torch.equal(sampler.latents(SEEDS), full)


def test_flux_with_a_negative_prompt_is_called_twice_a_step():
    sampler = tiny_sampler("flux")
    values = sampler.conditions.values
    negative = {f"negative_{name}": -v for name, v in values.items()}
    both = type(sampler)(
        sampler.pipe, Conditions(values | negative), 5, 3.0, true_cfg_scale=2.0, **sampler._given
    )
    assert both.rhythm.branches == 2
    full = both.latents(SEEDS)
    assert not torch.equal(full, sampler.latents(SEEDS))
    with apply_dipgo(both.pipe, make_plan(both, reuse="residual")):
        assert torch.equal(both.latents(SEEDS), full)
    assert macs_of(both, both.layout("block")).rest > 1.9 * macs_of(sampler, sampler.layout("block")).rest


@pytest.mark.usefixtures("latents_seen")
def test_a_forecast_of_an_expert_takes_no_line_from_the_other():
    """The second expert begins in the step before last, so in the last one there is one value of its own."""
    sampler = tiny_sampler("wan")
    sampler.pipe.register_to_config(boundary_ratio=0.67)
    sampler = sampler.with_steps(5)
    assert sampler.rhythm.stages == (0, 3)
    task = task_of(sampler, "step", "output", 1, 1.0)
    with torch.no_grad():
        full = sampler.latents(SEEDS)
    surrogate = record(sampler, task.layout, "output", 1, SEEDS, 3)
    gates = np.ones((5, 1), dtype=bool)
    gates[-1] = False
    moved = task.run(gates, SEEDS) - full
    draw = torch.Generator().manual_seed(SEEDS[0])
    real = np.concatenate(
        [(moved * torch.randn(full.shape, generator=draw)).flatten(1).sum(1).numpy() for _ in range(3)]
    )
    assert surrogate.loss(gates) == pytest.approx((real**2).mean(), rel=2e-3)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"num_layers": 2}, "has other blocks in transformer and transformer_2"),
        ({"ffn_dim": 64}, "different sizes"),
    ],
)
def test_experts_that_are_not_alike_are_refused(second, reason):
    sampler = tiny_sampler("wan")
    sampler.pipe.transformer_2 = type(sampler.denoiser).from_config({**sampler.denoiser.config, **second})
    with pytest.raises(SdfpError, match=reason):
        task_of(sampler.with_steps(5), "block", "residual", 0, 0.6)


def test_a_decoder_that_is_told_a_timestep():
    sampler = tiny_sampler("ltx")
    config = {**sampler.pipe.vae.config, "timestep_conditioning": True}
    sampler.pipe.vae = type(sampler.pipe.vae).from_config(config)
    again = sampler.with_steps(5)
    latents = again.latents(SEEDS)
    videos = again.decode(torch.cat([latents, latents]))
    assert len(videos) == 4 and videos.dim() == 5
    assert ssim(videos, videos).tolist() == pytest.approx([1.0] * 4)


def test_a_prompt_of_qwen_image_comes_with_a_negative_one():
    """Without one it is not guided at all."""
    assert set(_with_negative(tiny_sampler("qwen").pipe, ["a fox"])) == {"prompt", "negative_prompt"}
    assert set(_with_negative(tiny_sampler("flux").pipe, ["a fox"])) == {"prompt"}
