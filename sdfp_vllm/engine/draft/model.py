"""The draft: the target's own embedding, kept layers, final norm and head.

No weight is copied, but for what the plan rounds (`twins.py`) and the rows of its head (`head.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sdfp_vllm.engine.draft.branches import seen
from sdfp_vllm.engine.draft.bridged import BridgeStep, entered_through
from sdfp_vllm.engine.draft.reach import OwnForward, decoder_of
from sdfp_vllm.engine.upstream.symbols import AttentionLayerBase, VllmConfig, support_torch_compile
from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.families import Call
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import DraftView


def attention_names(layer: nn.Module) -> list[str]:
    """Names of the attention layers inside a decoder layer, as vLLM's forward context knows them."""
    return [str(m.layer_name) for m in layer.modules() if isinstance(m, AttentionLayerBase)]


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1})
class SkipDraftModel(nn.Module):
    """Runs what is kept of `target`'s layers on one token per request.

    A dropped layer is an identity on the residual stream, so a kept layer simply receives the
    (branch output, residual) pair of the last kept one: no work is left where layers were; the same
    goes for a dropped branch of a layer. Where
    the plan has a bridge over a run of dropped layers, whatever comes next (a kept layer or the
    final norm) is entered through it. A family whose layers are not called that way is run by its decoder's own
    forward over fewer layers (`OwnForward`).

    Args:
        view: What runs and at which precision; a keep set runs at full precision.
        bridges: By (first, last) dropped layer; on the target's device, in its dtype.
        head: Stands in for the target's `compute_logits`.
        call: How the target's layers are run (`plan/families.py`); bridges need them one by one.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        target: Any,
        view: KeepSet | Iterable[int],
        bridges: Mapping[tuple[int, int], Bridge] | None = None,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        call: Call = "layers",
    ):
        super().__init__()
        decoder = decoder_of(target)
        self._head: Callable[[torch.Tensor], torch.Tensor] = head or target.compute_logits
        view = DraftView.of(view)
        touched = view.touched()
        self.own: OwnForward | None = None
        if call == "forward":
            self.own = OwnForward(decoder, {i: seen(decoder.layers[i], i, view) for i in touched})
            return
        into = {last + 1: bridge for (_, last), bridge in (bridges or {}).items()}
        # Plain attributes of registered modules: parameters() lists the target's own tensors.
        self._embed: Callable[[torch.Tensor], torch.Tensor] = decoder.embed_input_ids
        first = touched[0]
        steps: list[nn.Module] = [BridgeStep(into[first])] if first in into else []
        for i in touched:
            layer = seen(decoder.layers[i], i, view)
            steps += entered_through(into[i], layer) if i in into and i != first else [layer]
        self.kept = nn.ModuleList(steps)
        self.norm = decoder.norm
        if len(decoder.layers) in into:
            *before, self.norm = entered_through(into[len(decoder.layers)], decoder.norm)
            self.kept.extend(before)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Maps int32 `input_ids` [T] at int64 `positions` [T], or [rows, T] (M-RoPE), to final hidden states [T, hidden]."""
        if self.own is not None:
            return self.own(input_ids, positions)
        hidden = self._embed(input_ids)
        residual: torch.Tensor | None = None
        for layer in self.kept:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden) if residual is None else self.norm(hidden, residual)[0]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's head, with its scaling and soft cap: [T, hidden] -> [T, vocab]; -inf for what it lacks."""
        return self._head(hidden)
