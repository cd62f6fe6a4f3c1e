"""Which step of which generation a denoiser is in, told from the timestep it is given and from who gives it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from sdfp_vllm.dipgo.owner import Whose, owner_of
from sdfp_vllm.dipgo.rhythm import Rhythm, rhythm_of
from sdfp_vllm.dipgo.streams import place_of
from sdfp_vllm.errors import SdfpError

WHERE = "DiP-GO plan"
_UNFINISHED = 4  # loops without a pipeline that a thread may have under way: nobody says when one is given up
# How far a timestep may be from the plan's: a pipeline in half precision rounds it, Flux after dividing by 1000 again.
_ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-9}
_EXACT = 1e-5


class Generation:
    """A generation under way: the step it is in, the call within it, and in `kept` what hooks remember of it."""

    def __init__(self, owner: Whose):
        self.owner = owner
        self.step = -1
        self.branch = 0
        self.branches: int | None = None  # calls in a step, once that is known
        self.kept: dict[Hashable, Any] = {}


class Clock:
    """Keeps every generation's `step` and `branch` in line with `rhythm`, by a hook on each denoiser.

    Generations in several threads, or one inside another, do not meet. One that was broken off is forgotten when the
    same thread begins another.

    Args:
        on_start: Called with the pipeline (None: there is none) before the first call of every generation; may refuse it.
        on_call: Called with the generation, at its new step and branch, and the call's arguments before every call; may refuse it.
        on_done: Called with the generation after every call.

    Attributes:
        count_calls: Whether the calls in a step are those of each generation's first one, whatever `rhythm` says of them.
    """

    count_calls = False

    def __init__(
        self,
        rhythm: Rhythm | Sequence[float],
        on_start: Callable[[Any], None] = lambda pipe: None,
        on_call: Callable[[Generation, tuple, dict[str, Any]], None] = lambda generation, args, kwargs: None,
        on_done: Callable[[Generation], None] = lambda generation: None,
    ):
        # Somebody who kept the denoiser's `forward` from before may put a hook back that was taken off.
        self.removed = False
        self._rhythm = rhythm_of(rhythm)
        self._on_start, self._on_call, self._on_done = on_start, on_call, on_done
        self._under_way: dict[Hashable, Generation] = {}
        self._inside: dict[threading.Thread, Generation] = {}

    def hook(self, stage: int = 0) -> ModelHook:
        """A new root hook for the denoiser of `stage`."""
        return _Tick(self, stage)

    @property
    def now(self) -> Generation:
        """The generation of the denoiser call that this thread is in.

        Raises:
            SdfpError: If it is in none: something has taken the hook off.
        """
        generation = self._inside.get(threading.current_thread())
        if generation is None:
            raise SdfpError(
                WHERE,
                "its hook on the denoiser was taken off by something else, and those on its units were not",
                "Take the plan off (handle.remove()) and apply it again, after what changes the denoiser's forward.",
            )
        return generation

    @property
    def step(self) -> int:
        return self.now.step

    def enter(self, stage: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes that a call begins.

        Raises:
            SdfpError: If the plan has no such call here.
        """
        given, now = timestep_of(module, args, kwargs)
        owner = owner_of(module, given, len(self._rhythm.timesteps))
        self._inside[owner.thread] = self._advance(stage, owner, given, now, args, kwargs)

    def _advance(
        self, stage: int, owner: Whose, given: Any, now: float, args: tuple, kwargs: dict[str, Any]
    ) -> Generation:
        """Takes the owner's generation to the call that is made now."""
        generation = self._under_way.get(owner.key)
        if generation is not None:
            self._count(generation, now)
        if generation is None or not self._fits(given, now, *self._next(generation)):
            self._refuse_other_rhythm(generation, given, now)
            generation = self._begin(owner, given, now)
        step, branch = self._next(generation)
        if self._rhythm.stage(step) != stage:
            raise SdfpError(
                WHERE,
                f"the pipeline's denoisers change over at another step than in the plan, about step {step}",
                "Keep the share of the noise that each is for (boundary_ratio) as it was in the search, or search again.",
            )
        before = generation.step, generation.branch
        generation.step, generation.branch = step, branch
        try:
            self._on_call(generation, args, kwargs)
        except SdfpError:
            generation.step, generation.branch = before
            raise
        return generation

    def _count(self, generation: Generation, now: float) -> None:
        """Settles how many calls a step has: as many as were made before the first step was over."""
        if not self.count_calls or generation.branches or generation.step != 0:
            return
        over = generation.owner.steps_done
        if over is None and len(self._rhythm.timesteps) > 1:
            first, second = self._rhythm.timesteps[:2]
            over = int(abs(now - second) < abs(now - first))
        if over:
            generation.branches = generation.branch + 1

    def _branches(self, generation: Generation) -> int:
        if not self.count_calls:
            return self._rhythm.branches
        return generation.branches or generation.branch + 2  # not known yet: there may be another

    def _next(self, generation: Generation) -> tuple[int, int]:
        """Step and branch of the call that comes after the present one."""
        if generation.step >= 0 and generation.branch + 1 < self._branches(generation):
            return generation.step, generation.branch + 1
        return generation.step + 1, 0

    def _fits(self, given: Any, now: float, step: int, branch: int = 0) -> bool:
        if step >= len(self._rhythm.timesteps):
            return False
        expected = self._rhythm.timesteps[step]
        rounding = _ROUNDING.get(given.dtype, _EXACT) if isinstance(given, Tensor) else _EXACT
        return abs(now - expected) <= rounding * abs(expected)

    def _refuse_other_rhythm(self, generation: Generation | None, given: Any, now: float) -> None:
        """Refuses more or fewer calls in a step than the plan has, which show within one run of a pipeline."""
        if generation is None or generation.owner.pipe is None or generation.step < 0:
            return
        planned, made = self._branches(generation), generation.branch + 1
        more = made == planned and self._fits(given, now, generation.step)
        fewer = made < planned and self._fits(given, now, generation.step + 1)
        if more or fewer:
            raise SdfpError(
                WHERE,
                f"the pipeline makes {'more than ' * more}{made} denoiser call{'s' * (made > 1)} in step "
                f"{generation.step} where the plan has {planned}",
                "Guide the generation as in the search (guidance in separate calls, skipped layers), or search a plan for this way.",
            )

    def _begin(self, owner: Whose, given: Any, now: float) -> Generation:
        self._under_way.pop(owner.key, None)
        loops = [
            k for k, g in self._under_way.items() if g.owner.thread is owner.thread and not g.owner.frame
        ]
        for key in [k for k, g in self._under_way.items() if g.owner.gone] + loops[: 1 - _UNFINISHED]:
            self._under_way.pop(key, None)
        for thread in [t for t in self._inside if not t.is_alive()]:
            self._inside.pop(thread, None)
        self._on_start(owner.pipe)
        if not self._fits(given, now, 0):
            raise SdfpError(
                WHERE,
                f"the pipeline asks for timestep {now:g} where the plan begins at {self._rhythm.timesteps[0]:g}",
                "Run all steps of the plan, with the image-to-image strength that it was searched with, or remove the plan.",
            )
        generation = self._under_way[owner.key] = Generation(owner)
        return generation

    def leave(self) -> None:
        """Notes that the call has ended."""
        generation = self._inside.pop(threading.current_thread(), None)
        if generation is not None:
            self._done(generation)

    def _done(self, generation: Generation) -> None:
        if self._next(generation) == (len(self._rhythm.timesteps), 0):
            self._under_way.pop(generation.owner.key, None)
        self._on_done(generation)

    def forget(self) -> None:
        """Drops all generations under way."""
        self._under_way.clear()
        self._inside.clear()


