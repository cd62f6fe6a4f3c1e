"""Rows without an adapter, on a CPU: a mend of vLLM's kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sdfp_vllm.engine.upstream.releases import refuse_missing
from sdfp_vllm.engine.upstream.symbols import current_platform

_MARK = "_sdfp_patched"
KERNELS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def mend_cpu_rows_without_adapter() -> None:
    """Makes the CPU's LoRA kernels add nothing to rows of the base model, once; called where an engine has adapters.

    Upstream (0.32.0) marks such a row with index -1, which these kernels use as an index: where all slots are taken, a
    request to the base model in a batch with others runs the adapter of the last slot, with drafts or without.
    `tests/engine_v1/test_upstream_canary.py` fails once upstream is mended.
    """
    if not current_platform.is_cpu():
        return
    refuse_missing("adapters_cpu")
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if _MARK in vars(lora_ops):
        return
    for name in KERNELS:
        mended = _mended(getattr(lora_ops, name))
        setattr(lora_ops, name, mended)
        setattr(punica_cpu, name, mended)  # imported by value
    setattr(lora_ops, _MARK, True)


def _mended(kernel: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(kernel)
    def mended(rows: Tensor, weights: Tensor, out: Tensor, index: Tensor, *more: Any, **named: Any) -> None:
        kernel(rows.masked_fill((index < 0)[:, None], 0), weights, out, index, *more, **named)

    return mended
