"""Which call of which generation a denoiser is in, told from the timestep it is given and from who gives it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from sdfp_vllm.dipgo.owner import Owner, owner_of
from sdfp_vllm.errors import SdfpError

WHERE = "DiP-GO plan"
_UNFINISHED = 4  # loops without a pipeline that a thread may have under way: nobody says when one is given up


class Generation:
    """A generation under way: the call it is in, and in `kept` what hooks remember of it."""

    def __init__(self, owner: Owner):
        self.owner = owner
        self.step = -1
        self.kept: dict[Hashable, Any] = {}


class Clock(ModelHook):
    """Root hook of a denoiser: keeps every generation's `step`, the index of its present call, in line with `timesteps`.

    Generations in several threads, or one inside another, do not meet. One that was broken off is forgotten when the
    same thread begins another.

    Args:
        on_start: Called with the pipeline (None: there is none) before the first call of every generation; may refuse it.
        on_call: Called with the generation and the call's arguments before every call; may refuse it.
        on_done: Called with the generation after every call.
    """

    def __init__(
        self,
        timesteps: Sequence[float],
        on_start: Callable[[Any], None] = lambda pipe: None,
        on_call: Callable[[Generation, tuple, dict[str, Any]], None] = lambda generation, args, kwargs: None,
        on_done: Callable[[Generation], None] = lambda generation: None,
    ):
        super().__init__()
        # Somebody who kept the denoiser's `forward` from before may put a hook back that was taken off.
        self.removed = False
        self._timesteps = list(timesteps)
        self._on_start, self._on_call, self._on_done = on_start, on_call, on_done
        self._under_way: dict[Hashable, Generation] = {}
        self._inside: dict[threading.Thread, Generation] = {}

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

    @torch.compiler.disable(reason="a DiP-GO plan decides between calls; compile without fullgraph=True")
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        if self.removed:
            return args, kwargs
        value, now = timestep_of(module, args, kwargs)
        owner = owner_of(module, value, len(self._timesteps))
        generation = self._under_way.get(owner.key)
        if generation is None or self._timesteps[generation.step + 1 :][:1] != [now]:
            generation = self._begin(owner, now)
        self._on_call(generation, args, kwargs)
        generation.step += 1
        self._inside[owner.thread] = generation
        return args, kwargs

    def _begin(self, owner: Owner, now: float) -> Generation:
        self._under_way.pop(owner.key, None)
        loops = [
            k for k, g in self._under_way.items() if g.owner.thread is owner.thread and not g.owner.frame
        ]
        for key in [k for k, g in self._under_way.items() if g.owner.gone] + loops[: 1 - _UNFINISHED]:
            self._under_way.pop(key, None)
        for thread in [t for t in self._inside if not t.is_alive()]:
            self._inside.pop(thread, None)
        self._on_start(owner.pipe)
        if now != self._timesteps[0]:
            raise SdfpError(
                WHERE,
                f"the pipeline asks for timestep {now:g} where the plan begins at {self._timesteps[0]:g}",
                "Run all steps of the plan in one batch per step (no image-to-image strength, "
                "no separate calls for guidance), or remove the plan.",
            )
        generation = self._under_way[owner.key] = Generation(owner)
        return generation

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        generation = self._inside.pop(threading.current_thread(), None)
        if generation is not None:
            if generation.step == len(self._timesteps) - 1:
                self._under_way.pop(generation.owner.key, None)
            self._on_done(generation)
        return output

    def forget(self) -> None:
        """Drops all generations under way."""
        self._under_way.clear()
        self._inside.clear()


def timestep_of(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, float]:
    """The timestep of a denoiser call as it was given, and as a number.

    Raises:
        SdfpError: If it is not the same for all rows.
    """
    if "timestep" in kwargs:
        value = kwargs["timestep"]
    else:
        position = list(inspect.signature(type(denoiser).forward).parameters).index("timestep") - 1
        value = args[position]
    if not isinstance(value, Tensor):
        return value, float(value)
    first, *others = value.flatten().tolist()
    if any(other != first for other in others):
        raise SdfpError(
            WHERE,
            "the rows of a batch are at different timesteps",
            "Denoise images that are at different steps in calls of their own, or remove the plan.",
        )
    return value, float(first)
