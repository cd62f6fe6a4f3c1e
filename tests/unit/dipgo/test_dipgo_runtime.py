"""The runtime: exact with nothing skipped and after removal, units really not executed, values as documented."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from sdfp_vllm.dipgo import apply_dipgo
from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.fingerprint import pipeline_fingerprint
from sdfp_vllm.dipgo.history import History
from sdfp_vllm.dipgo.plan import DipgoPlan, Provenance, rows
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.task import macs_of
from sdfp_vllm.errors import SdfpError
from tests.support.tiny_pipelines import ALL_KINDS, STEPS, scheduler, tiny_sampler

SEEDS = [11, 12]
SCHEDULERS = {
    "ddim": lambda: scheduler(),
    "pndm": lambda: scheduler(PNDMScheduler, skip_prk_steps=True),
    "dpm++": lambda: scheduler(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++"),
    "euler": lambda: scheduler(EulerDiscreteScheduler),
    "lcm": lambda: scheduler(LCMScheduler),
}


def gates_of(sampler, layout, seed=0, share=0.5):
    gates = np.random.default_rng(seed).random((sampler.calls, len(layout.units))) < share
    gates[list(sampler.rhythm.stages)] = True
    return gates


def make_plan(sampler, gates=None, granularity="block", reuse="output", order=0, **changes) -> DipgoPlan:
    layout = sampler.layout(granularity)
    gates = np.ones((sampler.calls, len(layout.units)), bool) if gates is None else gates
    fields = {
        "pipeline": "tiny",
        "fingerprint": pipeline_fingerprint(sampler.pipe),
        "scheduler": sampler.scheduler,
        "calls": sampler.rhythm,
        "granularity": granularity,
        "reuse": reuse,
        "order": order,
        "units": list(layout.units),
        "executed": rows(gates),
        "macs": macs_of(sampler, layout),
        "made": Provenance(
            method="fisher", budget=0.5, guidance_scale=3.0, seed=0, iterations=1, search_seconds=1.0,
            created="2030-01-01", sdfp_version="1", torch_version="2", diffusers_version="0",
        ),
    }  # fmt: skip
    return DipgoPlan(**(fields | changes))


def count_executions(sampler, layout):
    """Counts real executions: a hook below the plan's, in the submodules that only a running unit reaches."""
    ran = Counter()
    handles = []
    for denoiser in getattr(sampler, "denoisers", [sampler.denoiser]):
        for i, module in enumerate(layout.modules(denoiser)):
            # The last one: a DiT's head calls the timestep embedding of block 0, which is not running the block.
            inner = [m for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1]
            handles.append(inner.register_forward_hook(lambda *_, i=i: ran.update([i])))
    return ran, handles


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_nothing_skipped_is_bit_exact_and_so_is_removal(kind):
    sampler = tiny_sampler(kind)
    full = sampler.latents(SEEDS)
    assert full.std() > 0.1  # a model that does something
    ways = [("block", "output", 0), ("step", "output", 1)]
    if layout_of(sampler.denoiser, "block").residual:
        ways.append(("block", "residual", 1))
    for granularity, reuse, order in ways:
        with apply_dipgo(sampler.pipe, make_plan(sampler, granularity=granularity, reuse=reuse, order=order)):
            assert torch.equal(sampler.latents(SEEDS), full)
        layout = layout_of(sampler.denoiser, granularity)
        gates = gates_of(sampler, layout, share=0.3)
        handle = apply_dipgo(sampler.pipe, make_plan(sampler, gates, granularity, reuse, order))
        assert not torch.equal(sampler.latents(SEEDS), full)
        handle.remove()
        handle.remove()
        assert torch.equal(sampler.latents(SEEDS), full)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("granularity", ["block", "step"])
def test_closed_units_are_not_executed(kind, granularity):
    sampler = tiny_sampler(kind)
    layout = layout_of(sampler.denoiser, granularity)
    gates = layout.closure(gates_of(sampler, layout, seed=3), "output")
    plan = make_plan(sampler, gates, granularity)
    ran, handles = count_executions(sampler, layout)
    with apply_dipgo(sampler.pipe, plan):
        sampler.latents(SEEDS)
    for h in handles:
        h.remove()
    assert [ran[i] for i in range(len(layout.units))] == (gates.sum(0) * sampler.rhythm.branches).tolist()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_every_scheduler(name, kind):
    sampler = tiny_sampler(kind, schedule=SCHEDULERS[name]())
    full = sampler.latents(SEEDS)
    with apply_dipgo(sampler.pipe, make_plan(sampler)):
        assert torch.equal(sampler.latents(SEEDS), full)
    layout = layout_of(sampler.denoiser, "step")
    gates = np.ones((sampler.calls, 1), dtype=bool)
    gates[2:4] = False
    with apply_dipgo(sampler.pipe, make_plan(sampler, gates, "step")):
        skipped = sampler.latents(SEEDS)
        assert torch.equal(sampler.latents(SEEDS), skipped)  # a second generation starts afresh
    assert torch.isfinite(skipped).all() and not torch.equal(skipped, full)
    assert len(gates) == len(sampler.pipe.scheduler.timesteps) and layout.units[0].name == ""


