"""Counts of what drafting does, on the server's /metrics beside vLLM's own.

They arise in a worker and are read in the front end, another process. On the way they ride on what goes there anyway: from
the worker to the scheduler with a round's drafts, from the scheduler to the front end with vLLM's statistics of a step.
So no clock, file or message is added, and of several workers the one whose drafts count is the one that counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import sdfp_vllm
from sdfp_vllm.engine.drafting import Drafting

_MARK = "_sdfp_counts"
PREFIX = "sdfp:"

# What a paced round adds to, by the counter's name without prefix and "_total".
COUNTERS = {
    "rounds": "Rounds in which some request could be drafted for, and pacing decided.",
    "paused_rounds": "Of these, rounds in which nothing was drafted.",
    "model_draft_tokens": "Tokens drafted by the model's cheaper view.",
    "copied_draft_tokens": "Tokens copied from the context as drafts.",
    "draft_milliseconds": "Milliseconds spent in drafting in these rounds, the decisions included.",
}
INFO = "info"  # a gauge that is 1: its labels say which SDFP this is and how it drafts


class CountedDrafts(list[list[int]]):
    """The drafts of a paced round, one list per request, and what the round adds to COUNTERS.

    The V1 runner hands a list of drafts on to the scheduler as it is, from process to process too.
    """

    def __init__(self, drafts: list[list[int]], counts: dict[str, float]):
        super().__init__(drafts)
        self.counts = counts

    def __reduce__(self) -> Any:
        return type(self), (list(self), self.counts)


def counts_of(rows: Any, milliseconds: float) -> dict[str, float]:
    """Returns what a round adds to COUNTERS; `rows` are its requests, each a `Row` of the pacing policy.

    A round in which nobody could use a draft (prefills, last tokens, requests that want none) is none to pace.
    """
    copied = sum(row.drafts for row in rows if row.copies)
    drafted = sum(row.drafts for row in rows)
    paced = any(row.kind is not None and row.most > 0 for row in rows)
    return {
        "rounds": float(paced),
        "paused_rounds": float(paced and not drafted),
        "model_draft_tokens": drafted - copied,
        "copied_draft_tokens": copied,
        "draft_milliseconds": milliseconds * paced,
    }


def count_drafts() -> None:
    """Makes vLLM carry our counts and show them; does nothing for an engine that drafts otherwise."""
    from vllm.v1.metrics.stats import SchedulerStats

    if hasattr(SchedulerStats, _MARK):
        return
    _add_field(SchedulerStats)
    _carry()
    _show()
    setattr(SchedulerStats, _MARK, True)


def _add_field(stats: Any) -> None:
    """Gives vLLM's statistics of a step a field of ours, which the encoder between its processes then knows.

    Nothing in vLLM's own is free for others. The encoder reads a dataclass's fields when it first meets the class, which
    is after a configuration is built. Checked on 0.32.0 with msgspec.
    """
    with_ours = dataclasses.make_dataclass("_WithOurs", [("sdfp", dict[str, float] | None, None)])
    stats.__annotations__["sdfp"] = dict[str, float] | None
    stats.__dataclass_fields__["sdfp"] = with_ours.__dataclass_fields__["sdfp"]  # type: ignore[attr-defined]
    stats.sdfp = None


def _carry() -> None:
    """Makes the scheduler take the counts off a round's drafts and put them on the next step's statistics.

    That step verifies the drafts, so that our counts stand beside vLLM's of the same drafts.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    update, make = Scheduler.update_draft_token_ids, Scheduler.make_stats

    @functools.wraps(update)
    def update_draft_token_ids(self: Any, draft_token_ids: Any) -> None:
        drafts = draft_token_ids.draft_token_ids
        if isinstance(drafts, CountedDrafts):
            self._sdfp_counts = Counter(getattr(self, "_sdfp_counts", {}))
            self._sdfp_counts.update(drafts.counts)
        update(self, draft_token_ids)

    @functools.wraps(make)
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats: Any = make(self, *args, **kwargs)
        if stats is not None:
            stats.sdfp = dict(getattr(self, "_sdfp_counts", {})) or None
            self._sdfp_counts = Counter()
        return stats

    Scheduler.update_draft_token_ids = update_draft_token_ids  # type: ignore[method-assign]
    Scheduler.make_stats = make_stats  # type: ignore[method-assign]


def _show() -> None:
    """Makes the logger behind /metrics count what the statistics carry, labelled as vLLM's own are.

    Not a stat logger of our own: vLLM asks for those by a user's argument, and one that is given takes vLLM's place on some
    routes. `self._counter_cls` is Ray's on Ray Serve.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    start, record = PrometheusStatLogger.__init__, PrometheusStatLogger.record

    @functools.wraps(start)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self._sdfp_counters = _counters(self)

    @functools.wraps(record)
    def recorded(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        record(self, scheduler_stats, *args, **kwargs)
        for name, count in (getattr(scheduler_stats, "sdfp", None) or {}).items():
            self._sdfp_counters[name][kwargs.get("engine_idx", 0)].inc(count)

    PrometheusStatLogger.__init__ = __init__  # type: ignore[method-assign]
    PrometheusStatLogger.record = recorded  # type: ignore[method-assign]


def _counters(logger: Any) -> dict[str, dict[int, Any]]:
    """Makes our metrics for each engine; counters only where rounds are paced by request, and would move."""
    _forget_former()
    config, drafting = logger.vllm_config, getattr(logger.vllm_config.speculative_config, "drafting", None)
    if not isinstance(drafting, Drafting):
        return {}
    labels, engines = ["model_name", "engine"], logger.per_engine_labelvalues
    info = logger._gauge_cls(
        name=PREFIX + INFO,
        documentation="1: drafts come from SDFP, of this version; how many is paced by request, by batch, or fixed.",
        multiprocess_mode="mostrecent",
        labelnames=[*labels, "version", "drafting"],
    )
    how = (
        "by request" if drafting.by_request(config) else "by batch" if drafting.by_batch(config) else "fixed"
    )
    for values in engines.values():
        info.labels(*values, sdfp_vllm.__version__, how).set(1)
    if how != "by request":
        return {}
    made = {
        name: logger._counter_cls(name=PREFIX + name, documentation=meaning, labelnames=labels)
        for name, meaning in COUNTERS.items()
    }
    return {
        name: {index: counter.labels(*values) for index, values in engines.items()}
        for name, counter in made.items()
    }


def _forget_former() -> None:
    """Takes the metrics of a former engine of this process out of the registry, as vLLM does with its own."""
    from prometheus_client import REGISTRY

    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)
