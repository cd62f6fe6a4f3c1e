"""Reads the units of a denoiser that nobody listed, by tracing one call; and checks a description of units on a call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sdfp_vllm.dipgo.families import is_listed, layout_of
from sdfp_vllm.dipgo.layout import Granularity, Layout, Stream, Unit
from sdfp_vllm.errors import SdfpError

_DESCRIBE = (
    "Describe its units with a Layout and give it as --layout FILE (docs/diffusion/families.md has an example), "
    "or use --granularity step."
)
_STREAM_NAMES = ("hidden_states", "encoder_hidden_states")
_UNITS = TypeAdapter(tuple[Unit, ...])


def units_of(denoiser: nn.Module, granularity: Granularity, args: tuple, kwargs: dict[str, Any]) -> Layout:
    """The units of any denoiser: as listed for its class, else as read from the call `denoiser(*args, **kwargs)`.

    Raises:
        SdfpError: If it cannot be read.
    """
    if granularity != "block" or is_listed(denoiser):
        return layout_of(denoiser, granularity)
    return traced(denoiser, args, kwargs)


def traced(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Layout:
    """Reads units, streams and who reads whom from one call.

    Units are the members of the denoiser's module lists that run once each. What a unit returns is a stream if the next
    unit of the same class gets that very tensor as an argument, or else if it has the shape of one tensor argument only.
    A unit reads whose output it is given; if a stream was made over between two units, all before it. Then the reading is
    tried out (`check_layout`).

    Raises:
        SdfpError: If this leaves a question open.
    """
    members = {
        f"{part}.{i}": block
        for part, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList)
        for i, block in enumerate(child)
    }
    seen = _run(denoiser, members, args, kwargs)
    counts: dict[str, int] = {}
    for visit in seen:
        counts[visit.name] = counts.get(visit.name, 0) + 1
    lists = {name.split(".")[0] for name in members}
    whole = [
        part
        for part in lists
        if all(counts.get(name) == 1 for name in members if name.split(".")[0] == part)
        and all(v.returns_states() for v in seen if v.name.split(".")[0] == part)
    ]
    visits = [v for v in seen if v.name.split(".")[0] in whole]
    if not visits:
        raise SdfpError(
            type(denoiser).__name__, "has no list of blocks that run once each in a call", _DESCRIBE
        )
    streams = {v.name: _streams(visits, i) for i, v in enumerate(visits)}
    layout = Layout(
        tuple(
            Unit(name=v.name, inputs=_inputs(visits, i), streams=streams[v.name])
            for i, v in enumerate(visits)
        )
    )
    check_layout(layout, denoiser, args, kwargs)
    return layout


def check_layout(layout: Layout, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Tries a description out on a call: with a unit fixed, what it says nobody reads then is disturbed.

    Raises:
        SdfpError: If it names a module, a parameter or an output that is not there, or the prediction moves.
    """
    modules = dict(denoiser.named_modules())
    for i, unit in enumerate(layout.units):
        if unit.name not in modules:
            raise SdfpError(
                f"layout: units[{i}].name", f"{unit.name} is no module of the denoiser", _DESCRIBE
            )
        if unit.guidance:
            raise SdfpError(f"layout: units[{i}].guidance", "is no block", "Use --granularity guidance.")
        if any(source >= i for source in unit.inputs):
            raise SdfpError(
                f"layout: units[{i}].inputs", "names a unit that does not come before it", _DESCRIBE
            )
    members = {unit.name: modules[unit.name] for unit in layout.units}
    full, visits = _predict(denoiser, members, args, kwargs)
    if [v.name for v in visits] != [u.name for u in layout.units]:
        raise SdfpError("layout: units", "are not run once each in this order", _DESCRIBE)
    for unit, visit in zip(layout.units, visits, strict=True):
        for stream in unit.streams:
            there = visit.outputs[stream.place] if stream.place < len(visit.outputs) else None
            if stream.argument not in visit.arguments or not _same_shape(
                there, visit.arguments[stream.argument]
            ):
                raise SdfpError(
                    f"layout: stream {stream.argument} of {unit.title}",
                    f"does not come out in place {stream.place} with the shape it goes in with",
                    _DESCRIBE,
                )
    kept = {v.name: v.output for v in visits}
    for i in range(len(layout.units)):
        gates = torch.ones(1, len(layout.units), dtype=torch.bool).numpy()
        gates[0, i] = False
        live = layout.live(gates, "output")[0]
        if live.all():
            continue
        disturbed = {u.name for u, alive in zip(layout.units, live, strict=True) if not alive}

        def instead(name: str, fixed: str = layout.units[i].name, disturbed: set[str] = disturbed) -> Any:
            if name == fixed:
                return kept[name]
            return tree_map(_disturbed, kept[name]) if name in disturbed else None

        trial, _ = _predict(denoiser, members, args, kwargs, instead)
        if not all(torch.equal(a, b) for a, b in zip(full, trial, strict=True)):
            raise SdfpError(
                type(denoiser).__name__,
                f"reads more than its blocks' description says: with {layout.units[i].name} reused, others still matter",
                _DESCRIBE,
            )


