"""Our search: the nearest pattern to the full run within each of some budgets, largest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from sdfp_vllm.common.progress import Stages
from sdfp_vllm.dipgo.descent import MAX_SWAPS, evenly, greedy, path
from sdfp_vllm.dipgo.families import has_branches
from sdfp_vllm.dipgo.forecast import KINDS
from sdfp_vllm.dipgo.layout import Granularity
from sdfp_vllm.dipgo.options import SearchOptions
from sdfp_vllm.dipgo.outputs import Norm, Outputs
from sdfp_vllm.dipgo.prediction import Surrogate
from sdfp_vllm.dipgo.refine import Reference, likeness, refine, slide, surest
from sdfp_vllm.dipgo.room import limit
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.schedule import predicted, scheduled
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import Found, Pattern, Task, refuse_below, task_of

# Seeds of images: those recorded, those that patterns are compared on, those that decide between them in the end.
RECORD, COMPARE, JUDGE = 1_000_000, 2_000_000, 2_500_000
_RECORDED, _COMPARED, _JUDGED = 3, 2, 6  # times as many images as are recorded at once
_LOOKED_AT = 6  # patterns that are left of those to begin with after a first look, on a quarter of the images
_FURTHER = 2  # schedules among them that are followed further on the prediction
_KEPT = 2  # patterns of all that are compared
_FIRST = (1, 3)  # steps that run whatever they cost, in schedules of whole steps
_POWERS = (1.0, 0.5)  # how their predicted errors are summed
_NORMS: tuple[Norm, ...] = ("absolute", "squared")  # of their outputs' errors

Begun = dict[tuple[str, int], Pattern]  # by kinds of forecast and most swaps


@dataclass(frozen=True)
class Images:
    """The three sets of images of a search, none of which is in another.

    A set that something was chosen on flatters what was chosen: so recordings, comparisons and the last word have each their own.
    """

    recorded: Reference
    compare: Reference
    judges: Reference
    outputs: Outputs


@dataclass(frozen=True)
class Ended:
    """Where the search of one granularity ended for one budget, and how near that is on each of the judges' images."""

    granularity: Granularity
    task: Task
    pattern: Pattern
    reached: Tensor


def find_curve(
    sampler: Sampler, options: SearchOptions, budgets: Sequence[float], progress: Stages
) -> list[Found]:
    """The search for several budgets at once; what is found, largest budget first.

    Gates are closed one by one on one prediction, so the pattern that a budget begins with is on the way to those of the smaller
    ones. What a smaller budget ended with is within a larger one: on the judges' images no larger budget ends less near.
    """
    budgets = sorted(set(budgets), reverse=True)
    limit(sampler, options.memory)
    ways = _ways(sampler, options, budgets)
    images = _images(sampler, options)
    kinds = "".join(KINDS) if options.order is None else str(options.order)
    ends: list[list[Ended]] = [[] for _ in budgets]
    with progress.step("Searching", len(ways) * len(budgets) * (options.rounds + 2)) as advance:
        for granularity, task in ways:
            opened = record(
                sampler, task.layout, task.reuse, task.order, images.recorded.seeds, options.projections,
                at_once=options.images, cautious=True,
            )  # fmt: skip
            begun: Begun = {}
            for budget, ended in zip(budgets, ends, strict=True):
                if budget < task.least:  # of smaller units more is left that always runs
                    advance(options.rounds + 2)
                    continue
                search = _Search(granularity, replace(task, budget=budget), images, kinds, options)
                ended.append(search.run(opened, begun, advance))
    best = [max(each, key=_nearness) for each in ends]
    return [_found(e) for e in without_dips(best)]


def without_dips(best: Sequence[Ended]) -> list[Ended]:
    """With the end of a smaller budget in place of every end that is less near; `best` is of falling budgets."""
    kept: list[Ended] = []
    for ended in reversed(best):
        if kept and _nearness(kept[-1]) > _nearness(ended):
            ended = replace(kept[-1], task=replace(kept[-1].task, budget=ended.task.budget))
        kept.append(ended)
    return kept[::-1]


def _nearness(ended: Ended) -> float:
    return float(ended.reached.mean())


