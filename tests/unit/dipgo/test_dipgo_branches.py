"""Attention and MLP of a block as units of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdfp_vllm.common.progress import stages
from sdfp_vllm.dipgo import apply_dipgo, load_plan
from sdfp_vllm.dipgo.curve import _ways, find_curve
from sdfp_vllm.dipgo.families import has_branches, layout_of
from sdfp_vllm.dipgo.job import SearchOptions, find
from sdfp_vllm.dipgo.layout import Layout, Unit
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.supernet import SuperNet
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import macs_of, task_of
from sdfp_vllm.errors import PlanError, SdfpError
from tests.support.tiny_pipelines import ALL_KINDS, tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import SEEDS, count_executions, gates_of, make_plan

FEW = (
    "dit",
    "sd3",
    "flux",
    "qwen",
    "wan",
)  # a chain, two streams with and without single blocks, two MLPs, two experts
KINDS = [
    pytest.param(kind, marks=() if kind in FEW else pytest.mark.more)
    for kind in ALL_KINDS
    if kind not in ("sd", "sdxl")
]
AROUND = ("norm", "embed", "proj", "time", "linear", "scale", "dropout", "pool", "act")


@pytest.mark.parametrize("kind", KINDS)
def test_every_branch_runs_once_in_a_call_and_in_order(kind):
    sampler = tiny_sampler(kind)
    assert has_branches(sampler.denoiser)
    layout, ran = layout_of(sampler.denoiser, "branch"), []
    assert len(layout.units) > len(sampler.layout("block").units)
    handles = [
        module.register_forward_hook(lambda *_, name=unit.name: ran.append(name))
        for unit, module in zip(layout.units, layout.modules(sampler.denoiser), strict=True)
    ]
    args, kwargs = sampler.first_call()
    with torch.no_grad():
        sampler.denoiser(*args, **kwargs)
    for handle in handles:
        handle.remove()
    names = [unit.name for unit in layout.units]
    assert sorted(ran) == sorted(names)
    blocks = [[n for n in each if n.startswith("transformer_blocks.0.")] for each in (ran, names)]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_part_of_a_block_is_worth_skipping(kind):
    """What a block computes outside its branches are modulations: of vectors, not of tokens."""
    sampler = tiny_sampler(kind)
    layout = layout_of(sampler.denoiser, "branch")
    names = [unit.name for unit in layout.units]
    for block in {n.rpartition(".")[0] for n, u in zip(names, layout.units, strict=True) if u.branch}:
        inside = {n.rpartition(".")[2] for n in names if n.startswith(f"{block}.")}
        others = {name for name, _ in sampler.denoiser.get_submodule(block).named_children()} - inside
        assert all(any(word in name for word in (*AROUND, "mod")) for name in others), others


@pytest.mark.parametrize("kind", KINDS)
def test_closed_branches_do_not_run_and_nothing_closed_is_bit_exact(kind, tmp_path):
    sampler = tiny_sampler(kind)
    full = sampler.latents(SEEDS)
    layout = layout_of(sampler.denoiser, "branch")
    with apply_dipgo(sampler.pipe, make_plan(sampler, granularity="branch", reuse="residual")):
        assert torch.equal(sampler.latents(SEEDS), full)
    gates = gates_of(sampler, layout, seed=3)
    plan = make_plan(sampler, gates, "branch", "residual", 1)
    assert load_plan(plan.save(tmp_path)) == plan
    ran, handles = count_executions(sampler, layout)
    with apply_dipgo(sampler.pipe, tmp_path):
        skipped = sampler.latents(SEEDS)
    for handle in handles:
        handle.remove()
    assert [ran[i] for i in range(len(layout.units))] == (gates.sum(0) * sampler.rhythm.branches).tolist()
    assert torch.isfinite(skipped).all() and not torch.equal(skipped, full)
    assert torch.equal(sampler.latents(SEEDS), full)


@pytest.mark.parametrize("kind", ["dit", "flux", "sd3"])
def test_macs_of_branches_are_those_of_a_whole_generation(kind):
    sampler = tiny_sampler(kind)
    layout = sampler.layout("branch")
    gates = gates_of(sampler, layout, seed=1)
    counter = FlopCounterMode(display=False)
    skipping = Skipping(sampler.denoisers, layout, gates, "residual", 0, sampler.rhythm)
    with skipping, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        sampler.latents([5])
    counted = sum(counter.get_flop_counts()[type(sampler.denoiser).__name__].values())
    assert macs_of(sampler, layout).per_image(gates) == counted // 2


def test_what_a_branch_gave_is_taken_and_added_as_the_step_has_it():
    """The gate that a block multiplies it by is the present step's, not that of the step it was computed in."""
    sampler = tiny_sampler("dit")
    layout, block = sampler.layout("branch"), sampler.denoiser.transformer_blocks[1]
    closed = next(i for i, u in enumerate(layout.units) if u.name == "transformer_blocks.1.ff")
    gates = np.ones((sampler.calls, len(layout.units)), dtype=bool)
    gates[2, closed] = False
    given = []
    with Skipping(sampler.denoisers, layout, gates, "residual", 0, sampler.rhythm):
        handle = block.ff.register_forward_hook(lambda *call: given.append(call[2].clone()))
        sampler.latents(SEEDS)
        handle.remove()
    assert torch.equal(given[2], given[1]) and not torch.equal(given[3], given[1])


