"""Which diffusion pipeline and which scheduler settings a plan was made for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from sdfp_vllm.dipgo.layout import denoisers_of
from sdfp_vllm.errors import SdfpError

_PROBES = 32
# float16 and bfloat16 copies of the same weights agree this well; a fine-tune does not.
_RELATIVE, _ABSOLUTE = 0.01, 1e-6


class PipelineFingerprint(BaseModel):
    """Identity of a pipeline's denoiser: its class, a hash of its config, and some of its weights; `others` are further ones.

    `probes` are single weights from evenly chosen parameters; they are compared with a tolerance, so that
    a plan made in float32 serves the same model in float16.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    denoiser: str
    config_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    probes: list[float] = Field(min_length=1, max_length=_PROBES)
    others: list[PipelineFingerprint] = Field(default=[], max_length=3)

    def differences(self, other: PipelineFingerprint) -> list[str]:
        """What makes `other` another model, in words; empty for the same."""
        found = []
        if self.denoiser != other.denoiser:
            found.append(f"denoiser is {self.denoiser} in the plan but {other.denoiser} in the pipeline")
        elif self.config_sha256 != other.config_sha256:
            found.append(f"the configuration of {self.denoiser} differs")
        elif len(self.probes) != len(other.probes) or not all(
            math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
            for a, b in zip(self.probes, other.probes, strict=True)
        ):
            found.append("the weights differ")
        if len(self.others) != len(other.others):
            found.append(
                f"{1 + len(self.others)} denoisers in the plan but {1 + len(other.others)} in the pipeline"
            )
        else:
            for mine, theirs in zip(self.others, other.others, strict=True):
                found += mine.differences(theirs)
        return found


class SchedulerFingerprint(BaseModel):
    """Identity of a denoising schedule: the scheduler's class and settings, and the timestep of every call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    config_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_inference_steps: int = Field(ge=1, le=10_000)
    timesteps: list[float] = Field(min_length=1, max_length=20_000)

    def differences(self, other: SchedulerFingerprint) -> list[str]:
        found = []
        if self.name != other.name:
            found.append(f"scheduler is {self.name} in the plan but {other.name} in the pipeline")
        elif self.config_sha256 != other.config_sha256:
            found.append(f"the settings of {self.name} differ")
        if len(self.timesteps) != len(other.timesteps):
            found.append(
                f"{len(self.timesteps)} denoiser calls in the plan but {len(other.timesteps)} in the pipeline"
            )
        elif self.timesteps != other.timesteps:
            found.append("the timesteps differ")
        return found


def pipeline_fingerprint(pipe: Any) -> PipelineFingerprint:
    """The fingerprint of a loaded pipeline's denoisers.

    Raises:
        SdfpError: If the pipeline is not supported, or its weights are not in memory.
    """
    denoisers = list(denoisers_of(pipe).values())
    return fingerprint_of(denoisers, [_probes(denoiser) for denoiser in denoisers])


def fingerprint_of(denoisers: Sequence[nn.Module], probes: Sequence[list[float]]) -> PipelineFingerprint:
    """The fingerprint of diffusers' denoisers with these `probes`, which are their weights at `probed`."""
    first, *others = (
        PipelineFingerprint(
            denoiser=type(denoiser).__name__,
            config_sha256=_config_hash(getattr(denoiser, "config", {})),
            probes=values,
        )
        for denoiser, values in zip(denoisers, probes, strict=True)
    )
    return first.model_copy(update={"others": others})


def probed(denoiser: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a fingerprint has a weight of, with their names: the one in the middle (`numel() // 2`)."""
    parameters = [(name, p) for name, p in denoiser.named_parameters() if p.numel()]
    count = min(_PROBES, len(parameters))
    return [parameters[i * len(parameters) // _PROBES] for i in range(count)]


def scheduler_fingerprint(scheduler: Any) -> SchedulerFingerprint:
    """The fingerprint of a scheduler after `set_timesteps`.

    Raises:
        SdfpError: If that was not called.
    """
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise SdfpError(
            type(scheduler).__name__,
            "has no timesteps yet",
            "Call its set_timesteps before the denoiser, on the scheduler of the pipeline that the plan is applied to.",
        )
    return SchedulerFingerprint(
        name=type(scheduler).__name__,
        config_sha256=_config_hash(scheduler.config),
        num_inference_steps=scheduler.num_inference_steps,
        timesteps=[float(t) for t in scheduler.timesteps],
    )


def _config_hash(config: Any) -> str:
    # Keys that begin with "_" name the library's version and the folder the model came from.
    stable = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode()).hexdigest()


def _probes(denoiser: nn.Module) -> list[float]:
    chosen = [p for _, p in probed(denoiser)]
    if any(p.is_meta for p in chosen):
        raise SdfpError(
            type(denoiser).__name__,
            "its weights are not in memory",
            "Apply the plan before sequential offloading is enabled.",
        )
    return [float(p.detach().flatten()[p.numel() // 2]) for p in chosen]
