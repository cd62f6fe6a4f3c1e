"""Whose generation a denoiser call belongs to.

A denoiser is told a timestep and no more, but several generations may share it: two pipelines around one model,
threads, a preview out of a callback. The run of a pipeline's call, found on the stack, tells them apart.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from torch import Tensor, nn

from sdfp_vllm.dipgo.layout import NAMES, unwrapped


class Whose(Protocol):
    """What a clock asks of whoever a generation belongs to: an `Owner`, or a request (`rows.Request`)."""

    @property
    def key(self) -> Hashable: ...
    @property
    def thread(self) -> threading.Thread: ...
    @property
    def pipe(self) -> Any | None: ...
    @property
    def frame(self) -> int: ...
    @property
    def steps_done(self) -> int | None: ...
    @property
    def gone(self) -> bool: ...


@dataclass(frozen=True)
class Owner:
    """Who generates: the thread, the pipeline (None: a loop of somebody's own) and the run of it.

    A run is told by its frame and by the timesteps that its scheduler made for it. `timesteps` is held, so that while
    this is, no later tensor has its id; the frame is not, for it would keep all its callers' variables.
    """

    thread: threading.Thread
    pipe: Any | None
    frame: int
    timesteps: Any

    @property
    def key(self) -> Hashable:
        return self.thread, self.frame, id(self.timesteps)

    @property
    def steps_done(self) -> int | None:
        """How many steps the pipeline's scheduler has made; None if nobody can tell."""
        scheduler: Any = getattr(self.pipe, "scheduler", None)
        return (scheduler.step_index or 0) if hasattr(scheduler, "step_index") else None

    @property
    def gone(self) -> bool:
        """Whether the thread has ended, the scheduler makes another generation or, in this thread, the call has returned."""
        if not self.thread.is_alive():
            return True
        if self.pipe is not None and getattr(self.pipe.scheduler, "timesteps", None) is not self.timesteps:
            return True
        if not self.frame or self.thread is not threading.current_thread():
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and id(frame) != self.frame:
            frame = frame.f_back
        return frame is None


def owner_of(denoiser: nn.Module, timestep: Any, calls: int) -> Owner:
    """Who calls `denoiser` now.

    In a loop without a pipeline a generation is told by the tensor of all `calls` timesteps, where the present one is
    a view of it, else by its thread alone.
    """
    frame: FrameType | None = sys._getframe(1)
    # Most frames are torch's own, and looking into a frame copies its variables.
    while frame is not None and (
        frame.f_globals.get("__name__", "").startswith("torch.") or not _holds(_self_of(frame), denoiser)
    ):
        frame = frame.f_back
    thread = threading.current_thread()
    if frame is None:
        base = timestep._base if isinstance(timestep, Tensor) else None
        return Owner(thread, None, 0, base if base is not None and base.numel() == calls else None)
    pipe = _self_of(frame)
    run = frame
    # A pipeline may call its denoiser from a method that runs anew for every step.
    while frame is not None and run.f_code.co_name != "__call__":
        if _self_of(frame) is pipe:
            run = frame
        frame = frame.f_back
    return Owner(thread, pipe, id(run), getattr(pipe.scheduler, "timesteps", None))


def _self_of(frame: FrameType) -> Any:
    """The object whose method the frame runs; None if it runs no method."""
    names = frame.f_code.co_varnames
    return frame.f_locals.get("self") if frame.f_code.co_argcount and names[0] == "self" else None


def _holds(candidate: Any, denoiser: nn.Module) -> bool:
    """Whether this is a pipeline around `denoiser`: diffusers', vLLM-Omni's (which are modules) or somebody's own."""
    try:
        # As it lies there: an attribute that computes something is none of ours to ask.
        parts = object.__getattribute__(candidate, "__dict__")
    except AttributeError:
        return False
    modules = parts.get("_modules", {})
    if "scheduler" not in parts and "scheduler" not in modules:
        return False
    names = [each for name in NAMES for each in (name, f"{name}_2")]
    return any(unwrapped(parts.get(name, modules.get(name))) is denoiser for name in names)