def test_a_step_of_closed_branches_is_no_step_of_a_closed_network():
    """Branches are passed by, so whatever is closed, everything else still counts: with both ways of reuse."""
    layout = Layout(tuple(Unit(name=str(i), inputs=(i - 1,) if i else (), branch=True) for i in range(3)))
    gates = np.array([[True, True, False]])
    for reuse in ("output", "residual"):
        assert layout.live(gates, reuse).all()


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_branches_are_recorded_learned_and_searched(kind):
    sampler = tiny_sampler(kind, steps=6)
    task = task_of(sampler, "branch", "residual", 1, 0.5)
    surrogate = record(sampler, task.layout, "residual", 1, [11, 12], 2)
    one = np.ones((6, len(task.layout.units)), dtype=bool)
    one[3, 1] = False
    assert surrogate.loss(one) > 0
    with SuperNet(sampler, task.layout, "residual") as net, torch.no_grad():
        made = net.latents(SEEDS, torch.tensor(one, dtype=torch.float32))
    torch.testing.assert_close(made, task.run(one, SEEDS, np.full(one.shape, "0")))
    with stages(None) as progress:
        found = find(
            sampler,
            SearchOptions(steps=6, granularity="branch", images=2, projections=2, rounds=1),
            progress,
        )
    assert found.granularity == "branch" and found.task.reuse == "residual"
    assert task.fits(found.gates)


def test_a_search_tries_branches_where_there_are_any():
    ways = {
        kind: [g for g, _ in _ways(tiny_sampler(kind), SearchOptions(budget=0.9), [0.9])]
        for kind in ("dit", "sd")
    }
    assert ways == {"dit": ["branch", "block", "step", "guidance"], "sd": ["block", "step", "guidance"]}
    outputs = _ways(tiny_sampler("dit"), SearchOptions(budget=0.9, reuse="output"), [0.9])
    assert [g for g, _ in outputs] == ["block", "step", "guidance"]


def test_branches_of_a_u_net_are_refused():
    with pytest.raises(SdfpError, match=r"--granularity branch.*UNet2DConditionModel is none"):
        layout_of(tiny_sampler("sd").denoiser, "branch")


def test_a_plan_of_other_branches_is_refused():
    sampler = tiny_sampler("dit")
    plan = make_plan(sampler, granularity="branch", reuse="residual")
    units = [plan.units[1], *plan.units[1:]]
    with pytest.raises(PlanError, match="names other units"):
        apply_dipgo(
            sampler.pipe, plan.model_copy(update={"units": [units[0].model_copy(update={"inputs": ()}), *units[1:]]})
        )  # fmt: skip


def test_a_branch_passes_on_what_its_readers_need():
    units = (Unit(name="a"), Unit(name="b", inputs=(0,), branch=True), Unit(name="c", inputs=(1,)))
    assert Layout(units).live(np.array([[True, False, True]]), "output").all()


def test_described_branches_of_a_listed_u_net_run():
    sampler = tiny_sampler("sd")
    last = "up_blocks.1.attentions.0.transformer_blocks.0"
    names = [f"{last}.attn1", f"{last}.attn2", f"{last}.ff"]
    units = [Unit(name=n, inputs=(i - 1,) if i else (), branch=True) for i, n in enumerate(names)]
    sampler.units = Layout(tuple(units))
    gates = gates_of(sampler, sampler.layout("block"))
    full = sampler.latents(SEEDS)
    with apply_dipgo(sampler.pipe, make_plan(sampler, gates, "block", "residual")):
        assert not torch.equal(sampler.latents(SEEDS), full)


def test_ways_that_a_budget_does_not_reach_are_left_out():
    """Of branches more always runs than of blocks, and of those more than of whole steps."""
    sampler = tiny_sampler("dit", steps=10)
    least = {
        g: task_of(sampler, g, r, 0, 1.0).least
        for g, r in (("branch", "residual"), ("block", "residual"), ("step", "output"))
    }
    assert least["step"] < least["block"] < least["branch"]
    between = (least["block"] + least["branch"]) / 2
    options = SearchOptions(steps=10, images=1, projections=1, rounds=0)
    assert [g for g, _ in _ways(sampler, options, [between])] == ["block", "step", "guidance"]
    with stages(None) as progress:
        some, more = find_curve(sampler, options, [0.9, between], progress)
    assert some.task.fits(some.gates) and more.task.fits(more.gates) and more.task.budget == between
    with pytest.raises(SdfpError, match=r"--budget 0.01: is less than .* 0.100 of the macs"):
        _ways(sampler, options, [0.01])
    with pytest.raises(SdfpError, match="is less than"):
        _ways(sampler, replace(options, granularity="branch"), [between])


@pytest.mark.parametrize("how", ["in place", "wrapped"])
@pytest.mark.parametrize("one_graph", [True, False])
def test_blocks_that_are_one_graph_are_not_decided_within(how, one_graph):
    sampler = tiny_sampler("dit")
    plan = make_plan(sampler, gates_of(sampler, sampler.layout("branch")), "branch", "residual")
    with apply_dipgo(sampler.pipe, plan):
        expected = sampler.latents(SEEDS)
    blocks = sampler.denoiser.transformer_blocks
    for i, block in enumerate(blocks):
        if how == "in place":
            block.compile(backend="eager", fullgraph=one_graph)
        else:
            blocks[i] = torch.compile(block, backend="eager", fullgraph=one_graph)
    if one_graph:
        with pytest.raises(
            SdfpError, match=r"transformer_blocks\.\d, which is compiled as one graph.*--granularity block"
        ):
            apply_dipgo(sampler.pipe, plan)
    else:
        with apply_dipgo(sampler.pipe, plan):
            torch.testing.assert_close(sampler.latents(SEEDS), expected)
