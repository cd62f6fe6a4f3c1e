"""torch.compile and plans: the same images, and nothing compiled anew from the second generation on."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from sdfp_vllm.dipgo import apply_dipgo
from sdfp_vllm.errors import SdfpError
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import gates_of, make_plan

SEEDS = [11, 12]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def lists_of_blocks(pipe):
    names = ("transformer_blocks", "single_transformer_blocks", "down_blocks", "up_blocks")
    return [getattr(denoiser(pipe), name) for name in names if hasattr(denoiser(pipe), name)]


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def whole(pipe, **settings):
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, torch.compile(denoiser(pipe), **settings))


def whole_in_place(pipe, **settings):
    denoiser(pipe).compile(**settings)


def blocks_in_place(pipe, **settings):
    """As diffusers' `compile_repeated_blocks` does."""
    for blocks in lists_of_blocks(pipe):
        for block in blocks:
            block.compile(**settings)


def blocks_replaced(pipe, **settings):
    for blocks in lists_of_blocks(pipe):
        for i, block in enumerate(blocks):
            blocks[i] = torch.compile(block, **settings)


WAYS = [whole, whole_in_place, blocks_in_place, blocks_replaced]


def some_plan(sampler):
    layout = sampler.layout("block")
    gates = gates_of(sampler, layout, seed=1)
    return make_plan(sampler, gates, reuse="residual" if layout.residual else "output", order=1)


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_nothing_is_compiled_anew_after_the_first_generation(kind, way):
    sampler = tiny_sampler(kind)
    plan = some_plan(sampler)
    with torch.no_grad():
        with apply_dipgo(sampler.pipe, plan):
            expected = sampler.latents(SEEDS)
        way(sampler.pipe, backend="eager")
        with apply_dipgo(sampler.pipe, plan):
            sampler.latents(SEEDS)
            compiled = graphs()
            assert compiled
            torch.compiler.set_stance("fail_on_recompile")
            torch.testing.assert_close(sampler.latents(SEEDS), expected)
            assert graphs() == compiled


@pytest.mark.parametrize("way", WAYS)
def test_more_steps_are_no_more_graphs(way):
    counts = []
    for steps in (5, 9):
        torch.compiler.reset()
        counters.clear()
        sampler = tiny_sampler("dit", steps=steps)
        plan = some_plan(
            sampler
        )  # counts operations, with a call that must not be the first of a compiled denoiser
        way(sampler.pipe, backend="eager")
        with torch.no_grad(), apply_dipgo(sampler.pipe, plan):
            sampler.latents(SEEDS)
        counts.append(graphs())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("way", [blocks_in_place, blocks_replaced])
@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_blocks_may_be_one_graph_each(kind, way):
    sampler = tiny_sampler(kind)
    plan = some_plan(sampler)
    with torch.no_grad():
        full = sampler.latents(SEEDS)
        with apply_dipgo(sampler.pipe, plan):
            expected = sampler.latents(SEEDS)
        way(sampler.pipe, backend="eager", fullgraph=True)
        units = sampler.layout("block").modules(sampler.denoiser)
        before = [(unit._compiled_call_impl, vars(unit).get("forward")) for unit in units]
        for _ in range(2):
            with apply_dipgo(sampler.pipe, plan):
                torch.testing.assert_close(sampler.latents(SEEDS), expected)
            torch.testing.assert_close(sampler.latents(SEEDS), full)
        assert not any(counters["graph_break"].values())
        assert [(unit._compiled_call_impl, vars(unit).get("forward")) for unit in units] == before


@pytest.mark.parametrize("way", [whole, whole_in_place])
def test_a_denoiser_of_one_graph_is_refused(way):
    sampler = tiny_sampler("dit")
    plan = some_plan(sampler)
    way(sampler.pipe, backend="eager", fullgraph=True)
    with pytest.raises(
        SdfpError, match=r"pipe\.transformer is compiled as one graph.*compile_repeated_blocks"
    ):
        apply_dipgo(sampler.pipe, plan)


def test_blocks_compiled_anew_under_a_plan_are_missed():
    sampler = tiny_sampler("dit")
    blocks_in_place(sampler.pipe, backend="eager")
    with torch.no_grad(), apply_dipgo(sampler.pipe, some_plan(sampler)):
        blocks_in_place(sampler.pipe, backend="eager")
        with pytest.raises(SdfpError, match="taken off by something else"):
            sampler.latents(SEEDS)


@pytest.mark.more
@pytest.mark.parametrize("way", WAYS)
def test_inductor(way):
    sampler = tiny_sampler("dit")
    plan = some_plan(sampler)
    with torch.no_grad():
        with apply_dipgo(sampler.pipe, plan):
            expected = sampler.latents(SEEDS)
        way(sampler.pipe)
        with apply_dipgo(sampler.pipe, plan):
            sampler.latents(SEEDS)
            torch.compiler.set_stance("fail_on_recompile")
            torch.testing.assert_close(sampler.latents(SEEDS), expected, atol=1e-4, rtol=1e-4)
