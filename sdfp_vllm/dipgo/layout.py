"""What can be skipped in a denoiser: its units, which unit reads which, and what a reused unit makes useless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from sdfp_vllm.errors import SdfpError

Granularity = Literal["branch", "block", "step", "guidance"]
Gates = NDArray[np.bool_]  # (steps, units): True where the unit runs

NAMES = ("transformer", "unet")  # what pipelines call their denoiser; a second one is called NAME_2


class Stream(BaseModel):
    """A tensor that passes through a unit: it goes in as `argument` and comes out with the same shape.

    Attributes:
        argument: Name of the parameter of the unit's `forward` that it goes in by.
        place: Where it is in the tuple that the unit returns; 0 too where a bare tensor is returned.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    argument: str = Field(min_length=1)
    place: Annotated[int, Field(ge=0, le=15, strict=True)] = 0


class Unit(BaseModel):
    """One module that runs or is reused as a whole.

    Attributes:
        name: Its path in the denoiser, "" for the denoiser itself.
        inputs: The units whose outputs it reads in the same call; the denoiser's stem, which always runs, is none of them.
        streams: What passes through it. With residual reuse, what the unit added to every stream is added to what goes in,
            for all of them together; anything else that it returns is reused as it was. None: the unit maps its input to another
            shape, and only its output can be reused; unless it is a branch.
        branch: What it returns is itself what is added to streams that pass it by, as a block's attention and MLP are. Residual
            reuse takes it as it was, and nothing else depends on whether it runs.
        guidance: The half of the batch that is asked for with its condition, where guidance is in one batch. It is the other half that runs
            or not; the unit's value is its difference to the first (FasterCache's CFG-cache, arXiv 2410.19355).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    inputs: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    streams: tuple[Stream, ...] = ()
    branch: bool = False
    guidance: Literal["first", "second"] | None = None

    @property
    def title(self) -> str:
        return "guidance" if self.guidance else self.name or "whole network"


@dataclass(frozen=True)
class Layout:
    """The units of a denoiser in order of execution. The last one feeds the head, which always runs.

    This is all that DiP-GO knows of an architecture. Describe one that it cannot read by itself::

        text_then_image = (Stream(argument="encoder_hidden_states", place=0), Stream(argument="hidden_states", place=1))
        layout = Layout(tuple(
            Unit(name=f"transformer_blocks.{i}", inputs=(i - 1,) if i else (), streams=text_then_image)
            for i in range(len(denoiser.transformer_blocks))
        ))
        save_layout(layout, "layout.json")  # sdfp dipgo search PIPELINE --layout layout.json
    """

    units: tuple[Unit, ...]

    @property
    def residual(self) -> bool:
        """Whether what a unit adds to its streams can be reused, for every unit."""
        return all(unit.streams or unit.branch for unit in self.units)

    def live(self, gates: Gates, reuse: str) -> Gates:
        """Units whose output, computed or reused, reaches the prediction in a call: (steps, units).

        With output reuse, a reused unit reads nothing, so units that only it would have read
        are dead. With residual reuse a unit always passes its input on: all live. Branches are passed by either way.
        """
        if reuse == "residual":
            return np.ones_like(gates)
        live = np.zeros_like(gates)
        live[:, -1] = True
        live[:, [unit.branch for unit in self.units]] = True
        for i in range(len(self.units) - 1, -1, -1):
            for source in self.units[i].inputs:
                live[:, source] |= live[:, i] & (gates[:, i] | self.units[i].branch)
        return live

    def closure(self, gates: Gates, reuse: str) -> Gates:
        """The units worth running: open and live (DiP-GO's dependency rule). Idempotent, monotone, never adds."""
        return gates & self.live(gates, reuse)

    def modules(self, denoiser: nn.Module) -> list[nn.Module]:
        return [denoiser.get_submodule(unit.name) for unit in self.units]


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's denoisers by name, in the order in which they run; of compiled ones, the modules that were compiled.

    Most have one. Wan 2.2 has an expert for high noise (`transformer`) and one for low (`transformer_2`).

    Raises:
        SdfpError: If it has none.
    """
    found = {}
    for name in NAMES:
        for each in (name, f"{name}_2"):
            module = unwrapped(getattr(pipe, each, None))
            if isinstance(module, nn.Module):
                found[each] = module
        if found:
            return found
    raise SdfpError(
        type(pipe).__name__,
        "has no denoiser that DiP-GO knows",
        f"Use a diffusers pipeline that has it as {' or '.join(NAMES)}.",
    )


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """The name and module of a pipeline's first denoiser.

    Raises:
        SdfpError: If the pipeline has none.
    """
    return next(iter(denoisers_of(pipe).items()))


def unwrapped(module: Any) -> Any:
    """The module inside what `torch.compile(module)` gave; anything else as it is."""
    # By its name: importing the class takes as long as torch itself.
    return module._orig_mod if type(module).__name__ == "OptimizedModule" else module


WHOLE = Layout((Unit(name=""),))
"""The whole network as the only unit, which any denoiser can be."""