@dataclass(frozen=True)
class _Search:
    """The search of one granularity for one budget."""

    granularity: Granularity
    task: Task
    images: Images
    kinds: str
    options: SearchOptions

    def run(self, opened: Surrogate, begun: Begun, advance: Callable[..., None]) -> Ended:
        """From the prediction around the full run to the pattern that the judges' images are surest of.

        Args:
            begun: Where closing gates one by one ended for the next larger budget, from which it goes on here.
        """
        task, images, options = self.task, self.images, self.options
        first = images.compare.part(0, max(1, len(images.compare.seeds) // 4))
        closed = {_key(p): p for p in self._closed(opened, begun)}
        schedules = {_key(p): p for p in self._schedules(opened)}
        some = self._nearest([*(closed | schedules).values()], first, _LOOKED_AT)
        if opened.additive:
            from_steps = [p for p in some if _key(p) in schedules][-_FURTHER:]
            some += [p for steps in from_steps for p in path(task, opened, steps, self.kinds)[-1:]]
        line = self._nearest(some, images.compare, _KEPT)
        advance(1, f"{self.granularity}, {task.budget:.0%}: begun with {len(schedules)} schedules")
        # What is on this line is there too when more rounds follow, so that more search never ends worse.
        if options.rounds and _whole_steps(line[-1]):
            line.append(slide(task, line[-1], images.compare))
        advance(1)
        line += refine(
            task, line[-1], images.recorded, images.compare,
            options.rounds, options.projections, options.images, self.kinds, advance,
        )[1:]  # fmt: skip
        return Ended(self.granularity, task, *surest(task, line, images.judges))

    def _closed(self, opened: Surrogate, begun: Begun) -> list[Pattern]:
        """Gates closed one by one: by one kind of forecast and by a choice of kinds, as far as cancellation is believed."""
        task = self.task
        found: list[Pattern] = []
        for kinds in dict.fromkeys([str(task.order), self.kinds]):
            # Near the full run errors do cancel as predicted; far from it, and in swaps, they must not be believed to.
            for surrogate, swaps in ((opened.with_caution(0.0), 0), (opened, MAX_SWAPS)):
                pattern = begun[kinds, swaps] = greedy(task, surrogate, begun.get((kinds, swaps)), kinds)
                found.append([pattern, *path(task, surrogate, pattern, kinds, swaps)][-1])
        return found

    def _schedules(self, opened: Surrogate) -> list[Pattern]:
        """Whole steps: closing gates one by one never moves one that is there.

        By what the outputs err by and by what images are predicted to, by one kind of forecast and by a choice, first steps kept or
        not: each of them is nearest for some model and budget. So are even steps, where few are left.
        """
        task = self.task
        errors = [self.images.outputs.errors(norm) for norm in _NORMS]
        if opened.additive:
            errors += [predicted(opened, power) for power in _POWERS]
        kinds = dict.fromkeys([*self.kinds[:2], self.kinds])
        found = [scheduled(task, *each) for each in product(errors, kinds, _FIRST)]
        if self.granularity == "step":
            found += [Pattern.of(evenly(task), kind) for kind in self.kinds[:2]]
        return [p for p in found if p is not None]

    def _nearest(self, patterns: Sequence[Pattern], to: Reference, count: int) -> list[Pattern]:
        """The `count` patterns that are nearest, the nearest last."""
        nearness = [float(likeness(self.task, p, to).mean()) for p in patterns]
        return [patterns[i] for i in sorted(range(len(patterns)), key=nearness.__getitem__)[-count:]]


def _key(pattern: Pattern) -> tuple[bytes, str]:
    """The same for patterns that do the same."""
    return pattern.gates.tobytes(), "".join(pattern.kinds[~pattern.gates].tolist())


def _whole_steps(pattern: Pattern) -> bool:
    """Whether in each step all units run, or none."""
    return bool((pattern.gates == pattern.gates[:, :1]).all())


def _found(ended: Ended) -> Found:
    """With the order of the forecasts where they are all of one."""
    task, gates = ended.task, ended.task.layout.closure(ended.pattern.gates, ended.task.reuse)
    used = set(ended.pattern.kinds[~gates].tolist())
    if used <= {"0"} or used == {"1"}:
        return Found(ended.granularity, replace(task, order=int("1" in used)), gates)
    return Found(ended.granularity, task, gates, forecasts=ended.pattern.kinds)


def _images(sampler: Sampler, options: SearchOptions) -> Images:
    first = options.seed * 10_007
    counts = (n * options.images for n in (_RECORDED, _COMPARED, _JUDGED))
    recorded, compare, judges = (
        [base + first + i for i in range(count)]
        for base, count in zip((RECORD, COMPARE, JUDGE), counts, strict=True)
    )
    with Outputs(sampler).listening() as outputs:
        seen = Reference.of(sampler, recorded)
    return Images(seen, Reference.of(sampler, compare), Reference.of(sampler, judges), outputs)


def _ways(
    sampler: Sampler, options: SearchOptions, budgets: Sequence[float]
) -> list[tuple[Granularity, Task]]:
    """Every granularity that the options leave open, with its way of reuse.

    Raises:
        SdfpError: If none of them has plans within the least budget.
    """
    found: list[tuple[Granularity, Task]] = []
    for granularity in _granularities(sampler, options):
        reuse = options.reuse or ("residual" if sampler.layout(granularity).residual else "output")
        order = 1 if options.order is None else options.order
        task = task_of(sampler, granularity, reuse, order, math.inf, options.cost, options.latency_images)
        found.append((granularity, task))
    refuse_below(min(task.least for _, task in found), min(budgets), options.cost)
    return [(granularity, task) for granularity, task in found if task.least <= max(budgets)]


def _granularities(sampler: Sampler, options: SearchOptions) -> list[Granularity]:
    if options.granularity:
        return [options.granularity]
    found: list[Granularity] = ["block"]
    if options.reuse != "output" and all(map(has_branches, sampler.denoisers)):
        found.insert(0, "branch")
    if options.reuse != "residual":  # of the whole network there is none
        found.append("step")
        if sampler.guided:
            found.append("guidance")
    return found
