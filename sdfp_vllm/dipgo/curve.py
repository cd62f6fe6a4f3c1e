"""Our search: the nearest pattern to the full run within each of some budgets, largest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from sdfp_vllm.common.progress import Stages
from sdfp_vllm.dipgo.descent import MAX_SWAPS, evenly, greedy, path
from sdfp_vllm.dipgo.forecast import KINDS
from sdfp_vllm.dipgo.layout import Granularity
from sdfp_vllm.dipgo.options import SearchOptions
from sdfp_vllm.dipgo.prediction import Surrogate
from sdfp_vllm.dipgo.refine import Reference, likeness, refine, slide, surest
from sdfp_vllm.dipgo.room import limit
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.schedule import scheduled
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import Found, Pattern, Task, task_of

# Seeds of images: those recorded, those that patterns are compared on, those that decide between them in the end.
RECORD, COMPARE, JUDGE = 1_000_000, 2_000_000, 2_500_000
_RECORDED, _COMPARED, _JUDGED = 3, 2, 6  # times as many images as are recorded at once
_KEPT = 2  # of the patterns that the prediction leads to
_FIRST = (1, 3)  # steps that run whatever they cost, in schedules of whole steps
_POWERS = (1.0, 0.5)  # how their errors are summed

Begun = dict[tuple[str, int], Pattern]  # by kinds of forecast and most swaps


@dataclass(frozen=True)
class Images:
    """The three sets of images of a search, none of which is in another.

    A set that something was chosen on flatters what was chosen: so recordings, comparisons and the last word have each their own.
    """

    recorded: Reference
    compare: Reference
    judges: Reference


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
    images = _images(sampler, options)
    kinds = "".join(KINDS) if options.order is None else str(options.order)
    ends: list[list[Ended]] = [[] for _ in budgets]
    ways = _ways(sampler, options, budgets)
    with progress.step("Searching", len(ways) * len(budgets) * (options.rounds + 2)) as advance:
        for granularity, task in ways:
            opened = record(
                sampler, task.layout, task.reuse, task.order, images.recorded.seeds, options.projections,
                at_once=options.images, cautious=True,
            )  # fmt: skip
            begun: Begun = {}
            for budget, ended in zip(budgets, ends, strict=True):
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
        tried = [self._try(p) for p in self._begin(opened, begun)]
        line = [p for _, p in sorted(tried, key=lambda t: t[0])[-_KEPT:]]
        advance(1, f"{self.granularity}, {task.budget:.0%}: {max(t[0] for t in tried):.1f} dB")
        # What is on this line is there too when more rounds follow, so that more search never ends worse.
        if options.rounds and _whole_steps(line[-1]):
            line.append(slide(task, line[-1], images.compare))
        advance(1)
        line += refine(
            task, line[-1], images.recorded, images.compare,
            options.rounds, options.projections, options.images, self.kinds, advance,
        )[1:]  # fmt: skip
        return Ended(self.granularity, task, *surest(task, line, images.judges))

    def _begin(self, opened: Surrogate, begun: Begun) -> list[Pattern]:
        """Patterns within the budget to try: by one kind of forecast and by a choice of kinds, as far as cancellation is believed."""
        task = self.task
        found: list[Pattern] = []
        for kinds in dict.fromkeys([str(task.order), self.kinds]):
            # Near the full run errors do cancel as predicted; far from it, and in swaps, they must not be believed to.
            for surrogate, swaps in ((opened.with_caution(0.0), 0), (opened, MAX_SWAPS)):
                pattern = begun[kinds, swaps] = greedy(task, surrogate, begun.get((kinds, swaps)), kinds)
                found.append([pattern, *path(task, surrogate, pattern, kinds, swaps)][-1])
        # Closing gates one by one never moves a step that is there: whole steps are tried by themselves, first ones kept or not.
        if opened.additive:
            for first, power in product(_FIRST, _POWERS):
                if (steps := scheduled(task, opened, self.kinds, first, power)) is not None:
                    found += [steps, *path(task, opened, steps, self.kinds)[-1:]]
        # None of them is always better than even steps, where few are left.
        if self.granularity == "step":
            found += [Pattern.of(evenly(task), kind) for kind in self.kinds[:2]]
        return found

    def _try(self, pattern: Pattern) -> tuple[float, Pattern]:
        return float(likeness(self.task, pattern, self.images.compare).mean()), pattern


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
    return Images(
        *(
            Reference.of(sampler, [base + first + i for i in range(count)])
            for base, count in zip((RECORD, COMPARE, JUDGE), counts, strict=True)
        )
    )


def _ways(
    sampler: Sampler, options: SearchOptions, budgets: Sequence[float]
) -> list[tuple[Granularity, Task]]:
    """Every granularity that the options leave open, with its way of reuse."""
    granularities: list[Granularity] = [options.granularity] if options.granularity else ["block", "step"]
    found: list[tuple[Granularity, Task]] = []
    for granularity in granularities:
        reuse = options.reuse or ("residual" if sampler.layout(granularity).residual else "output")
        order = 1 if options.order is None else options.order
        task = task_of(sampler, granularity, reuse, order, min(budgets), options.cost, options.latency_images)
        found.append((granularity, task))
    return found
