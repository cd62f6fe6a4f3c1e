"""What the finished plan gives on the real engine, against plain decoding; and with which window after long texts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure.memory import run_as_memory_allows
from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn, TurnMeasurement, one_by_one
from sdfp_vllm.plan.schema import SkipPlan, Speeds
from sdfp_vllm.planner.engine_setup import ROOM, engine_is_here, engine_settings, stored_dtype
from sdfp_vllm.planner.long_texts import LongText
from sdfp_vllm.planner.search import WORTHWHILE
from sdfp_vllm.planner.window_search import (
    CONTEXTS,
    LASTS,
    best_window,
    kv_gigabytes,
    tried_of,
    turns_of,
)
from sdfp_vllm.planner.work import Work

_NEW_TOKENS = 40


def with_check(
    work: Work, plan: SkipPlan, prompts: list[list[int]], long: Sequence[LongText] = ()
) -> SkipPlan:
    """`plan`, saved in the job's folder, with what plain decoding and the plan give on the engine, and a verdict from that.

    With a window too where one is faster after `long` texts, tried on the same engine.

    Args:
        prompts: Token ids; none that drafts were tried on.
    """
    if not engine_is_here() or plan.costs is None:
        return plan
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    check = _Check(work, plan, prompts, long)
    with work.bar.step("Check on the engine", check.steps) as advance:
        step = lambda engine, done: advance(1)  # noqa: E731
        try:
            return check.run(step)
        except SdfpError:
            if check.is_bare:
                raise
            # The machine may not run the checkpoint's own dtype, or not hold long contexts: the plan is checked all the same.
            return _Check(work, plan, prompts, bare=True).run(step)


class _Check:
    """Plain decoding, the plan and plain decoding in the checkpoint's own dtype, in turns; then windows on the plan's engine.

    Args:
        bare: Without the latter two.
    """

    def __init__(
        self,
        work: Work,
        plan: SkipPlan,
        prompts: list[list[int]],
        long: Sequence[LongText] = (),
        bare: bool = False,
    ):
        assert plan.costs is not None
        self._work, self._plan, self._prompts = work, plan, prompts
        self._dtype, self._stored = plan.costs.dtype, stored_dtype(work.model_dir)
        asked = one_by_one(prompts, _NEW_TOKENS)
        drafted = [t.model_copy(update={"copies": copies}) for t in asked for copies in (False, True)]
        longest = max((len(t.document) for t in long), default=0)
        contexts = [c for c in CONTEXTS if c <= longest]
        self._windows = turns_of(long, contexts, plan.num_speculative_tokens)
        ours: dict[str, Any] = {"method": "sdfp", "model": str(work.folder)}
        if long:
            ours["window"] = LASTS[-1]  # an engine is set up for one; the check's prompts are shorter
        self._specs = [
            self._spec(None, self._dtype, asked),
            self._spec(ours, self._dtype, drafted + self._windows, longest),
        ]
        if self._stored != self._dtype and not bare:
            self._specs.append(self._spec(None, self._stored, asked))
        self.is_bare = not long and len(self._specs) == 2
        self.steps = sum(1 + len(s.turns) for s in self._specs)

    def run(self, on_step: Callable[[int, int], None]) -> SkipPlan:
        """Raises SdfpError if an engine fails."""
        results, _ = run_as_memory_allows(self._specs, self._plan.extra_bytes, on_step)
        plain, ours, *other = results
        checked = len(ours.turns) - len(self._windows)
        speeds = self._speeds(plain, ours.turns[:checked], other)
        worthwhile = max(speeds.drafted, speeds.copies) > WORTHWHILE * speeds.plain
        plan = self._plan.model_copy(update={"check": speeds, "worthwhile": worthwhile})
        if not self._windows:
            return plan
        tried = tried_of(self._windows, ours.turns[checked:])
        return plan.with_window(best_window(tried)).model_copy(update={"windows": tried})

    def _speeds(
        self, plain: Measurement, ours: list[TurnMeasurement], other: Sequence[Measurement]
    ) -> Speeds:
        alone, copying = (plain.model_copy(update={"turns": ours[i::2]}) for i in (0, 1))
        whole = alone.whole
        wanted = [t.token_ids for t in plain.turns]
        return Speeds(
            plain=plain.decode_tokens_per_second,
            drafted=alone.decode_tokens_per_second,
            copies=copying.decode_tokens_per_second,
            other=other[0].decode_tokens_per_second if other else None,
            other_dtype=self._stored if other else None,
            acceptance_rate=whole.acceptance_rate or 0.0,
            mean_accepted_length=whole.mean_accepted_length or 1.0,
            prompts=len(self._prompts),
            identical=sum(t.token_ids == w for t, w in zip(alone.turns, wanted, strict=True)),
            engine="eager" if self._work.options.eager else "compiled",
        )

    def _spec(
        self, speculative: dict[str, Any] | None, dtype: str, turns: list[Turn], positions: int = 0
    ) -> EngineSpec:
        """An engine for the check's prompts, and for texts of `positions`, which its prefix cache holds."""
        work = self._work
        asked = max(map(len, self._prompts)) + _NEW_TOKENS
        settings = engine_settings(work.identity, max(asked, positions - ROOM), work.options)
        room = 1
        if positions:
            settings["enable_prefix_caching"] = True
            room = max(room, kv_gigabytes(work.model_dir, dtype, positions))
        return EngineSpec(
            model=str(work.model_dir),
            turns=turns,
            warm_up=self._prompts[0],
            speculative=speculative,
            dtype=dtype,
            seed=None,  # a seed would fix the draft lengths
            ignore_eos=True,  # an answer of one token has no speed
            engine=settings,
            environment={"VLLM_CPU_KVCACHE_SPACE": str(room)},
        )
