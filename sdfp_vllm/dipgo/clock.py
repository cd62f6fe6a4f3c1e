"""Which call of a generation a denoiser is in, told from the timestep it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from diffusers.hooks import ModelHook
from torch import Tensor, nn

from sdfp_vllm.errors import SdfpError


class Clock(ModelHook):
    """Root hook of a denoiser: keeps `step`, the index of the present call, in line with the timesteps of a plan.

    A generation that was broken off is noticed by the next one's first timestep. `on_start` runs
    before the first call of every generation and may refuse it; `on_end` after the last.
    """

    def __init__(self, timesteps: Sequence[float], on_start: Callable[[], None], on_end: Callable[[], None]):
        super().__init__()
        self.step = -1
        self._timesteps, self._on_start, self._on_end = timesteps, on_start, on_end

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        now = timestep_of(module, args, kwargs)
        ahead = self.step + 1
        if ahead == len(self._timesteps) or now != self._timesteps[ahead]:
            ahead = 0
        if ahead == 0:
            self.step = -1
            self._on_start()
            if now != self._timesteps[0]:
                raise SdfpError(
                    "DiP-GO plan",
                    f"the pipeline asks for timestep {now:g} where the plan begins at {self._timesteps[0]:g}",
                    "Run all steps of the plan in one batch per step (no image-to-image strength, "
                    "no separate calls for guidance), or remove the plan.",
                )
        self.step = ahead
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.step == len(self._timesteps) - 1:
            self._on_end()
        return output


def timestep_of(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> float:
    """The timestep of a denoiser call, the same for all its rows."""
    if "timestep" in kwargs:
        value = kwargs["timestep"]
    else:
        position = list(inspect.signature(type(denoiser).forward).parameters).index("timestep") - 1
        value = args[position]
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
