"""Text to pictures of four digits: a two-stream transformer of Stable Diffusion 3's class, trained by flow matching.

A text is four digits, "3 7 1 0", a picture has them in two rows of two. The text's encoder is the transformer's own linear layer on one-hot
tokens: an embedding of the digits and of their places, learned with the rest. What SD3 takes as the pooled text is the mean of the tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.toy.digits.data import CLASSES, PLACES, pictures
from tests.toy.digits.identity_vae import IdentityVae

TOKEN_WIDTH = 16  # ten digits and none, four places, one to spare
TEXTS = 128
_TIMESTEPS = 1000


def model() -> Any:
    net: Any = SD3Transformer2DModel(
        sample_size=16,
        patch_size=4,
        in_channels=1,
        out_channels=1,
        num_layers=8,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TOKEN_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=TOKEN_WIDTH,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    for block in net.transformer_blocks:  # adaLN-Zero's start: every block is the identity
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(net.proj_out.weight)
    return net


def tokens(classes: Tensor) -> Tensor:
    """One-hot tokens (texts, places, width) of classes (texts, places); class 10 is no text."""
    found = torch.zeros(*classes.shape, TOKEN_WIDTH)
    found.scatter_(2, classes[..., None], 1.0)
    found[:, torch.arange(PLACES), CLASSES + 1 + torch.arange(PLACES)] = 1.0
    return found


def flow_loss(net: nn.Module, images: Tensor, classes: Tensor, batch: int) -> Tensor:
    """Squared error of the velocity from picture to noise, at a time drawn evenly; a tenth of the texts is dropped."""
    rows = torch.randint(len(images), (batch, PLACES))
    x, c = pictures(images[rows]), classes[rows]
    c[torch.rand(batch) < 0.1] = CLASSES
    time = torch.rand(batch)
    noise = torch.randn_like(x)
    share = time[:, None, None, None]
    text = tokens(c)
    velocity = net(
        hidden_states=(1 - share) * x + share * noise,
        timestep=time * _TIMESTEPS,
        encoder_hidden_states=text,
        pooled_projections=text.mean(1),
    ).sample
    return nn.functional.mse_loss(velocity, noise - x)


def conditions() -> dict[str, Tensor]:
    """Some texts, as the arguments of the pipeline's call; the same whenever it is asked for."""
    classes = torch.randint(CLASSES, (TEXTS, PLACES), generator=torch.Generator().manual_seed(0))
    text, none = tokens(classes), tokens(torch.full_like(classes, CLASSES))
    return {
        "prompt_embeds": text,
        "negative_prompt_embeds": none,
        "pooled_prompt_embeds": text.mean(1),
        "negative_pooled_prompt_embeds": none.mean(1),
    }


def save_flow(net: Any, out: Path) -> None:
    """Saves the pipeline around `net`, already in half precision, with its texts beside it."""
    encoders: dict[str, Any] = dict.fromkeys(
        f"{part}{which}" for part in ("text_encoder", "tokenizer") for which in ("", "_2", "_3")
    )
    pipe: Any = StableDiffusion3Pipeline(
        transformer=net,
        vae=IdentityVae().half(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TIMESTEPS),
        **encoders,
    )
    pipe.save_pretrained(out)
    save_file(conditions(), out / "conditions.safetensors")
