"""A plan beside what else changes a denoiser: writers in place, offloading, torch.compile, hooks that go astray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module

from sdfp_vllm.dipgo import apply_dipgo
from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.errors import SdfpError
from tests.support.tiny_pipelines import STEPS, tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import gates_of, make_plan

SEEDS = [11, 12]


def values_given(unit):
    """What a unit gives, copied call by call before anybody can write into it."""
    seen = []
    unit.register_forward_hook(
        lambda module, args, output: seen.append([x.clone() for x in torch.utils._pytree.tree_leaves(output)])
    )
    return seen


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_freeu_does_not_write_into_what_is_kept():
    sampler = tiny_sampler("sd")
    sampler.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    layout = layout_of(sampler.denoiser, "block")
    gates = np.ones((STEPS, len(layout.units)), dtype=bool)
    names = [unit.name for unit in layout.units]
    gates[1:3, names.index("mid_block")] = False
    gates[2:4, names.index("up_blocks.0")] = False
    plan = make_plan(sampler, gates)
    middle, upper = values_given(sampler.denoiser.mid_block), values_given(sampler.denoiser.up_blocks[0])
    with apply_dipgo(sampler.pipe, plan):
        sampler.latents(SEEDS)
    assert all_equal(middle[0], middle[1]) and all_equal(middle[0], middle[2])
    assert all_equal(upper[1], upper[2]) and all_equal(upper[1], upper[3])
    assert not all_equal(middle[0], middle[3])


@pytest.mark.parametrize("order", [0, 1])
def test_an_adapter_adds_to_a_reused_block_as_to_one_that_runs(order):
    """T2I adapters add in place to what a down block puts out, which is a skip connection too."""
    sampler = tiny_sampler("sd")
    layout = layout_of(sampler.denoiser, "block")
    gates = np.ones((STEPS, len(layout.units)), dtype=bool)
    gates[2:, 1] = False
    down = values_given(sampler.denoiser.down_blocks[1])
    alike = []
    sampler.denoiser.down_blocks[1].register_forward_hook(
        lambda module, args, output: alike.append(output[0] is output[1][-1])
    )
    torch.manual_seed(0)
    times = sampler.scheduler.timesteps
    with torch.no_grad(), Skipping(sampler.denoiser, layout, gates, "output", order, times):
        for t in times:
            sampler.denoiser(
                torch.randn(1, 4, 16, 16), torch.tensor(t), torch.randn(1, 4, 12),
                down_intrablock_additional_residuals=[torch.ones(1, 8, 16, 16), torch.ones(1, 16, 8, 8)],
            )  # fmt: skip
    expected = [b + (b - a) for a, b in zip(down[0], down[1], strict=True)] if order else down[1]
    assert all_equal(down[2], expected) and all(alike)


def test_a_block_that_writes_into_its_input_adds_what_it_would_add():
    sampler = tiny_sampler("dit")
    plan = make_plan(sampler, gates_of(sampler, layout_of(sampler.denoiser, "block")), reuse="residual")
    with apply_dipgo(sampler.pipe, plan):
        expected = sampler.latents(SEEDS)
    for block in sampler.denoiser.transformer_blocks:
        block.forward = lambda states, forward=block.forward, **told: states.copy_(forward(states, **told))
    with apply_dipgo(sampler.pipe, plan):
        assert torch.equal(sampler.latents(SEEDS), expected)


def offloaded(denoiser):
    """As `pipe.maybe_free_model_hooks()` does at the end of a generation: hooks off and on again."""
    if hasattr(denoiser, "_hf_hook"):
        remove_hook_from_module(denoiser, recurse=True)
    cpu_offload_with_hook(denoiser, torch.device("cpu"))


@pytest.mark.parametrize("granularity", ["block", "step"])
@pytest.mark.parametrize("plan_first", [True, False])
@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_offloading_comes_and_goes_and_so_does_the_plan(kind, plan_first, granularity):
    sampler = tiny_sampler(kind)
    full = sampler.latents(SEEDS)
    plan = make_plan(
        sampler, gates_of(sampler, layout_of(sampler.denoiser, granularity)), granularity, order=1
    )
    with apply_dipgo(sampler.pipe, plan):
        expected = sampler.latents(SEEDS)
    if plan_first:
        handle = apply_dipgo(sampler.pipe, plan)
        offloaded(sampler.denoiser)
    else:
        offloaded(sampler.denoiser)
        handle = apply_dipgo(sampler.pipe, plan)
    for _ in range(3):
        assert torch.equal(sampler.latents(SEEDS), expected)
        offloaded(sampler.denoiser)
    handle.remove()
    for _ in range(2):
        assert hasattr(sampler.denoiser, "_hf_hook")
        assert torch.equal(sampler.latents(SEEDS), full)
        offloaded(sampler.denoiser)
    remove_hook_from_module(sampler.denoiser, recurse=True)
    assert torch.equal(sampler.latents(SEEDS), full)
    assert sampler.denoiser.forward == type(sampler.denoiser).forward.__get__(sampler.denoiser)


def test_offloading_of_every_module_and_a_plan():
    sampler = tiny_sampler("pixart")
    plan = make_plan(sampler, gates_of(sampler, layout_of(sampler.denoiser, "block")), reuse="residual")
    with apply_dipgo(sampler.pipe, plan):
        expected = sampler.latents(SEEDS)
    handle = apply_dipgo(sampler.pipe, plan)
    for block in sampler.denoiser.transformer_blocks:
        offloaded(block)
    for _ in range(2):
        assert torch.equal(sampler.latents(SEEDS), expected)
        for block in sampler.denoiser.transformer_blocks:
            offloaded(block)
    handle.remove()


@pytest.mark.parametrize("lost", ["clock", "unit"])
def test_hooks_that_somebody_took_off_are_missed(lost):
    sampler = tiny_sampler("dit")
    full = sampler.latents(SEEDS)
    plan = make_plan(sampler, gates_of(sampler, layout_of(sampler.denoiser, "block")))
    module = sampler.denoiser if lost == "clock" else sampler.denoiser.transformer_blocks[1]
    with apply_dipgo(sampler.pipe, plan):
        kept = module.forward
        del module.forward
        with pytest.raises(SdfpError, match="taken off by something else"):
            sampler.latents(SEEDS)
    module.forward = kept  # put back when the plan is gone
    assert torch.equal(sampler.latents(SEEDS), full)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_wrapped(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compile_blocks(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")


@pytest.mark.parametrize(
    ("compile_it", "granularity", "ran_before"),
    [(compile_wrapped, "block", True), (compile_wrapped, "step", False), (compile_blocks, "block", True)],
)
def test_a_compiled_denoiser_takes_a_plan(compile_it, granularity, ran_before, fresh_compiler):
    sampler = tiny_sampler("dit")
    full = sampler.latents(SEEDS)
    plan = make_plan(sampler, gates_of(sampler, layout_of(sampler.denoiser, granularity)), granularity)
    with apply_dipgo(sampler.pipe, plan):
        expected = sampler.latents(SEEDS)
    assert (expected - full).abs().max() > 0.01
    compile_it(sampler.pipe)
    if ran_before:
        torch.testing.assert_close(sampler.latents(SEEDS), full)
    with apply_dipgo(sampler.pipe, plan):
        torch.testing.assert_close(sampler.latents(SEEDS), expected)
    torch.testing.assert_close(sampler.latents(SEEDS), full)


def test_one_graph_is_refused_by_name():
    sampler = tiny_sampler("sd")
    plan = make_plan(sampler)
    sampler.pipe.unet = torch.compile(sampler.pipe.unet, backend="eager", fullgraph=True)
    with pytest.raises(SdfpError, match=r"pipe\.unet is compiled as one graph"):
        apply_dipgo(sampler.pipe, plan)
