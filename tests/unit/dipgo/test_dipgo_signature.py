"""Classes that nobody listed: read from a call, refused by name, or described by hand."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from sdfp_vllm.dipgo import apply_dipgo, families, load_plan
from sdfp_vllm.dipgo.families import is_listed, layout_of
from sdfp_vllm.dipgo.layout import Layout, Stream, Unit
from sdfp_vllm.dipgo.signature import check_layout, load_layout, save_layout, traced
from sdfp_vllm.errors import PlanError, SdfpError
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import SEEDS, gates_of, make_plan


def hunyuan_video():
    """A denoiser that is not listed, with both kinds of block, and a call of it."""
    torch.manual_seed(0)
    net = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 12), "encoder_attention_mask": torch.ones(1, 5, dtype=torch.int64),
        "pooled_projections": torch.randn(1, 8), "guidance": torch.tensor([6000.0]),
    }  # fmt: skip
    return net, call


def test_a_class_nobody_listed_is_read_from_a_call():
    net, call = hunyuan_video()
    assert not is_listed(net)
    layout = traced(net, (), call)
    image, text = Stream(argument="hidden_states", place=0), Stream(argument="encoder_hidden_states", place=1)
    parts = ("transformer_blocks", "single_transformer_blocks")
    assert [u.name for u in layout.units] == [f"{part}.{i}" for part in parts for i in range(2)]
    assert all(u.streams == (image, text) for u in layout.units)
    assert [u.inputs for u in layout.units] == [(), (0,), (1,), (2,)]
    with pytest.raises(SdfpError, match="HunyuanVideoTransformer3DModel: is not among the classes"):
        layout_of(net, "block")


class Odd(nn.Module):
    """Takes two streams of one shape and gives them in the other order; the head reads more than the last block."""

    def __init__(self, greedy=False):
        super().__init__()
        self.blocks = nn.ModuleList(OddBlock() for _ in range(3))
        self.greedy = greedy

    def forward(self, hidden_states, timestep):
        image, text = hidden_states, hidden_states.flip(-1)
        for block in self.blocks:
            if self.greedy and block is self.blocks[-1]:
                between = image
            text, image = block(
                image * 1, text * 1
            )  # made over between the blocks: no tensor is handed on as it is
        return image + (between if self.greedy else 0)


class OddBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, first, second):
        return second + self.lin(first), first + self.lin(second)


def odd_layout(places=(1, 0), inputs=True):
    streams = (Stream(argument="first", place=places[0]), Stream(argument="second", place=places[1]))
    return Layout(
        tuple(
            Unit(name=f"blocks.{i}", inputs=(i - 1,) if i and inputs else (), streams=streams)
            for i in range(3)
        )
    )


def test_what_a_call_leaves_open_is_refused_by_name_and_can_be_described(tmp_path):
    call = ((torch.randn(1, 3, 4), 5), {})
    with pytest.raises(
        SdfpError, match=r"OddBlock: returns in place 0 .* shape of first and second.*--layout"
    ):
        traced(Odd(), *call)
    layout = odd_layout()
    check_layout(layout, Odd(), *call)
    save_layout(layout, tmp_path / "odd.json")
    assert load_layout(tmp_path / "odd.json") == layout
    with pytest.raises(SdfpError, match="reads more than its blocks' description says"):
        check_layout(layout, Odd(greedy=True), *call)
    with pytest.raises(SdfpError, match="reads more than"):
        check_layout(odd_layout(inputs=False), Odd(), *call)
    with pytest.raises(SdfpError, match=r"stream first of blocks\.0: does not come out in place 2"):
        check_layout(odd_layout((2, 0)), Odd(), *call)
    with pytest.raises(SdfpError, match=r"units\[0\].name: blocks.7 is no module"):
        check_layout(Layout((Unit(name="blocks.7"),)), Odd(), *call)
    bad = json.loads((tmp_path / "odd.json").read_text())
    bad[1]["streams"][0]["place"] = -1
    (tmp_path / "odd.json").write_text(json.dumps(bad))
    with pytest.raises(SdfpError, match=r"odd.json: 1.streams.0.place"):
        load_layout(tmp_path / "odd.json")
    with pytest.raises(SdfpError, match="cannot be read"):
        load_layout(tmp_path / "none.json")


def test_a_described_class_is_searched_and_its_plan_carries_the_description(monkeypatch, tmp_path):
    sampler = tiny_sampler("sd3")
    listed = sampler.layout("block")
    monkeypatch.setattr(families, "_CHAINS", {})
    assert not is_listed(sampler.denoiser)
    sampler._layouts.clear()
    sampler.units = listed
    plan = make_plan(sampler, gates_of(sampler, listed), reuse="residual")
    assert plan.units == list(listed.units)
    loaded = load_plan(plan.save(tmp_path))
    full = sampler.latents(SEEDS)
    with apply_dipgo(sampler.pipe, loaded):
        assert not torch.equal(sampler.latents(SEEDS), full)
    assert torch.equal(sampler.latents(SEEDS), full)
    units = [u.model_copy(update={"name": u.name + "0"}) for u in plan.units]
    with pytest.raises(PlanError, match=r"names transformer_blocks\.00, which this denoiser does not have"):
        apply_dipgo(sampler.pipe, plan.model_copy(update={"units": units}))


class MadeOver(nn.Module):
    """One stream, which is made over between the blocks: none is given another's tensor."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states * 2)
        return hidden_states


def test_what_is_made_over_on_the_way_is_read_from_all_before():
    layout = traced(MadeOver(), (torch.randn(1, 3, 4), 5), {})
    assert [u.inputs for u in layout.units] == [(), (0,), (0, 1)]
    assert all(u.streams == (Stream(argument="input"),) for u in layout.units)
