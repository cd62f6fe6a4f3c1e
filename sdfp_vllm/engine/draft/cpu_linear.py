"""The engine's own matrix product on CPU, so that the plan's costs are those of the engine.

vLLM packs weights once and multiplies through oneDNN; its time over the number of rows has
another shape than torch's (float32 has no cliff at 4 rows, for one).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_PRIMITIVES = 32  # row counts that a packed weight remembers its kernel for; vLLM's own setting


def engine_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns what computes the product with `weight` [N, K] in vLLM on this machine: [M, K] -> [M, N].

    Upstream symbols: `vllm._custom_ops.create_onednn_mm` and `onednn_mm` (checked on 0.32.0),
    which `dispatch_cpu_unquantized_gemm` picks for all but small half-precision weights; they
    are used directly because importing that function takes several seconds more. Falls back to
    torch's own product where the weight is on another device, where vLLM has no such kernel, and, as
    vLLM does, where oneDNN has none for this CPU (half precision without AVX-512).
    """
    if weight.device.type == "cpu" and (ops := _onednn()) is not None:
        with contextlib.suppress(RuntimeError):
            handler = ops.create_onednn_mm(weight.detach().t(), _PRIMITIVES)
            return lambda x: ops.onednn_mm(handler, x, None)
    return lambda x: nn.functional.linear(x, weight)


def engine_linear_name() -> str:
    """Says whose product `engine_linear` measures on the CPU, for the plan's reader."""
    return "vLLM" if _onednn() is not None else "torch"


@functools.cache
def _onednn() -> Any | None:
    """vLLM's operators if this is a CPU build with oneDNN."""
    logging.disable(logging.WARNING)  # vLLM remarks on missing accelerators when it is imported
    try:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return None
        current_platform.import_kernels()
        from vllm import _custom_ops

        return _custom_ops if _custom_ops._supports_onednn else None
    except (ImportError, AttributeError):
        return None
    finally:
        logging.disable(logging.NOTSET)
