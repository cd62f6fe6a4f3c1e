"""Units, their dependencies and their cost: the papers' numbers, the closure's properties, budgets met."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sdfp_vllm.dipgo.budget import TOLERANCE, gates_at_budget
from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.layout import Layout, Unit
from sdfp_vllm.dipgo.macs import MacCount, count_macs
from tests.support.tiny_pipelines import tiny_sampler

SD15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
DIT_XL2 = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip

UNET = Layout(
    (
        Unit(name="down_blocks.0"),
        Unit(name="down_blocks.1", inputs=(0,)),
        Unit(name="down_blocks.2", inputs=(1,)),
        Unit(name="down_blocks.3", inputs=(2,)),
        Unit(name="mid_block", inputs=(3,)),
        Unit(name="up_blocks.0", inputs=(2, 3, 4)),
        Unit(name="up_blocks.1", inputs=(1, 2, 5)),
        Unit(name="up_blocks.2", inputs=(0, 1, 6)),
        Unit(name="up_blocks.3", inputs=(0, 7)),
    )
)
CHAIN = Layout(tuple(Unit(name=str(i), inputs=(i - 1,) if i else ()) for i in range(4)))
CASES = {"unet": (UNET, "output"), "chain": (CHAIN, "output"), "residual": (CHAIN, "residual")}


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    layout = layout_of(unet, "block")
    call = (torch.empty(1, 4, 64, 64, device="meta"), torch.empty(1, device="meta"))
    text = {"encoder_hidden_states": torch.empty(1, 77, 768, device="meta")}
    return layout, *(count_macs(unet, layout, call, text, attention) for attention in (False, True))


def test_stable_diffusion_has_the_papers_nine_blocks(sd15):
    layout, *_ = sd15
    assert layout == UNET


def test_macs_of_stable_diffusion_are_the_papers(sd15):
    layout, macs, with_attention = sd15
    full = np.ones((50, 9), dtype=bool)
    assert macs.per_image(full) == pytest.approx(16.94e12, rel=0.02)
    # The released 0.80 plan runs ten whole calls and reuses everything in the others.
    pruned = full.copy()
    pruned[np.arange(50) % 5 != 0] = False
    assert macs.per_image(layout.closure(pruned, "output")) == pytest.approx(3.38e12, rel=0.02)
    assert macs.rest < 0.01 * sum(macs.units)
    # 64 x 64 queries by as many keys, 8 heads of 40: one self-attention of the outermost level, of five.
    products = 2 * 64**4 * 320
    assert with_attention.units[0] - macs.units[0] > 2 * products
    assert with_attention.units[8] - macs.units[8] > 3 * products


def test_macs_of_dit_xl_are_the_papers():
    with torch.device("meta"):
        dit = DiTTransformer2DModel(**DIT_XL2)
    layout = layout_of(dit, "block")
    arguments = {
        "timestep": torch.empty(1, dtype=torch.int64, device="meta"),
        "class_labels": torch.empty(1, dtype=torch.int64, device="meta"),
    }
    macs = count_macs(dit, layout, (torch.empty(1, 4, 32, 32, device="meta"),), arguments)
    assert macs.per_image(np.ones((250, 28), dtype=bool)) == pytest.approx(29.66e12, rel=0.02)


def test_the_whole_network_as_a_unit_costs_what_its_parts_cost():
    sampler = tiny_sampler("dit", guidance=3.0)
    call = sampler.first_call()
    blocks = count_macs(sampler.denoiser, layout_of(sampler.denoiser, "block"), *call)
    whole = count_macs(sampler.denoiser, layout_of(sampler.denoiser, "step"), *call)
    assert whole.rest == 0 and whole.units == [blocks.rest + sum(blocks.units)]
    assert whole.rows_per_image == 2  # guidance
    alone = tiny_sampler("dit", guidance=1.0)
    single = count_macs(alone.denoiser, layout_of(alone.denoiser, "step"), *alone.first_call())
    assert single.rows_per_image == 1 and single.units == whole.units


def test_the_cascade_counts_what_becomes_useless():
    macs = MacCount(units=[1, 2, 3, 4], rest=0)
    assert macs.cascade(CHAIN, "output") == pytest.approx([0.1, 0.3, 0.6, 1.0])
    assert macs.cascade(CHAIN, "residual") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    nine = MacCount(units=[1] * 9, rest=0)
    # A down block is read by two up blocks, so closing one of its readers alone does not free it.
    assert nine.cascade(UNET, "output") * 9 == pytest.approx([1, 1, 1, 1, 1, 3, 5, 7, 9])


def some_gates(layout):
    return arrays(bool, (5, len(layout.units)))


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_closure(case, data):
    layout, reuse = CASES[case]
    gates, more = data.draw(some_gates(layout)), data.draw(some_gates(layout))
    closed = layout.closure(gates, reuse)
    assert not (closed & ~gates).any()  # never adds
    assert (layout.closure(closed, reuse) == closed).all()  # idempotent
    assert not (closed & ~layout.closure(gates | more, reuse)).any()  # monotone
    # Every unit left has a reader that is left, up to the head.
    readers = {i: [j for j, u in enumerate(layout.units) if i in u.inputs] for i in range(len(layout.units))}
    last = len(layout.units) - 1
    for t, i in np.argwhere(closed):
        assert reuse == "residual" or i == last or any(closed[t, j] for j in readers[i])
    # And nothing that a reader needs is gone.
    for t, i in np.argwhere(gates & ~closed):
        assert i != last and not any(closed[t, j] for j in readers[i])


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), budget=st.floats(0.2, 1.0))
def test_a_budget_is_met_and_higher_scores_go_first(case, data, budget):
    layout, reuse = CASES[case]
    n = len(layout.units)
    macs = MacCount(units=data.draw(st.lists(st.integers(1, 50), min_size=n, max_size=n)), rest=1)
    scores = data.draw(arrays(float, (6, n), elements=st.floats(0, 1)))
    gates = gates_at_budget(scores, budget, layout, macs, reuse)
    first_only = np.zeros_like(gates)
    first_only[0] = True
    assert gates[0].all()
    least = macs.share(layout.closure(first_only, reuse))
    assert macs.share(gates) <= max(budget + TOLERANCE, least)
    assert (layout.closure(gates, reuse) == gates).all()
    # Some threshold separates them: what is closed though live scores less than all that is open.
    closed = layout.live(gates, reuse) & ~gates
    if closed[1:].any() and gates[1:].any():
        assert scores[1:][closed[1:]].max() <= scores[1:][gates[1:]].min()


def test_one_score_set_serves_every_budget():
    macs = MacCount(units=[10] * 4, rest=0)
    scores = np.random.default_rng(0).random((40, 4))
    shares = [macs.share(gates_at_budget(scores, b, CHAIN, macs, "residual")) for b in (0.25, 0.5, 0.75, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=TOLERANCE)
