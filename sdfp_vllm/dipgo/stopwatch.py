"""Measures what a generation and the units in it take on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sdfp_vllm.common.machine import processor
from sdfp_vllm.dipgo.latency import Latency
from sdfp_vllm.dipgo.layout import Gates, Layout
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.sampling import Sampler

REPEATS = 5
_SEED = 4_000_000
_LEAST = 1e-9  # seconds; clocks that say less, or less than nothing, are taken to say this


def measure_latency(
    sampler: Sampler, layout: Layout, reuse: str, order: int, images: int = 1, repeats: int = REPEATS
) -> Latency:
    """Times whole generations and the units in them, warm, the best of `repeats`; kinds of generation take turns.

    Two generations fix the total and the rest: with all units in all calls, and with none but in the calls that
    reuse needs. What their difference gives for a call is shared out to the units as they take time in a plain run.
    """
    calls = sampler.calls
    everything = np.ones((calls, len(layout.units)), dtype=bool)
    least = ~everything
    for stage in sampler.rhythm.stages:
        least[stage : stage + order + 1] = True
    if least.all():  # so few steps that order 1 leaves nothing to close: from the last value, then
        least[-1] = len(least) - 1 in sampler.rhythm.stages
    closed = max(int((~least[:, 0]).sum()), 1)
    seeds = [_SEED + i for i in range(images)]

    def plain() -> None:
        sampler.latents(seeds)

    def hooked(gates: Gates) -> Callable[[], None]:
        def run() -> None:
            with Skipping(sampler.denoisers, layout, gates, reuse, order, sampler.rhythm, hook_all=True):
                plain()

        return run

    with torch.no_grad():
        full, all_run, few_run = _best([plain, hooked(everything), hooked(least)], repeats, sampler)
        in_units = np.mean(
            [_unit_seconds(layout.modules(each), plain, repeats, sampler) for each in sampler.denoisers],
            axis=0,
        ).tolist()
    a_call = max((all_run - few_run) / closed, _LEAST)
    return Latency(
        machine=_machine(sampler),
        images=images,
        units=[max(a_call * s / sum(in_units), _LEAST) for s in in_units],
        rest=max(all_run / calls - a_call, _LEAST),
        full=full,
    )


def _best(runs: Sequence[Callable[[], None]], repeats: int, sampler: Sampler) -> list[float]:
    """Least seconds of each run, after one that warms up."""
    best = [float("inf")] * len(runs)
    for repeat in range(repeats + 1):
        for i, run in enumerate(runs):
            began = now(sampler)
            run()
            if repeat:
                best[i] = min(best[i], now(sampler) - began)
    return best


def _unit_seconds(
    units: Sequence[nn.Module], run: Callable[[], None], repeats: int, sampler: Sampler
) -> list[float]:
    """Least seconds that each unit took for a call."""
    best = [float("inf")] * len(units)
    began = [0.0] * len(units)
    handles: list[Any] = []

    def start(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            began[i] = now(sampler)

        return hook

    def stop(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            best[i] = min(best[i], now(sampler) - began[i])

        return hook

    for i, module in enumerate(units):
        handles += [module.register_forward_pre_hook(start(i)), module.register_forward_hook(stop(i))]
    try:
        for _ in range(repeats):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [max(seconds, _LEAST) for seconds in best]


def now(sampler: Sampler) -> float:
    """Seconds. Of the processor where one thread does all the work: other work on the machine is not in them then."""
    if _on_gpu(sampler):
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


def _on_gpu(sampler: Sampler) -> bool:
    return next(sampler.denoiser.parameters()).is_cuda


def _machine(sampler: Sampler) -> str:
    if _on_gpu(sampler):
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"
