"""Random pipelines of diffusers' further families, of diffusers' own classes, small enough for a test.

Each builder gives the pipeline, its conditions and further arguments of its call. Blocks are as many as it takes for
every kind of edge: HunyuanDiT's long skips need five.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

Built = tuple[Any, dict[str, torch.Tensor], dict[str, Any]]
ROWS = 3  # conditions to draw from
_NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer"))
_NO_TEXT_2 = _NO_TEXT | dict.fromkeys(("text_encoder_2", "tokenizer_2"))
_NO_TEXT_3 = _NO_TEXT_2 | dict.fromkeys(("text_encoder_3", "tokenizer_3"))


def _vae(levels: int = 1, **settings: Any) -> AutoencoderKL:
    """Halves the size at every level but the first."""
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(
        latent_channels=4, block_out_channels=(4,) * levels, norm_num_groups=2, **blocks, **settings
    )


def _text(length: int, width: int, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(ROWS, length, width) for name in names}


def _masks(length: int, *names: str) -> dict[str, torch.Tensor]:
    """The last condition is a word shorter than the others."""
    mask = torch.ones(ROWS, length, dtype=torch.int64)
    mask[-1, -1] = 0
    return {name: mask.clone() for name in names}


def sd3() -> Built:
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=8,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=net, vae=_vae(shift_factor=0.06), **_NO_TEXT_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    conditions = _text(4, 12, "prompt_embeds", "negative_prompt_embeds")
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        conditions[name] = torch.randn(ROWS, 10)
    return pipe, conditions, {}


def flux() -> Built:
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )  # fmt: skip
    pipe = FluxPipeline(
        transformer=net, vae=_vae(shift_factor=0.06), **_NO_TEXT_2,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )  # fmt: skip
    conditions = _text(5, 12, "prompt_embeds")
    conditions["pooled_prompt_embeds"] = torch.randn(ROWS, 10)
    return pipe, conditions, {"height": 8, "width": 8}


def qwen() -> Built:
    net = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = QwenImagePipeline(
        transformer=net, vae=vae, **_NO_TEXT,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    )  # fmt: skip
    # The two calls of a step differ in length, and so in cost.
    conditions = _text(5, 12, "prompt_embeds") | _text(3, 12, "negative_prompt_embeds")
    conditions["prompt_embeds_mask"] = _masks(5, "m")["m"]
    conditions["negative_prompt_embeds_mask"] = torch.ones(ROWS, 3, dtype=torch.int64)
    return pipe, conditions, {"height": 16, "width": 16}


def sana() -> Built:
    net = SanaTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=16,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = SanaPipeline(transformer=net, vae=vae, scheduler=scheduler, **_NO_TEXT)
    conditions = _text(4, 12, "prompt_embeds", "negative_prompt_embeds")
    conditions |= _masks(4, "prompt_attention_mask", "negative_prompt_attention_mask")
    return (
        pipe,
        conditions,
        {"height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None},
    )


def pixart_sigma() -> Built:
    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12,
        use_additional_conditions=False,
    )  # fmt: skip
    pipe = PixArtSigmaPipeline(
        transformer=net, vae=_vae(), scheduler=DPMSolverMultistepScheduler(), **_NO_TEXT
    )
    conditions = _text(4, 12, "prompt_embeds", "negative_prompt_embeds")
    conditions |= _masks(4, "prompt_attention_mask", "negative_prompt_attention_mask")
    return pipe, conditions, {"use_resolution_binning": False, "negative_prompt": None}


def hunyuandit() -> Built:
    net = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, hidden_size=16, in_channels=4, patch_size=2, num_layers=6,
        sample_size=8, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=4,
        text_len_t5=3, mlp_ratio=2.0,
    )  # fmt: skip
    # Its pipeline counts on a VAE that makes images eight times as large as latents.
    pipe = HunyuanDiTPipeline(
        transformer=net, vae=_vae(4), scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **_NO_TEXT_2,
    )  # fmt: skip
    conditions = _text(4, 12, "prompt_embeds", "negative_prompt_embeds")
    conditions |= _text(3, 16, "prompt_embeds_2", "negative_prompt_embeds_2")
    conditions |= _masks(4, "prompt_attention_mask", "negative_prompt_attention_mask")
    conditions |= _masks(3, "prompt_attention_mask_2", "negative_prompt_attention_mask_2")
    return pipe, conditions, {"height": 64, "width": 64, "use_resolution_binning": False}


def cogvideox() -> Built:
    net = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=3, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=2, max_text_seq_length=4,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=2,
    )  # fmt: skip
    pipe = CogVideoXPipeline(transformer=net, vae=vae, scheduler=CogVideoXDDIMScheduler(), **_NO_TEXT)
    return pipe, _text(4, 12, "prompt_embeds", "negative_prompt_embeds"), {}


def _wan_net() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=12, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip


def _wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_temporal=2, scale_factor_spatial=2,
    )  # fmt: skip


def _wan(**experts: Any) -> Built:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(vae=_wan_vae(), scheduler=scheduler, **experts, **_NO_TEXT)
    return (
        pipe,
        _text(4, 12, "prompt_embeds", "negative_prompt_embeds"),
        {"height": 16, "width": 16, "num_frames": 5},
    )


def wan() -> Built:
    """Wan 2.2: one expert for much noise, one for little."""
    return _wan(transformer=_wan_net(), transformer_2=_wan_net(), boundary_ratio=0.85)


def wan_21() -> Built:
    """One network for all noise levels."""
    return _wan(transformer=_wan_net())


def ltx() -> Built:
    net = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=3, caption_channels=12,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3, downsample_type=("conv", "conv"), upsample_residual=(False, False),
        upsample_factor=(1, 1), patch_size=1, patch_size_t=1,
    )  # fmt: skip
    pipe = LTXPipeline(
        transformer=net, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), **_NO_TEXT
    )  # fmt: skip
    conditions = _text(4, 12, "prompt_embeds", "negative_prompt_embeds")
    conditions |= _masks(4, "prompt_attention_mask", "negative_prompt_attention_mask")
    return pipe, conditions, {"height": 32, "width": 32, "num_frames": 5}


FAMILIES: dict[str, Callable[[], Built]] = {
    f.__name__: f for f in (sd3, flux, qwen, sana, pixart_sigma, hunyuandit, cogvideox, wan, wan_21, ltx)
}
