"""In what order a pipeline calls its denoiser: steps, calls within a step, and which denoiser it is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Rhythm(BaseModel):
    """The denoiser calls of a generation: `branches` calls at each of `timesteps`.

    Attributes:
        timesteps: Of every step, as the denoiser is given it (Flux: thousandths of the scheduler's).
        branches: Calls in a step. Two where the pipeline asks for guidance in a call of its own. The units that a plan
            leaves out are those of the step, in all of its calls; what is reused is the same branch's own.
        stages: The step at which each denoiser takes over; (0,) for the only one. It has no values to reuse then, so
            in these steps everything runs.
        denoisers: Their names in the pipeline, one for each stage; empty for its only one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    timesteps: list[Finite] = Field(min_length=1, max_length=20_000)
    branches: int = Field(default=1, ge=1, le=16)
    stages: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    denoisers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _stages_in_order(self) -> Rhythm:
        ends = (*self.stages, len(self.timesteps))
        if self.stages[:1] != (0,) or any(a >= b for a, b in pairwise(ends)):
            raise ValueError("stages must begin with 0 and rise, each within the steps")
        if self.denoisers and len(self.denoisers) != len(self.stages):
            raise ValueError(f"denoisers names {len(self.denoisers)} for {len(self.stages)} stages")
        return self

    def stage(self, step: int) -> int:
        """Which of the denoisers runs in `step`."""
        return bisect_right(self.stages, step) - 1


def rhythm_of(timesteps: Rhythm | Sequence[float]) -> Rhythm:
    """A rhythm as it is; for a list of timesteps, one call of one denoiser at each."""
    return timesteps if isinstance(timesteps, Rhythm) else Rhythm(timesteps=list(timesteps))
