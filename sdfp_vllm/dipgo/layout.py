"""What can be skipped in a denoiser: its units, which unit reads which, and what a reused unit makes useless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from sdfp_vllm.errors import SdfpError

Granularity = Literal["block", "step"]
Gates = NDArray[np.bool_]  # (calls, units): True where the unit runs

NAMES = ("transformer", "unet")  # what pipelines call their denoiser
_CHAINS = ("DiTTransformer2DModel", "PixArtTransformer2DModel")
_UNETS = ("UNet2DConditionModel",)


class Unit(BaseModel):
    """One module that runs or is reused as a whole.

    `name` is its path in the denoiser, "" for the denoiser itself. `inputs` are the units whose
    outputs it reads in the same call; the denoiser's stem, which always runs, is none of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    inputs: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()

    @property
    def title(self) -> str:
        return self.name or "whole network"


@dataclass(frozen=True)
class Layout:
    """The units of a denoiser in order of execution. The last one feeds the head, which always runs.

    `residual` says whether every unit maps a tensor to one of the same shape, so that what it
    adds can be reused in place of what it puts out.
    """

    units: tuple[Unit, ...]
    residual: bool

    def live(self, gates: Gates, reuse: str) -> Gates:
        """Units whose output, computed or reused, reaches the prediction in a call: (calls, units).

        With output reuse, a reused unit reads nothing, so units that only it would have read
        are dead. With residual reuse a unit always passes its input on: all live.
        """
        if reuse == "residual":
            return np.ones_like(gates)
        live = np.zeros_like(gates)
        live[:, -1] = True
        for i in range(len(self.units) - 1, -1, -1):
            for source in self.units[i].inputs:
                live[:, source] |= live[:, i] & gates[:, i]
        return live

    def closure(self, gates: Gates, reuse: str) -> Gates:
        """The units worth running: open and live (DiP-GO's dependency rule). Idempotent, monotone, never adds."""
        return gates & self.live(gates, reuse)

    def modules(self, denoiser: nn.Module) -> list[nn.Module]:
        return [denoiser.get_submodule(unit.name) for unit in self.units]


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """The name and module of a pipeline's denoiser; of a compiled one, the module that was compiled.

    Raises:
        SdfpError: If the pipeline has none of a supported class.
    """
    for name in NAMES:
        module = unwrapped(getattr(pipe, name, None))
        if module is not None and type(module).__name__ in _CHAINS + _UNETS:
            return name, module
    raise SdfpError(
        type(pipe).__name__,
        "has no denoiser that DiP-GO knows",
        f"Use a pipeline around one of {', '.join(_UNETS + _CHAINS)}.",
    )


def unwrapped(module: Any) -> Any:
    """The module inside what `torch.compile(module)` gave; anything else as it is."""
    # By its name: importing the class takes as long as torch itself.
    return module._orig_mod if type(module).__name__ == "OptimizedModule" else module


def layout_of(denoiser: nn.Module, granularity: Granularity) -> Layout:
    """The units of `denoiser`: its blocks, or with granularity "step" the whole network as the only one.

    A transformer is a chain of blocks. In a U-Net (`UNet2DConditionModel`) the outer blocks of
    the down path, the middle and the up path are units, as in DiP-GO; an up block reads the one
    before it and the down blocks whose skip connections it takes.
    """
    if granularity == "step":
        return Layout((Unit(name=""),), residual=False)
    if type(denoiser).__name__ in _CHAINS:
        count = len(denoiser.transformer_blocks)  # type: ignore[arg-type]
        return Layout(
            tuple(Unit(name=f"transformer_blocks.{i}", inputs=(i - 1,) if i else ()) for i in range(count)),
            residual=True,
        )
    return Layout(_unet_units(denoiser), residual=False)


def _unet_units(unet: Any) -> tuple[Unit, ...]:
    units: list[Unit] = []
    stem = -1
    skips = [stem]  # who wrote each skip connection: conv_in, then the down blocks' resnets and downsamplers
    for i, block in enumerate(unet.down_blocks):
        units.append(Unit(name=f"down_blocks.{i}", inputs=(i - 1,) if i else ()))
        skips += [i] * (len(block.resnets) + (1 if block.downsamplers else 0))
    if unet.mid_block is not None:
        units.append(Unit(name="mid_block", inputs=(len(units) - 1,)))
    for j, block in enumerate(unet.up_blocks):
        taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        inputs = {len(units) - 1, *taken} - {stem}
        units.append(Unit(name=f"up_blocks.{j}", inputs=tuple(sorted(inputs))))
    return tuple(units)
