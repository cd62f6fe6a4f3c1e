"""Random diffusion pipelines of every supported shape, small enough for a test."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from sdfp_vllm.dipgo.layout import denoisers_of
from sdfp_vllm.dipgo.sampling import Conditions, Sampler
from tests.support.tiny_families import FAMILIES
from tests.toy.digits.identity_vae import IdentityVae

KINDS = ("dit", "pixart", "sd", "sdxl")
ALL_KINDS = (*KINDS, *FAMILIES)
STEPS = 5
_UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def scheduler(kind=DDIMScheduler, **settings):
    if kind is DDIMScheduler:
        settings = {"clip_sample": False, **settings}  # so that a call is linear in the prediction
    return kind(num_train_timesteps=1000, steps_offset=1, **settings)


def tiny_sampler(kind: str, steps: int = STEPS, schedule=None, guidance: float = 3.0) -> Sampler:
    """A pipeline of this kind on random weights, and what to call it with.

    Args:
        schedule: In place of DDIM, or of a family's own.
    """
    torch.manual_seed(7)
    if kind in FAMILIES:
        pipe, conditions, further = FAMILIES[kind]()
        if schedule is not None:
            pipe.scheduler = schedule
        return _sampler(pipe, conditions, steps, guidance, further)
    parts = {"vae": IdentityVae(), "scheduler": schedule or scheduler()}
    nothing = dict.fromkeys(("text_encoder", "tokenizer"))
    further = {}
    if kind == "dit":
        net = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=2,
            out_channels=2,
            num_layers=3,
            sample_size=8,
            patch_size=2,
        )
        pipe = DiTPipeline(transformer=net, **parts)
        conditions = {"class_labels": [1, 2, 3]}
    elif kind == "pixart":
        net = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
            sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12,
            use_additional_conditions=False,
        )  # fmt: skip
        pipe = PixArtAlphaPipeline(transformer=net, **nothing, **parts)
        mask = torch.ones(3, 4, dtype=torch.int64)
        conditions = {
            "prompt_embeds": torch.randn(3, 4, 12), "negative_prompt_embeds": torch.randn(3, 4, 12),
            "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask,
        }  # fmt: skip
        further = {"negative_prompt": None, "use_resolution_binning": False}
    elif kind == "sd":
        pipe = StableDiffusionPipeline(
            unet=UNet2DConditionModel(**_UNET), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, **nothing, **parts,
        )  # fmt: skip
        conditions = {
            "prompt_embeds": torch.randn(3, 4, 12),
            "negative_prompt_embeds": torch.randn(3, 4, 12),
        }
    else:
        net = UNet2DConditionModel(
            **_UNET, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 10,
        )  # fmt: skip
        pipe = StableDiffusionXLPipeline(
            unet=net, text_encoder_2=None, tokenizer_2=None, add_watermarker=False, **nothing, **parts
        )
        conditions = {
            "prompt_embeds": torch.randn(3, 4, 12), "negative_prompt_embeds": torch.randn(3, 4, 12),
            "pooled_prompt_embeds": torch.randn(3, 10), "negative_pooled_prompt_embeds": torch.randn(3, 10),
        }  # fmt: skip
    return _sampler(pipe, conditions, steps, guidance, further)


def _sampler(pipe, conditions, steps, guidance, further) -> Sampler:
    # Random weights start blocks as near-identities; larger ones make every block matter.
    with torch.no_grad():
        for denoiser in denoisers_of(pipe).values():
            for p in denoiser.parameters():
                if p.dim() >= 2:
                    p.mul_(1.5)
                else:
                    p.add_(0.1 * torch.randn_like(p))
    return Sampler(pipe, Conditions(conditions), steps, guidance, **further)
