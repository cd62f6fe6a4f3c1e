"""Seconds of a generation, unit by unit, on a machine; `stopwatch.py` measures them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from sdfp_vllm.dipgo.cost import Cost
from sdfp_vllm.dipgo.layout import Gates

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Latency(Cost):
    """Seconds of `images` images at once on `machine`, from the noise to the latents.

    A plan's generation is taken to last calls * `rest` + the `units` that run; `rest` has the reuse and the hooks in it.
    `full` is the whole generation without a plan, so the share of a plan that skips nothing is a little over 1.
    """

    machine: str
    images: int = Field(ge=1)
    units: list[Seconds] = Field(min_length=1)
    rest: Seconds
    full: Seconds

    def seconds(self, executed: Gates) -> float:
        """Predicted seconds of a generation when the units in `executed` (calls, units) run."""
        return len(executed) * self.rest + float(executed.sum(0) @ np.array(self.units))

    def share(self, executed: Gates) -> float:
        return self.seconds(executed) / self.full