def test_a_closed_unit_that_nothing_reads_changes_nothing():
    sampler = tiny_sampler("sd")
    layout = layout_of(sampler.denoiser, "block")
    gates = gates_of(sampler, layout, seed=5)
    assert (layout.closure(gates, "output") != gates).any()
    results = []
    for g in (gates, layout.closure(gates, "output")):
        # The dead unit still refreshes its history where it runs, so the last call alone is compared.
        g = np.concatenate([np.ones_like(g[:-1]), g[-1:]])
        with Skipping(sampler.denoiser, layout, g, "output", 0, sampler.scheduler.timesteps):
            results.append(sampler.latents(SEEDS))
    assert torch.equal(*results)


def test_what_is_reused():
    history = History(order=1)
    history.store(0, (torch.tensor(1.0),))
    assert history.recall(1) == (torch.tensor(1.0),)
    history.store(2, (torch.tensor(5.0),))
    assert history.recall(3) == (torch.tensor(7.0),)
    assert history.recall(5) == (torch.tensor(11.0),)
    history.store(6, (torch.tensor(4.0),))
    assert history.recall(8) == (torch.tensor(3.5),)
    plain = History(order=0)
    plain.store(0, torch.tensor(1.0))
    plain.store(2, torch.tensor(5.0))
    assert plain.recall(7) == 5.0


def test_residual_reuse_adds_what_the_block_added():
    sampler = tiny_sampler("dit")
    layout = layout_of(sampler.denoiser, "block")
    gates = np.ones((sampler.calls, 3), dtype=bool)
    gates[2, 1] = False
    seen = {}
    block = sampler.denoiser.transformer_blocks[1]

    def note(_, args, kwargs, output):
        seen[len(seen)] = (args[0] if args else kwargs["hidden_states"], output)

    with Skipping(sampler.denoiser, layout, gates, "residual", 0, sampler.scheduler.timesteps):
        handle = block.register_forward_hook(note, with_kwargs=True)
        sampler.latents(SEEDS)
        handle.remove()
    entered, left = zip(*seen.values(), strict=True)
    assert torch.equal(left[2], entered[2] + (left[1] - entered[1]))


def test_another_number_of_steps_or_scheduler_is_refused_before_anything_runs():
    sampler = tiny_sampler("dit")
    plan = make_plan(sampler)
    with apply_dipgo(sampler.pipe, plan):
        for steps in (STEPS - 1, STEPS + 1):
            other = tiny_sampler("dit", steps=steps)
            other.pipe.transformer, other.denoiser = sampler.pipe.transformer, sampler.denoiser
            other.pipe = sampler.pipe
            ran, handles = count_executions(sampler, layout_of(sampler.denoiser, "block"))
            with pytest.raises(SdfpError, match=f"{STEPS} denoiser calls in the plan but {steps}"):
                other.latents(SEEDS)
            assert not ran
            for h in handles:
                h.remove()
        sampler.pipe.scheduler = SCHEDULERS["euler"]()
        with pytest.raises(SdfpError, match="scheduler is DDIMScheduler in the plan but EulerDiscrete"):
            sampler.latents(SEEDS)
        sampler.pipe.scheduler = scheduler(beta_end=0.03)
        with pytest.raises(SdfpError, match="the settings of DDIMScheduler differ"):
            sampler.latents(SEEDS)


def test_a_generation_broken_off_leaves_no_trace():
    sampler = tiny_sampler("dit")
    gates = gates_of(sampler, layout_of(sampler.denoiser, "block"))
    with apply_dipgo(sampler.pipe, make_plan(sampler, gates, reuse="residual")):
        expected = sampler.latents(SEEDS)

        def stop(*_):
            raise KeyboardInterrupt

        calls = []
        handle = sampler.denoiser.pos_embed.register_forward_hook(
            lambda *_: calls.append(1) or (stop() if len(calls) == 3 else None)
        )
        with pytest.raises(KeyboardInterrupt):
            sampler.latents([1, 2, 3])  # another batch size, so stale values would not even fit
        handle.remove()
        assert torch.equal(sampler.latents(SEEDS), expected)


def test_a_generation_that_starts_in_the_middle_is_refused():
    sampler = tiny_sampler("dit")
    with apply_dipgo(sampler.pipe, make_plan(sampler)), pytest.raises(SdfpError, match="asks for timestep"):
        sampler.denoiser(
            torch.zeros(1, 2, 8, 8),
            timestep=torch.tensor([int(sampler.scheduler.timesteps[2])]),
            class_labels=torch.tensor([1]),
        )


def test_the_wrong_model_and_a_second_plan_are_refused():
    sampler = tiny_sampler("dit")
    plan = make_plan(sampler)
    with apply_dipgo(sampler.pipe, plan), pytest.raises(SdfpError, match="applied already"):
        apply_dipgo(sampler.pipe, plan)
    sampler.denoiser.half()
    apply_dipgo(sampler.pipe, plan).remove()  # the same model in another precision
    with torch.no_grad():
        for p in sampler.denoiser.parameters():
            p.mul_(1.05)
    with pytest.raises(SdfpError, match="the weights differ"):
        apply_dipgo(sampler.pipe, plan)
    with pytest.raises(SdfpError, match="denoiser is DiTTransformer2DModel in the plan but UNet2D"):
        apply_dipgo(tiny_sampler("sd").pipe, plan)
    unet = tiny_sampler("sd")
    with pytest.raises(SdfpError, match="field reuse"):
        apply_dipgo(unet.pipe, make_plan(unet, reuse="residual"))
