"""The model with bridges in the place of skipped layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.bridge_file import Run
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.planner.stack import DecoderStack


class _Bridged(nn.Module):
    """Stands in for the first skipped layer of a run: the residual stream passes through its bridge."""

    def __init__(self, bridge: Bridge):
        super().__init__()
        self.bridge = bridge

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.bridge.apply(hidden_states)


@contextlib.contextmanager
def bridging(
    stack: DecoderStack, keep: KeepSet | Iterable[int], bridges: Mapping[Run, Bridge] | None = None
) -> Iterator[None]:
    """While open, the model runs what is in `keep`, with `bridges` over the runs between them."""
    placed = {run[0]: _Bridged(like_model(bridge, stack)) for run, bridge in (bridges or {}).items()}
    with placing(stack, keep, placed):
        yield


@contextlib.contextmanager
def placing(
    stack: DecoderStack, keep: KeepSet | Iterable[int], modules: Mapping[int, nn.Module]
) -> Iterator[None]:
    """While open, `modules` stand in for skipped layers, by number, and what is in `keep` runs."""
    with stack.keeping(keep) as model:
        layers: Any = model.model.layers  # made anew by `keeping`, and dropped by it
        for i, module in modules.items():
            layers[i] = module
        yield


def like_model(bridge: Bridge, stack: DecoderStack) -> Bridge:
    """The bridge as the engine holds it: on the model's device and in its dtype."""
    return bridge.to(device=stack.device, dtype=next(stack.head.parameters()).dtype)
