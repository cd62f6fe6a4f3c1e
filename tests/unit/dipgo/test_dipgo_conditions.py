"""Beyond text to image: image to image, inpainting, ControlNet, IP-Adapter, LoRA. It works, or is refused and says why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback

from sdfp_vllm.dipgo import apply_dipgo
from sdfp_vllm.dipgo.sampling import Conditions, Sampler
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import task_of
from sdfp_vllm.errors import PlanError, SdfpError
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import SEEDS, count_executions, gates_of, make_plan

ROWS = 3


def vae(**settings):
    return AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2, **settings).eval()


def around(kind, pipeline, arguments=(), **parts):
    """A pipeline of another class around the denoiser of a tiny one, on images of 16 x 16 and more."""
    plain = tiny_sampler(kind)
    pipe, values = plain.pipe, dict(plain.conditions.values)
    components = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    if kind == "sd":
        parts = {"vae": vae(), "requires_safety_checker": False, "feature_extractor": None, **parts}
    made = pipeline(**(components | parts))
    size = 16 if kind == "sd" else 8
    arguments = dict(arguments)
    for name, channels in arguments.pop("pictures", {"image": 3}).items():
        values[name] = torch.rand(ROWS, channels, size, size)
    further = dict(plain._given)
    return lambda **changes: Sampler(made, Conditions(values), 6, 3.0, **(further | arguments | changes))


def image_to_image(**changes):
    return around("sd", StableDiffusionImg2ImgPipeline, {"strength": 0.7})(**changes)


def flux_image_to_image():
    return around("flux", FluxImg2ImgPipeline, {"strength": 0.7})()


def sd3_image_to_image():
    return around("sd3", StableDiffusion3Img2ImgPipeline, {"strength": 0.7, "height": 8, "width": 8})()


def inpainting():
    arguments = {"pictures": {"image": 3, "mask_image": 1}, "strength": 1.0, "height": 16, "width": 16}
    return around("sd", StableDiffusionInpaintPipeline, arguments)()


def controlled():
    torch.manual_seed(3)
    net = ControlNetModel.from_unet(tiny_sampler("sd").denoiser, conditioning_embedding_out_channels=(8,))
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # it begins with zeros, and adds nothing
    return around("sd", StableDiffusionControlNetPipeline, {"height": 16, "width": 16}, controlnet=net)()


def flux_controlled():
    torch.manual_seed(3)
    net = FluxControlNetModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )  # fmt: skip
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return around("flux", FluxControlNetPipeline, {"pictures": {"control_image": 3}}, controlnet=net)()


WAYS = {f.__name__: f for f in (
    image_to_image, flux_image_to_image, sd3_image_to_image, inpainting, controlled, flux_controlled,
)}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_for_this_way_of_generating(way):
    sampler = WAYS[way]()
    full = sampler.latents(SEEDS)
    assert (sampler.calls < 6) == ("image_to_image" in way)
    layout = sampler.layout("block")
    reuse = "residual" if layout.residual else "output"
    with apply_dipgo(sampler.pipe, make_plan(sampler, reuse=reuse)):
        assert torch.equal(sampler.latents(SEEDS), full)
    gates = layout.closure(gates_of(sampler, layout, seed=3), reuse)
    ran, _ = count_executions(sampler, layout)
    with apply_dipgo(sampler.pipe, make_plan(sampler, gates, reuse=reuse)):
        ran.clear()  # making the plan counts operations, with a call
        assert not torch.equal(sampler.latents(SEEDS), full)
    assert [ran[i] for i in range(len(layout.units))] == gates.sum(0).tolist()
    assert torch.equal(sampler.latents(SEEDS), full)
    task = task_of(sampler, "block", reuse, 0, 1.0)  # and it can be searched
    surrogate = record(sampler, task.layout, reuse, 0, SEEDS, 1)
    assert surrogate.loss(np.ones_like(gates)) == 0 and surrogate.loss(gates) > 0


def test_a_plan_for_text_is_none_for_images_nor_for_another_strength():
    sampler = image_to_image()
    text = tiny_sampler("sd", steps=6)
    with apply_dipgo(sampler.pipe, make_plan(sampler)):
        for strength in (0.4, 1.0):
            with pytest.raises(SdfpError, match=r"asks for timestep .* strength that it was searched with"):
                sampler._arguments["strength"] = strength
                sampler.latents(SEEDS)
    with apply_dipgo(sampler.pipe, make_plan(text)):
        sampler._arguments["strength"] = 0.7
        with pytest.raises(SdfpError, match="asks for timestep"):
            sampler.latents(SEEDS)


def ip_adapter(unet):
    """Puts an IP-Adapter on the tiny U-Net, as `load_ip_adapter` does with its weights."""
    torch.manual_seed(4)
    weights, key = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        width = {"down_blocks.0": 8, "up_blocks.1": 8}.get(".".join(name.split(".")[:2]), 16)
        for part in ("k", "v"):
            weights[f"{key}.to_{part}_ip.weight"] = 0.5 * torch.randn(width, 12)
        key += 2
    projection = {
        "proj.weight": torch.randn(4 * 12, 10), "proj.bias": torch.zeros(48), "norm.weight": torch.ones(12),
        "norm.bias": torch.zeros(12),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])


def with_picture(sampler):
    """One image's call, with the embedding of a picture and of none."""
    return Sampler(
        sampler.pipe, sampler.conditions, sampler.steps, 3.0,
        ip_adapter_image_embeds=[torch.randn(2, 1, 10, generator=torch.manual_seed(1))],
    )  # fmt: skip


