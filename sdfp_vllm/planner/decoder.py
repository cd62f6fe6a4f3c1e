"""Loads the model that is planned: a causal LM as it is, or the text decoder inside a multimodal checkpoint.

Drafts are made of text alone, with images in the KV cache already, so that a plan is made of the decoder. What its encoder makes
of images that drafts are tried behind is taken before it is let go (`planner/pictured.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# What a decoder and its wrapper have in common with transformers' causal LMs, beside their forward.
_OF_THE_DECODER = (
    "dtype",
    "get_input_embeddings",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "is_gradient_checkpointing",
    "set_attn_implementation",
)


class TextDecoder(nn.Module):
    """The decoder and the head of a multimodal model, seen as a causal LM; its encoder is let go.

    Attributes:
        config: The decoder's.
        model: The decoder, transformers' own module.
        lm_head: The head.
        architecture: Of the whole model.
    """

    def __init__(self, whole: Any):
        super().__init__()
        self.model: Any = whole.get_decoder()
        self.config = self.model.config  # its own: the whole model's `text_config` may be a copy
        self.generation_config = getattr(whole, "generation_config", None)
        self.lm_head: Any = whole.get_output_embeddings()
        self.architecture = type(whole).__name__

    def __getattr__(self, name: str) -> Any:
        """What a causal LM of transformers has as well is the decoder's."""
        return getattr(self.model, name) if name in _OF_THE_DECODER else super().__getattr__(name)

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(
        self, input_ids: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """As transformers' causal LMs: int64 ids [B, T], or `inputs_embeds` in their place -> logits [B, T or `logits_to_keep`, V]."""
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return CausalLMOutputWithPast(logits=logits if cap is None else torch.tanh(logits / cap) * cap)


def is_multimodal(config: Any) -> bool:
    """Whether a checkpoint's configuration is of a text decoder and something else: images, video, sound."""
    return config.get_text_config() is not config


def auto_class(config: Any) -> Any:
    """Which of transformers' auto classes builds a checkpoint: by its configuration."""
    with_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if with_images and is_multimodal(config) else AutoModelForCausalLM


def decoder_of(model: Any) -> Any:
    """`model` as `auto_class` built it, or the decoder of one that takes more than text."""
    return TextDecoder(model) if auto_class(model.config) is AutoModelForImageTextToText else model


def architecture_of(model: Any) -> str:
    """The name of the class that a checkpoint's config names."""
    return model.architecture if isinstance(model, TextDecoder) else type(model).__name__