class _Tick(ModelHook):
    """Around a denoiser. One for each, for a hook holds the forward of its module."""

    def __init__(self, clock: Clock, stage: int):
        super().__init__()
        self._clock, self._stage = clock, stage

    @torch.compiler.disable(reason="a DiP-GO plan decides between calls; compile without fullgraph=True")
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        if not self._clock.removed:
            self._clock.enter(self._stage, module, args, kwargs)
        return args, kwargs

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._clock.leave()
        return output


def timestep_of(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, float]:
    """The timestep of a denoiser call as it was given, and as a number.

    Raises:
        SdfpError: If there is none, or it is not the same for all rows.
    """
    if "timestep" in kwargs:
        value = kwargs["timestep"]
    else:
        place = place_of(type(denoiser).forward, "timestep")
        if place is None or place >= len(args):
            raise SdfpError(
                type(denoiser).__name__,
                "is called without a timestep",
                "DiP-GO needs a denoiser whose forward takes it as timestep.",
            )
        value = args[place]
    if not isinstance(value, Tensor):
        return value, float(value)
    first, *others = value.flatten().tolist()
    if any(other != first for other in others):
        raise SdfpError(
            WHERE,
            "the rows of a batch, or the frames of a video, are at different timesteps",
            "Denoise what is at different steps in calls of its own, or remove the plan.",
        )
    return value, float(first)