def test_an_ip_adapter_that_is_on_in_the_search_works_and_one_put_on_later_is_refused():
    plain = tiny_sampler("sd")
    before = make_plan(plain)
    ip_adapter(plain.denoiser)
    with pytest.raises(
        PlanError, match=r"the configuration of UNet2DConditionModel differs|the weights differ"
    ):
        apply_dipgo(plain.pipe, before)
    sampler = with_picture(plain)
    full = sampler.latents([1])
    assert not torch.equal(full, tiny_sampler("sd").latents([1]))
    layout = sampler.layout("block")
    gates = gates_of(sampler, layout)
    plan = make_plan(sampler, gates)
    assert sum(plan.macs.units) > sum(before.macs.units)  # its attention is counted
    with apply_dipgo(sampler.pipe, plan):
        assert not torch.equal(sampler.latents([1]), full)
    assert torch.equal(sampler.latents([1]), full)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_lora_that_is_fused_later_is_another_model(kind):
    sampler = tiny_sampler(kind)
    plan = make_plan(sampler)
    torch.manual_seed(5)
    for name, p in sampler.denoiser.named_parameters():
        if p.dim() == 2 and any(part in name for part in ("to_q", "to_k", "to_v", "to_out")):
            p.data += 0.1 * torch.randn(len(p), 1) @ torch.randn(1, p.shape[1])
    with pytest.raises(PlanError, match="the weights differ"):
        apply_dipgo(sampler.pipe, plan)
    full = sampler.latents(SEEDS)
    with apply_dipgo(sampler.pipe, make_plan(sampler)):  # a plan made with it
        assert torch.equal(sampler.latents(SEEDS), full)


def test_frames_at_different_timesteps_are_refused_before_anything_is_made():
    sampler = tiny_sampler("wan_21")
    with pytest.raises(SdfpError, match="frames of a video, are at different timesteps"):
        times = torch.tensor([[sampler.rhythm.timesteps[0]] * 3 + [0.0]])
        with apply_dipgo(sampler.pipe, make_plan(sampler)):
            sampler.denoiser(
                torch.zeros(1, 4, 3, 8, 8), timestep=times, encoder_hidden_states=torch.zeros(1, 4, 12)
            )


def test_arguments_that_no_call_has_and_calls_that_fail_are_refused():
    sampler = tiny_sampler("sd3")
    with pytest.raises(SdfpError, match="--set sharpness: no argument of StableDiffusion3Pipeline"):
        Sampler(sampler.pipe, sampler.conditions, 5, 3.0, sharpness=3)
    with pytest.raises(SdfpError, match=r"cannot be called with what the search has .*divisible"):
        Sampler(sampler.pipe, sampler.conditions, 5, 3.0, height=7, width=7)
    assert isinstance(sampler.pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert "step" not in vars(sampler.pipe.scheduler)  # listening has ended


def test_guidance_that_ends_on_the_way_is_refused_in_the_search():
    sampler = tiny_sampler("sd")
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    with pytest.raises(SdfpError, match="changes its batch in step 2"):
        Sampler(sampler.pipe, sampler.conditions, 5, 3.0, callback_on_step_end=cut)
