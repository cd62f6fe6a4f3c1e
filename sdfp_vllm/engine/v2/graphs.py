"""CUDA graphs of a round of drafting, one for each (padded batch size, draft length)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdfp_vllm.engine.upstream.v2 import (
    CudaGraphManager,
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
    build_dynamic_sd_schedule_lookup,
)


class _Prepared(CudaGraphManager):
    """Calls `before_each(rows)` before a graph is warmed up or recorded, outside of the recording.

    Upstream's manager for speculators, which comes before this one in the order of bases, hands `capture` a function
    that makes each graph's call.
    """

    before_each: Callable[[int], None] = staticmethod(lambda rows: None)

    def capture(self, create_forward_fn: Callable, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        def prepared(desc: Any, *more: Any, **named: Any) -> Any:
            self.before_each(desc.num_tokens)
            return create_forward_fn(desc, *more, **named)

        super().capture(prepared, *args, **kwargs)  # type: ignore[arg-type]


class DraftGraphManager(SpeculatorCudaGraphManager, _Prepared):
    """Upstream's manager of decode graphs, but with a graph for one draft token too.

    Upstream drafts its first token in a prefill and has no decode graph to capture at k = 1;
    here the first token is a decode step like every other.
    """

    def capture(  # type: ignore[override]
        self, forward_fn: Callable, *args: Any, specialize_spec_tokens: bool = False, **kwargs: Any
    ) -> None:
        """As upstream; with `specialize_spec_tokens`, a graph for every draft length of the batch table."""
        if specialize_spec_tokens:
            config = self.vllm_config.speculative_config
            lengths = build_dynamic_sd_schedule_lookup(
                config.num_speculative_tokens_per_batch_size,  # type: ignore[union-attr]
                vllm_max_batch_size=self.max_num_reqs,
                vllm_num_speculative_tokens=self.vllm_config.num_speculative_tokens,
            )
            self._capture_descs = {
                mode: [
                    SpeculatorBatchDescriptor(**vars(desc), num_speculative_tokens=k)
                    for desc in descs
                    for k in sorted(set(lengths) - {0}, reverse=True)
                ]
                for mode, descs in self._capture_descs.items()
            }
        super().capture(forward_fn, *args, **kwargs)
