"""What vLLM's scheduler is made to do while we draft: obey what requests say of drafts, and pace a batch's length.

The scheduler is where both hold for every runner: it decides how many of a request's drafts are verified, and how many the
next round drafts.
"""

from __future__ import annotations

import functools
from typing import Any

from sdfp_vllm.engine.request_limits import is_ruled, limits
from sdfp_vllm.pacing.batch import BatchPolicy

_MARK = "_sdfp_patched"


def patch_scheduler() -> None:
    """Lets requests limit their drafts, and lengths follow the traffic where the proposer cannot decide them.

    Upstream's scheduler looks the draft length of each step up by batch size in `dynamic_sd_lookup`, a list;
    a `BatchPolicy` stands in its place. What was accepted comes through `make_spec_decoding_stats`, which upstream calls
    for each verified request. Checked on 0.32.0.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    if hasattr(Scheduler, _MARK):
        return
    start, schedule, stats = Scheduler.__init__, Scheduler.schedule, Scheduler.make_spec_decoding_stats

    @functools.wraps(start)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        lengths = getattr(self, "dynamic_sd_lookup", None)
        drafting = getattr(self.vllm_config.speculative_config, "drafting", None)
        if lengths and drafting is not None and drafting.by_batch(self.vllm_config):
            self.dynamic_sd_lookup = BatchPolicy(drafting.pacing, lengths)

    @functools.wraps(schedule)
    def scheduled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.vllm_config.speculative_config, "method", None) != "sdfp":
            return schedule(self, *args, **kwargs)
        _trim_drafts(self)
        policy = _policy(self)
        if policy is not None and self.running:
            policy.ruled = sum(is_ruled(r.sampling_params) for r in self.running) / len(self.running)
        output = schedule(self, *args, **kwargs)
        if _nobody_wants_drafts(self, output):
            output.num_spec_tokens_to_schedule = 0
        return output

    @functools.wraps(stats)
    def make_spec_decoding_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = _policy(self)
        if policy is not None:
            request = self.requests[kwargs["request_id"]]
            policy.observe(
                kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"], is_ruled(request.sampling_params)
            )
        return stats(self, *args, **kwargs)

    Scheduler.__init__ = __init__  # type: ignore[method-assign]
    Scheduler.schedule = scheduled  # type: ignore[method-assign]
    Scheduler.make_spec_decoding_stats = make_spec_decoding_stats  # type: ignore[method-assign]
    setattr(Scheduler, _MARK, True)


def _policy(scheduler: Any) -> BatchPolicy | None:
    lookup = getattr(scheduler, "dynamic_sd_lookup", None)
    return lookup if isinstance(lookup, BatchPolicy) else None


def _trim_drafts(scheduler: Any) -> None:
    """Takes from running requests the drafts that they do not want, before they are scheduled to be verified.

    Where scheduling runs ahead these are places for drafts yet to come, in one list for all: hence a new one.
    """
    for request in scheduler.running:
        longest = limits(request.sampling_params).longest
        if len(request.spec_token_ids) > longest:
            request.spec_token_ids = request.spec_token_ids[:longest]


def _nobody_wants_drafts(scheduler: Any, output: Any) -> bool:
    """Whether a round's draft steps would be for nothing.

    Replicas that compute side by side (data parallel) must run the same number of steps: there each runs them all.
    """
    asked = output.num_scheduled_tokens
    return (
        bool(asked)
        and scheduler.vllm_config.parallel_config.data_parallel_size == 1
        and all(limits(scheduler.requests[name].sampling_params).longest == 0 for name in asked)
    )
