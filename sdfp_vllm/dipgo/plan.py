"""DipgoPlan: which units of a denoiser run in which call. The contract between search and runtime.

A plan is one JSON file; nothing in it is executable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdfp_vllm.common.json_file import read_plan, write_plan
from sdfp_vllm.dipgo.cost import CostName
from sdfp_vllm.dipgo.fingerprint import PipelineFingerprint, SchedulerFingerprint
from sdfp_vllm.dipgo.forecast import Forecasts
from sdfp_vllm.dipgo.latency import Latency
from sdfp_vllm.dipgo.layout import Gates, Granularity, Unit
from sdfp_vllm.dipgo.macs import MacCount
from sdfp_vllm.dipgo.rhythm import Rhythm

SCHEMA_VERSION = 1
PLAN_FILE = "dipgo.json"
_MAKE = "sdfp dipgo search PIPELINE_DIR --steps N"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Row = Annotated[str, Field(pattern=r"^[01]+$")]
ForecastRow = Annotated[str, Field(pattern=r"^[.012hH]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quality(_Strict):
    """Agreement with the full run on seeds that the search did not see; means over `images` images.

    `psnr` in dB and `ssim` are of decoded images in [-1, 1]. An image that is bit-identical
    counts with 100 dB. `time` is what the plan's latents of them took over what the full run's did, measured once, where the search ran.
    """

    images: int = Field(ge=1)
    psnr: Finite
    ssim: Annotated[float, Field(ge=-1.0, le=1.0, allow_inf_nan=False)]
    time: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None


class FewerSteps(_Strict):
    """Agreement with the full run of `steps` native steps, on the seeds of `Quality`; `psnr` in dB."""

    steps: int = Field(ge=1)
    psnr: Finite


class Provenance(_Strict):
    """How the plan was made; enough to make it again."""

    method: str
    budget: Share
    cost: CostName = "macs"
    guidance_scale: Finite
    seed: int
    iterations: int = Field(ge=0)
    search_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    created: str
    sdfp_version: str
    torch_version: str
    diffusers_version: str
    git_sha: str | None = None


class DipgoPlan(_Strict):
    """Which units run in which step of a generation.

    `executed[t][i]` is "1" where unit i runs in step t. Where it does not, its output (`reuse`
    "output") or what it adds to its streams ("residual") is taken from earlier steps: the last
    value (`order` 0), or the straight line through the last two (`order` 1). `forecasts` says it for every gate by itself, with
    the letters of `forecast.KINDS`, and "." where the unit runs. `calls` says how the pipeline
    calls its denoiser; a plan without it was made for one call at each of the scheduler's timesteps. `scores`, where
    present, are the learned chances that a gate is kept, from which other budgets follow.
    `latency` is there where the budget was a share of it, and holds for the machine it names. `native` is what the
    pipeline gives with fewer steps, for about the same cost.
    """

    schema_version: Literal[1] = 1
    pipeline: str
    fingerprint: PipelineFingerprint
    scheduler: SchedulerFingerprint
    calls: Rhythm | None = None
    granularity: Granularity
    reuse: Literal["output", "residual"]
    order: Annotated[int, Field(ge=0, le=1, strict=True)] = 0
    units: list[Unit] = Field(min_length=1)
    executed: list[Row] = Field(min_length=1)
    forecasts: list[ForecastRow] | None = None
    macs: MacCount
    latency: Latency | None = None
    quality: Quality | None = None
    native: FewerSteps | None = None
    scores: list[list[Share]] | None = None
    made: Provenance

    @model_validator(mode="after")
    def _shapes_agree(self) -> DipgoPlan:
        calls, units = len(self.rhythm.timesteps), len(self.units)
        for i, unit in enumerate(self.units):
            if any(source >= i for source in unit.inputs):
                raise ValueError(f"units[{i}].inputs names a unit that does not come before it")
        if len(self.executed) != calls:
            raise ValueError(
                f"executed has {len(self.executed)} rows, but "
                f"{'calls' if self.calls else 'scheduler'}.timesteps has {calls} calls"
            )
        if any(len(row) != units for row in self.executed):
            raise ValueError(f"every row of executed must have one digit for each of the {units} units")
        if any("0" in self.executed[first] for first in self.rhythm.stages):
            raise ValueError("executed: the first call must run every unit, there is nothing to reuse yet")
        if self.forecasts is not None and [
            "".join("01"[c == "."] for c in row) for row in self.forecasts
        ] != list(self.executed):
            raise ValueError(
                "forecasts must have a letter for every gate that executed closes, and . for the others"
            )
        halves = [bool(unit.guidance) for unit in self.units]
        if halves != [True, False] if self.granularity == "guidance" else any(halves):
            raise ValueError("units: guidance goes with granularity guidance, as the first of two")
        if any(halves) and "10" in self.executed:
            raise ValueError("executed: a step that reuses the whole network runs no half of it")
        if len(self.macs.units) != units:
            raise ValueError(f"macs.units has {len(self.macs.units)} entries for {units} units")
        if self.latency is not None and len(self.latency.units) != units:
            raise ValueError(f"latency.units has {len(self.latency.units)} entries for {units} units")
        if self.scores is not None and (
            len(self.scores) != calls or any(len(row) != units for row in self.scores)
        ):
            raise ValueError(f"scores must have {calls} rows of {units}")
        return self

    @property
    def rhythm(self) -> Rhythm:
        """How the pipeline calls its denoiser."""
        return self.calls or Rhythm(timesteps=self.scheduler.timesteps)

    @property
    def beaten(self) -> bool:
        """Whether native fewer steps are known to be as near to the full run, for about the same cost."""
        return bool(self.native and self.quality and self.native.psnr >= self.quality.psnr)

    @property
    def gates(self) -> Gates:
        return np.array([[c == "1" for c in row] for row in self.executed])

    @property
    def forecast_kinds(self) -> Forecasts | None:
        """How every closed gate is forecast, where that is said by itself: (steps, units)."""
        if self.forecasts is None:
            return None
        return np.array([list(row.replace(".", "0")) for row in self.forecasts])

    @property
    def compute_share(self) -> float:
        """MACs of this plan over those of the full run."""
        return self.macs.share(self.gates)

    @property
    def latency_share(self) -> float | None:
        """Predicted time of this plan over that of the full run, on the machine that `latency` names."""
        return None if self.latency is None else self.latency.share(self.gates)

    def save(self, path: str | Path) -> Path:
        """Writes the plan atomically to `path`, a .json file or a folder, and returns the file's path.

        Raises:
            PlanError: If it cannot be written.
        """
        path = plan_path(path)
        write_plan(self, path)
        return path


def rows(gates: Gates) -> list[str]:
    """Gates as a plan writes them."""
    return ["".join("1" if g else "0" for g in row) for row in gates]


def forecast_rows(gates: Gates, kinds: Forecasts) -> list[str]:
    """Forecasts as a plan writes them."""
    return [
        "".join("." if g else str(k) for g, k in zip(*row, strict=True))
        for row in zip(gates, kinds, strict=True)
    ]


def plan_path(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / PLAN_FILE


def load_plan(path: str | Path) -> DipgoPlan:
    """Reads and validates a plan from its file or folder.

    Raises:
        PlanError: Naming the file, the field and the way out. No other exception leaves here.
    """
    return read_plan(plan_path(path), DipgoPlan, SCHEMA_VERSION, _MAKE)