def load_layout(path: str | Path) -> Layout:
    """A description of units from a file that `save_layout` wrote, or somebody did.

    Raises:
        SdfpError: If it cannot be read.
    """
    try:
        return Layout(_UNITS.validate_json(Path(path).read_bytes()))
    except OSError as e:
        raise SdfpError(f"--layout {path}", f"cannot be read ({e.strerror or e})", "Give a JSON file.") from e
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise SdfpError(f"--layout {path}: {where}", first["msg"], _DESCRIBE) from e


def save_layout(layout: Layout, path: str | Path) -> None:
    """Writes a description of units as JSON, for `sdfp dipgo search --layout`."""
    Path(path).write_text(
        json.dumps([unit.model_dump(mode="json") for unit in layout.units], indent=1) + "\n"
    )


@dataclass
class _Visit:
    """A unit's run in the traced call."""

    name: str
    kind: type
    arguments: dict[str, Any]
    output: Any = None
    outputs: list[Any] = field(default_factory=list)

    def returns_states(self) -> bool:
        """Whether something comes out in a shape that something went in with."""
        return any(_same_shape(o, a) for o in self.outputs for a in self.arguments.values())


def _run(
    denoiser: nn.Module, members: dict[str, nn.Module], args: tuple, kwargs: dict[str, Any]
) -> list[_Visit]:
    return _predict(denoiser, members, args, kwargs)[1]


def _predict(
    denoiser: nn.Module,
    members: dict[str, nn.Module],
    args: tuple,
    kwargs: dict[str, Any],
    instead: Callable[[str], Any] = lambda name: None,
) -> tuple[list[Tensor], list[_Visit]]:
    """The prediction's tensors and the units' runs; what `instead` gives for a unit takes the place of its output."""
    visits: list[_Visit] = []
    with _watching(members, visits, instead), torch.no_grad():
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))  # some take arguments out of containers
        output = denoiser(*args, **kwargs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], visits


@contextmanager
def _watching(
    members: dict[str, nn.Module], visits: list[_Visit], instead: Callable[[str], Any]
) -> Iterator[None]:
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        parameters = inspect.signature(type(module).forward)

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            bound = parameters.bind(module, *args, **kwargs).arguments
            visits.append(_Visit(name, type(module), {k: v for k, v in bound.items() if k != "self"}))

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            visit = next(v for v in reversed(visits) if v.name == name)
            visit.output = output
            visit.outputs = list(output) if isinstance(output, tuple | list) else [output]
            return instead(name)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    for name, module in members.items():
        watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _streams(visits: list[_Visit], index: int) -> tuple[Stream, ...]:
    visit = visits[index]
    # Of every unit of the class: who got its outputs, as what.
    handed: dict[int, str] = {}
    for i, other in enumerate(visits):
        if other.kind is not visit.kind:
            continue
        for place, output in enumerate(other.outputs):
            for later in visits[i + 1 :]:
                if later.kind is not visit.kind:
                    continue
                for name, value in later.arguments.items():
                    if isinstance(output, Tensor) and value is output and place not in handed:
                        handed[place] = name
    found = []
    for place, output in enumerate(visit.outputs):
        if not isinstance(output, Tensor):
            continue
        if place in handed and _same_shape(output, visit.arguments.get(handed[place])):
            found.append(Stream(argument=handed[place], place=place))
            continue
        alike = [n for n, a in visit.arguments.items() if _same_shape(output, a) and n not in handed.values()]
        named = [n for n in alike if n in _STREAM_NAMES]
        if len(named or alike) > 1:
            raise SdfpError(
                visit.kind.__name__,
                f"returns in place {place} a tensor of the shape of {' and '.join(alike)}, and which it goes on is not told",
                _DESCRIBE,
            )
        if alike:
            found.append(Stream(argument=(named or alike)[0], place=place))
    return tuple(found)


def _inputs(visits: list[_Visit], index: int) -> tuple[int, ...]:
    visit = visits[index]
    made = {
        id(leaf): i for i, v in enumerate(visits[:index]) for leaf in v.outputs if isinstance(leaf, Tensor)
    }
    names = {s.argument for s in _streams(visits, index)}
    read: set[int] = set()
    for name, value in visit.arguments.items():
        sources = {made[id(leaf)] for leaf in tree_leaves(value) if id(leaf) in made}
        if name in names and not sources:
            sources = set(range(index))  # made over on the way: from whatever came before
        read |= sources
    return tuple(sorted(read))


def _same_shape(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _disturbed(leaf: Any) -> Any:
    """Another tensor of the same form; not by a constant, which a normalisation would take out again."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf + torch.linspace(-1, 1, leaf.numel()).reshape(leaf.shape).to(leaf)
    return leaf
