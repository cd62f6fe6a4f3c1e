"""Reaching a target's decoder layers: one by one where they take (positions, hidden, residual), else by its own forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.families import Call, family_of

_TAKEN = ("positions", "hidden_states", "residual")  # what a layer that is called by itself takes, in order
_WAY_OUT = "Serve it without SDFP; docs/use/compatibility.md lists the model families that work."


def decoder_of(target: Any) -> Any:
    """Returns the module that owns `layers` and `norm` inside a vLLM causal LM, or the one inside a multimodal model.

    Raises:
        SdfpError: If there is none.
    """
    model = target.get_language_model() if hasattr(target, "get_language_model") else target
    for inner in (getattr(model, "model", None), model):  # Idefics3's language model is the decoder itself
        if isinstance(getattr(inner, "layers", None), nn.ModuleList) and hasattr(inner, "norm"):
            return inner
    raise SdfpError(
        f"model {type(target).__name__}",
        "is not a stack of decoder layers SDFP can reach (model.layers, model.norm)",
        _WAY_OUT,
    )


def call_of(architecture: str, decoder: Any) -> Call:
    """How a draft runs `decoder`'s layers: as the list of families says, or for a family not on it as they look.

    Raises:
        SdfpError: If a family is not on the list and its layers cannot be called by themselves, or they no longer take
            in this release of vLLM what they did when the family was tried.
    """
    if isinstance(decoder, PreTrainedModel):  # vLLM runs transformers' own module
        return "forward"
    known = family_of(architecture)
    if known and known.call == "forward":
        return "forward"
    layer = decoder.layers[0]
    takes = _arguments(layer)
    if takes != _TAKEN or not hasattr(decoder, "embed_input_ids"):
        raise SdfpError(
            f"model architecture {architecture}",
            f"has decoder layers ({type(layer).__name__}) that take ({', '.join(takes)}) in this release of vLLM, and not "
            f"({', '.join(_TAKEN)})" + ("" if known else "; it has not been tried with SDFP"),
            _WAY_OUT,
        )
    return "layers"


def _arguments(layer: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a layer's forward must be given."""
    parameters = inspect.signature(layer.forward).parameters.values()
    return tuple(
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and (p.default is p.empty or p.name in _TAKEN)
    )


class _Skip(nn.Module):
    """Stands in for a skipped layer of transformers' module: the residual stream passes unchanged."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class OwnForward(nn.Module):
    """The target's decoder, run by its own forward over fewer layers; every weight is the target's.

    What the decoder does around its layers is done: scaled embeddings, rotary tables, the final norm.

    Args:
        kept: The layers that run, by number.
    """

    def __init__(self, decoder: Any, kept: Mapping[int, nn.Module]):
        super().__init__()
        self._transformers = isinstance(decoder, PreTrainedModel)
        part: Any = copy.copy(decoder)
        if self._transformers:  # its forward looks up masks by layer number
            skip = _Skip()
            layers = [kept.get(i, skip) for i in range(len(decoder.layers))]
        else:
            layers = [kept[i] for i in sorted(kept)]
            part.start_layer, part.end_layer = 0, len(layers)
        part._modules = {**decoder._modules, "layers": nn.ModuleList(layers)}
        self.decoder = part

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Maps `input_ids` [T] at `positions` [T] to final hidden states [T, hidden]."""
        # `forward`, not a call: the draft is compiled as a whole, and the decoder's own graph is of all layers.
        if not self._transformers:
            return self.decoder.forward(input_ids, positions, None)
        out = self.decoder.forward(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, return_dict=False
        )
        return out[0][0]
