"""LoRA adapters in draft steps.

vLLM wraps linears, embedding and logits processor of the target in layers that add an adapter's delta to each row, the
adapter a mapping names for it. The draft runs these very layers (rounded linears lie inside them, so that the delta
stays full precision), but on one token per request, and the mapping is that of the tokens just verified. So each round
of drafting sets its own, and puts the other back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

BASE = 0  # vLLM's number for no adapter


class DraftAdapters:
    """Tells the target's LoRA layers which adapter each row of a draft step has; does nothing where there are none.

    Args:
        target: With `lora_manager`, which vLLM gives a model whose layers it wrapped.
        padding: Rows that logits of 1, 2, ... requests are computed with; larger batches have none.
        own: Whether drafts run their request's adapter; without, they are the base model's.
    """

    def __init__(self, target: Any, padding: Sequence[int] = (), own: bool = True):
        self._manager = getattr(target, "lora_manager", None)
        self._padding, self.own = padding, own
        self._before: Any = None

    def begin(self, ids: Sequence[int], rows: int, logits: int = 0) -> None:
        """Maps the rows of draft steps.

        Args:
            ids: Of the adapters of the requests, in the order of the batch; `BASE` for none.
            rows: Tokens of a draft step, padding included. CPU kernels want a mapping of just as many.
            logits: Rows that logits are computed of, where these are more than the requests: in a recorded graph.
        """
        if self._manager is None:
            return
        from sdfp_vllm.engine.upstream.adapters import LoRAMapping

        loaded = set(self._manager.lora_index_to_id)
        known = [int(i) if self.own and i in loaded else BASE for i in ids]
        # Padding has the last request's adapter: kernels work on runs of rows, and have room for one a request.
        tokens = known + known[-1:] * (rows - len(known))
        samples = padded_rows(max(len(known), logits), self._padding)
        sampled = known + known[-1:] * (samples - len(known))
        base = (BASE,) * len(known)  # there was no mapping before a dummy run whose adapters are gone
        before = getattr(self._manager, "_last_mapping", None)
        self._before = before or LoRAMapping(base, base, is_prefill=True)
        self._manager.set_adapter_mapping(LoRAMapping(tuple(tokens), tuple(sampled), is_prefill=True))

    def end(self) -> None:
        """Puts the target's mapping back; the V1 runner computes log-probabilities of prompts with it after drafting."""
        if self._before is not None:
            self._manager.set_adapter_mapping(self._before)  # type: ignore[union-attr]
            self._before = None

    def begin_capture(self, rows: int) -> None:
        """Maps `rows` tokens to as many adapters, and none, as can be: what a CUDA graph is recorded with.

        With a batch of base requests alone vLLM's kernels are not launched, and would be missing from the graph.
        """
        if self._manager is None:
            return
        cycle = [i for i in self._manager.lora_index_to_id if i is not None] + [BASE]
        self.begin([cycle[i % len(cycle)] for i in range(rows)], rows)


def padded_rows(count: int, padding: Sequence[int]) -> int:
    """With how many rows `count` of them are run; `padding` has it for 1, 2, ..."""
    return padding[count - 1] if 0 < count <= len(padding) else count


def over_rows(processor: Any, tokens: Tensor) -> Any:
    """A logits processor for a head of fewer rows.

    Args:
        processor: The target's; returned as it is if it has no adapters.
        tokens: int64 [N], of which token each of the head's rows is, those of all tensor-parallel ranks together.
    """
    if not hasattr(processor, "lora_b_stacked"):
        return processor
    made: Any = copy.copy(processor)
    made.lora_b_stacked = processor.lora_b_stacked[:, :, tokens]  # [slots, 1, N, rank], a copy
    made.sharded_to_full_mapping_gpu = None  # the draft's head orders its rows itself

    def followed(change: Callable[..., None]) -> Callable[..., None]:
        """`change`, after which the copy has what the slot now holds."""

        @functools.wraps(change)
        def changed(index: int, *weights: Any) -> None:
            change(index, *weights)
            made.lora_b_stacked[index].copy_(processor.lora_b_stacked[index][:, tokens])

        return changed

    processor.set_lora = followed(processor.set_lora)
    processor.reset_lora = followed(processor.reset_lora)
    return made


def without_adapters(module: Any) -> Any:
    """The layer inside one of vLLM's LoRA layers; any other module itself."""
    return getattr(module, "_modules", {}).get("base_layer", module)
