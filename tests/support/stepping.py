"""Driving an in-process engine step by step: requests that join late, are aborted, or come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Arrival:
    """A request and when it comes and goes, in engine steps counted from 0."""

    name: str
    prompt: Sequence[int]
    step: int = 0
    abort_after: int | None = None  # tokens it may produce before it is aborted
    params: Mapping[str, Any] = field(default_factory=dict)


def play(
    llm: Any, arrivals: Sequence[Arrival], after_step: Callable[[], None] | None = None
) -> dict[str, list[int]]:
    """Runs `arrivals` to the end; returns name -> token ids, of aborted requests what they had by then.

    `after_step` is called after every engine step, while the engine stands still.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    waiting = sorted(arrivals, key=lambda a: a.step)
    limits = {a.name: a.abort_after for a in arrivals if a.abort_after is not None}
    answers: dict[str, list[int]] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0].step <= step:
            a = waiting.pop(0)
            settings = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True, **a.params}
            engine.add_request(a.name, {"prompt_token_ids": list(a.prompt)}, SamplingParams(**settings))
        for out in engine.step():
            answers[out.request_id] = list(out.outputs[0].token_ids)
            limit = limits.get(out.request_id)
            if limit is not None and not out.finished and len(answers[out.request_id]) >= limit:
                engine.abort_request([out.request_id])
                del limits[out.request_id]
        step += 1
        if after_step is not None:
            after_step()
    return answers


def scheduler(llm: Any) -> Any:
    """The V1 scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler
