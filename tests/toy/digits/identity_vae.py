"""The autoencoder of a pixel-space model, for pipelines that insist on one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class IdentityVae(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as diffusers' own models
    """Latents are pixels: `decode` returns its input, (batch, channels, height, width), values in [-1, 1]."""

    @register_to_config
    def __init__(
        self,
        scaling_factor: float = 1.0,
        block_out_channels: tuple[int, ...] = (1,),
        shift_factor: float = 0.0,
    ):
        super().__init__()
        # diffusers saves no file for a model without weights, and loads none without a file.
        self.register_buffer("nothing", torch.zeros(1))

    def decode(self, z: Tensor, return_dict: bool = True, **_: Any) -> DecoderOutput | tuple[Tensor]:
        return DecoderOutput(sample=z) if return_dict else (z,)
