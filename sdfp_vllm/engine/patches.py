"""The patches an engine process needs once SDFP is configured. Each is small, idempotent and says why."""

from __future__ import annotations

import functools
import sys
from typing import Any, Literal

from sdfp_vllm.engine.draft.rounded_weights import round_while_loading
from sdfp_vllm.engine.metrics import count_drafts
from sdfp_vllm.engine.rejection_sampling import mend_rejection_sampler
from sdfp_vllm.engine.requests import refuse_requests
from sdfp_vllm.engine.scheduling import patch_scheduler
from sdfp_vllm.engine.upstream import symbols as upstream

_MARK = "_sdfp_patched"


def patch_engine() -> None:
    """Applies every patch below; called wherever an SdfpConfig is built or unpickled."""
    allow_async_scheduling()
    route_draft_model_proposer()
    route_init_speculator()
    patch_scheduler()
    round_while_loading()
    mend_cpu_expand_kernel()
    mend_cpu_top_k_of_no_rows()
    mend_rejection_sampler()
    mend_thinking_budgets()
    refuse_requests()
    count_drafts()


def allow_async_scheduling() -> None:
    """Adds "sdfp" to the methods vLLM schedules asynchronously.

    `vllm.config.vllm.EagleModelTypes` is the list it asks; a method missing there has
    asynchronous scheduling turned off with a warning. Checked on 0.32.0; without the symbol
    the method still works, synchronously.
    """
    import vllm.config.vllm as module

    types = getattr(module, "EagleModelTypes", None)
    if types is not None and not hasattr(module, _MARK):
        module.EagleModelTypes = Literal[types, "sdfp"]  # type: ignore[misc]
        module.__dict__[_MARK] = True


def route_draft_model_proposer() -> None:
    """Makes `DraftModelProposer(vllm_config, ...)` build ours when the method is "sdfp".

    The V1 runner picks the proposer from a closed if/elif and checks its class later;
    a subclass returned from `__new__` passes both. Checked on 0.32.0.
    """
    base: Any = upstream.DraftModelProposer
    if _MARK in vars(base):
        return

    def __new__(cls: type, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is base and vllm_config.speculative_config.method == "sdfp":
            from sdfp_vllm.engine.v1.proposer import SdfpProposer

            cls = SdfpProposer
        return object.__new__(cls)

    base.__new__ = __new__
    setattr(base, _MARK, True)


def route_init_speculator() -> None:
    """Makes the V2 runner's `init_speculator` build ours when the method is "sdfp".

    Upstream picks the speculator from a closed if/elif. The runner imports the function by
    value, so a runner module that is loaded already gets it too. Checked on 0.32.0; releases
    without the V2 runner have neither.
    """
    try:
        from vllm.v1.worker.gpu import spec_decode
    except ImportError:
        return
    if hasattr(spec_decode, _MARK):
        return
    original = spec_decode.init_speculator

    @functools.wraps(original)
    def init_speculator(vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if vllm_config.speculative_config.method == "sdfp":
            from sdfp_vllm.engine.v2.speculator import SdfpSpeculator

            return SdfpSpeculator(vllm_config, device)
        return original(vllm_config, device, *args, **kwargs)

    for module in (spec_decode, sys.modules.get("vllm.v1.worker.gpu.model_runner")):
        if module is not None:
            module.init_speculator = init_speculator  # type: ignore[attr-defined]
    spec_decode.__dict__[_MARK] = True


def mend_cpu_expand_kernel() -> None:
    """Gives the CPU platform an `expand_kernel` that writes its result.

    Upstream (0.32.0, vLLM #55005) hands its C++ kernel an int64 copy of the output tensor and
    drops the copy, so for float32 temperatures and int32 top-k the "expanded" tensor stays
    uninitialised: with any speculative method, temperature > 0 samples from a wrong
    distribution on CPU. `tests/engine_v1/test_upstream_canary.py` fails once upstream is mended.
    """
    if not upstream.current_platform.is_cpu():
        return
    from vllm.v1.sample import rejection_sampler

    if hasattr(rejection_sampler, _MARK):
        return
    original = rejection_sampler.expand_batch_to_tokens

    @functools.wraps(original)
    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        x = x.masked_fill(x == replace_from, replace_to) if replace_from != replace_to else x
        return x.repeat_interleave(counts.to(x.device), output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    rejection_sampler.__dict__[_MARK] = True


def mend_cpu_top_k_of_no_rows() -> None:
    """Lets the CPU platform's top-k take a batch without draft tokens.

    Upstream (0.32.0) runs the rejection sampler's constraints over the draft rows of every step,
    and on CPU its top-k asks for the largest k of no rows, which raises: with any speculative
    method, the first step of a request with top_k ends the engine.
    """
    if not upstream.current_platform.is_cpu():
        return
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.apply_top_k_top_p
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def apply_top_k_top_p(logits: Any, k: Any, p: Any) -> Any:
        return logits if logits.shape[0] == 0 else original(logits, k, p)

    setattr(apply_top_k_top_p, _MARK, True)
    rejection_sampler.apply_top_k_top_p = apply_top_k_top_p


def mend_thinking_budgets() -> None:
    """Makes the V1 runner's batch count thinking budgets with `TokenByTokenBudget` where it drafts.

    The batch gets its tracker from `maybe_create_thinking_budget_state_holder`, imported by value. Checked on 0.32.0.
    """
    from vllm.v1.worker import gpu_input_batch as module

    original = module.maybe_create_thinking_budget_state_holder
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create(reasoning_config: Any, max_num_seqs: int, num_spec_tokens: int, *args: Any) -> Any:
        if reasoning_config is None or num_spec_tokens == 0:
            return original(reasoning_config, max_num_seqs, num_spec_tokens, *args)
        from sdfp_vllm.engine.thinking_budget import TokenByTokenBudget

        return TokenByTokenBudget(reasoning_config, max_num_seqs, num_spec_tokens, *args)

    setattr(create, _MARK, True)
    module.maybe_create_thinking_budget_state_holder = create  # type: ignore[assignment]
