"""Improves patterns on real generations, and decides on images that nothing was chosen on how far to believe that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdfp_vllm.dipgo.descent import path
from sdfp_vllm.dipgo.prediction import Surrogate
from sdfp_vllm.dipgo.quality import psnr
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.surrogate import record, seen
from sdfp_vllm.dipgo.task import Pattern, Task

MAX_SLIDING = 15.0  # full generations' worth of MACs


@dataclass(frozen=True)
class Reference:
    """Seeds, and what is seen of the full run on them."""

    seeds: Sequence[int]
    images: Tensor

    @classmethod
    def of(cls, sampler: Sampler, seeds: Sequence[int]) -> Reference:
        with torch.no_grad():
            return cls(seeds, seen(sampler, sampler.latents(seeds)))

    def part(self, index: int, size: int) -> Reference:
        """`size` of the images, others for every index until all have been."""
        first = index * size % len(self.seeds)
        return Reference(self.seeds[first : first + size], self.images[first : first + size])


def likeness(task: Task, pattern: Pattern, to: Reference) -> Tensor:
    """PSNR in dB of each decoded image to the full run's: what a plan is stated by, and so what all real trials go by.

    Latents tell another story: what overshoots the range of images does not show in them.
    """
    with torch.no_grad():
        made = task.run(pattern.gates, to.seeds, pattern.kinds)
        return psnr(seen(task.sampler, made), to.images)


def slides(pattern: Pattern, stages: Sequence[int] = (0,)) -> list[Pattern]:
    """Every pattern with two neighbouring steps changed over, where that changes anything; first steps stay."""
    found = []
    for t in range(len(pattern.gates) - 1):
        if not {t, t + 1} & set(stages) and (pattern.gates[t] != pattern.gates[t + 1]).any():
            gates, kinds = pattern.gates.copy(), pattern.kinds.copy()
            for rows in (gates, kinds):
                rows[[t, t + 1]] = rows[[t + 1, t]]
            found.append(Pattern(gates, kinds))
    return found


def slide(task: Task, pattern: Pattern, compare: Reference, generations: float = MAX_SLIDING) -> Pattern:
    """Moves whole steps to neighbouring places, each time the move that helps most on real generations, until none does.

    Costs nothing of the budget, for the same units run as often. Where few steps are left the recorded prediction is
    far from what it was recorded on, and a generation costs little: so each move is tried for real.

    Args:
        generations: What the trials may cost together, in full generations.
    """
    reached = float(likeness(task, pattern, compare).mean())
    while True:
        trials = slides(pattern, task.stages)
        generations -= len(trials) * task.macs.share(pattern.gates)
        if not trials or generations < 0:
            return pattern
        most, best = max((float(likeness(task, p, compare).mean()), -i) for i, p in enumerate(trials))
        if most <= reached:
            return pattern
        pattern, reached = trials[-best], most


def refine(
    task: Task,
    pattern: Pattern,
    recorded: Reference,
    compare: Reference,
    rounds: int,
    projections: int,
    at_once: int,
    kinds: str | None = None,
    advance: Callable[..., None] = lambda count, title=None: None,
) -> list[Pattern]:
    """Coordinate descent on real generations: each round records the present pattern anew and follows what that says.

    The surrogate is exact only near the generation it was recorded on. So a round tries the way
    to its optimum from the far end: the whole way, then half the swaps, a quarter, down to one;
    the first that is nearer to the full run on `compare` is kept, and a round without one is the last.

    Args:
        compare: Images that decide, others than those recorded.
        projections: Backward passes per round.
        at_once: Images that a round records: of `recorded`, others than the round before, so that none is fitted twice in a row.
        kinds: The forecasts to choose from; by default that of the task's order.
        advance: Called with 1 after each round.

    Returns:
        The patterns kept, in order, beginning with the one given. The first rounds are the same however many follow.
    """
    line = [pattern]
    reached = float(likeness(task, pattern, compare).mean())
    for done in range(rounds):
        surrogate = around(task, pattern, recorded.part(done, at_once), projections)
        way = path(task, surrogate, pattern, kinds)
        length = len(way)
        while length:
            trial = float(likeness(task, way[length - 1], compare).mean())
            if trial > reached:
                pattern, reached = way[length - 1], trial
                line.append(pattern)
                break
            length //= 2
        advance(1, f"Refining: {reached:.1f} dB")
        if not length:
            advance(rounds - done - 1)
            break
    return line


def around(task: Task, pattern: Pattern, recorded: Reference, projections: int) -> Surrogate:
    """The prediction from a recording of what `pattern` gives."""
    return record(
        task.sampler, task.layout, task.reuse, task.order, recorded.seeds, projections,
        pattern.gates, recorded.images, pattern.kinds, cautious=True,
    )  # fmt: skip


def surest(task: Task, line: Sequence[Pattern], judges: Reference) -> tuple[Pattern, Tensor]:
    """The last of `line` that is better than those chosen before it by more than chance; and its likeness.

    Whoever chooses among many on few images chooses what fits those. So `judges` are none that the line was made on, and
    a gain counts if it is more than one standard error of its mean over images: a longer line ends where
    a shorter one does, or better on `judges`.
    """
    chosen, reached = line[0], likeness(task, line[0], judges)
    for pattern in line[1:]:
        trial = likeness(task, pattern, judges)
        if sure(trial - reached):
            chosen, reached = pattern, trial
    return chosen, reached


def sure(gain: Tensor) -> bool:
    """Whether a gain on some images is more than one standard error of its mean."""
    return bool(gain.mean() > gain.std(correction=0) / len(gain) ** 0.5)
