"""A unit's call taken apart and put together again: what went in, what it added, what comes out.

Runtime, recording and the SuperNet all read units with these, so that one description (`Unit.streams`) serves them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from sdfp_vllm.dipgo.layout import Unit, unwrapped
from sdfp_vllm.errors import SdfpError


def batch_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The noisy batch that a denoiser is called with: latents of images or videos, or their patches in a row."""
    for name in ("sample", "hidden_states"):
        if name in kwargs:
            return kwargs[name]
    return args[0]


def argument(module: nn.Module, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The argument `name` of the call `module(*args, **kwargs)`.

    Raises:
        SdfpError: If the call has none.
    """
    if name in kwargs:
        return kwargs[name]
    kind = type(unwrapped(module))
    place = place_of(
        kind.forward, name
    )  # of the class: on the module itself, hooks have taken the place of forward
    if place is None or place >= len(args):
        raise SdfpError(
            f"{kind.__name__}.forward",
            f"was called without {name}",
            "Name in the layout's streams the parameters that its forward has.",
        )
    return args[place]


@lru_cache(maxsize=256)
def place_of(forward: Callable[..., Any], name: str) -> int | None:
    """Where a method's parameter `name` is among its positional ones, `self` not counted; None if it has none of that name."""
    parameters = list(inspect.signature(forward).parameters)[1:]
    return parameters.index(name) if name in parameters else None


def entering(unit: Unit, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The unit's streams as they go in, in the order of `unit.streams`."""
    return [argument(module, stream.argument, args, kwargs) for stream in unit.streams]


def added(unit: Unit, streams: list[Tensor], output: Any) -> Any:
    """What the unit returned, with each stream less what it was when it went in.

    Raises:
        SdfpError: If the output is not as `unit.streams` says.
    """
    return _merged(unit, output, [_leaving(unit, i, output) - x for i, x in enumerate(streams)])


def passed(unit: Unit, streams: list[Tensor], value: Any) -> Any:
    """The inverse of `added`: what the unit returns where it adds `value`, to streams that go in now."""
    return _merged(unit, value, [x + _leaving(unit, i, value) for i, x in enumerate(streams)])


def _leaving(unit: Unit, index: int, output: Any) -> Tensor:
    stream = unit.streams[index]
    if isinstance(output, Tensor) and stream.place == 0:
        return output
    if isinstance(output, tuple | list) and stream.place < len(output):
        leaving = output[stream.place]
        if isinstance(leaving, Tensor):
            return leaving
    raise SdfpError(
        unit.title,
        f"returned no tensor in place {stream.place} for its stream {stream.argument}",
        "Describe its output as it is: Stream(argument=..., place=...) in the layout.",
    )


def _merged(unit: Unit, output: Any, streams: list[Tensor]) -> Any:
    if not streams:  # a branch: what it returns is what is added
        return output
    if isinstance(output, Tensor):
        return streams[0]
    values = list(output)
    for stream, value in zip(unit.streams, streams, strict=True):
        values[stream.place] = value
    return tuple(values) if isinstance(output, tuple) else values
