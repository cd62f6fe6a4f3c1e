"""Running a pipeline with a plan: units that the plan leaves out are not executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from numpy.typing import NDArray
from torch import Tensor, nn

from sdfp_vllm.dipgo.clock import WHERE, Clock, Generation
from sdfp_vllm.dipgo.families import is_listed, layout_of
from sdfp_vllm.dipgo.fingerprint import pipeline_fingerprint, scheduler_fingerprint
from sdfp_vllm.dipgo.forecast import KINDS, Forecasts
from sdfp_vllm.dipgo.graph_breaks import between_graphs, is_one_graph, one_graph_around, put_around, take_off
from sdfp_vllm.dipgo.halves import both, conditioned, difference, is_pair
from sdfp_vllm.dipgo.history import History, recalled
from sdfp_vllm.dipgo.layout import Gates, Layout, Unit, denoisers_of
from sdfp_vllm.dipgo.plan import DipgoPlan, load_plan
from sdfp_vllm.dipgo.rhythm import Rhythm, rhythm_of
from sdfp_vllm.dipgo.streams import added, batch_of, entering, passed
from sdfp_vllm.errors import PlanError, SdfpError

_CLOCK, _UNIT = "sdfp_dipgo_clock", "sdfp_dipgo_unit"
_SHAPES, MET = "shapes of the calls' samples", "units that were reached in this call"
_PARTS = {"branch": "parts of blocks", "block": "blocks", "step": "calls", "guidance": "calls"}
_SEARCH = "Make one for this pipeline with `sdfp dipgo search`."


class UnitHook(ModelHook):
    """Runs its unit, or gives what the unit gave before.

    With residual reuse what is kept is what the unit added to each of its streams; a unit that runs
    still returns its own output, bit for bit. Every branch of a step has a history of its own.
    """

    def __init__(
        self, clock: Clock, unit: Unit, runs: list[bool], kept: list[bool], residual: bool, kinds: list[str]
    ):
        super().__init__()
        self._clock, self._unit, self._residual = clock, unit, residual
        self._runs, self._kept, self._kinds = runs, kept, kinds
        self._order = max(KINDS[kind] for kind in kinds)

    # The unit itself may be compiled: what is called from here is no part of what is left out.
    @between_graphs
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        if self._clock.removed:
            return forward(*args, **kwargs)  # type: ignore[misc]  # set by the registry
        step, held = self._begin(module, args, kwargs)
        if not self._runs[step]:
            return held
        output = forward(*args, **kwargs)  # type: ignore[misc]
        if self._kept[step]:
            self._store(step, held, output)
        return output

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, Any]:
        """The step that the generation is in, and what is held for it; notes that the unit was reached.

        Where the unit does not run, that is what it gives. Where what it adds is kept, its streams as they are now, for it may write into them.
        """
        generation = self._clock.now
        generation.kept[MET] = generation.kept.get(MET, 0) + 1
        step = generation.step
        if self._runs[step]:
            streams = (
                entering(self._unit, module, args, kwargs) if self._residual and self._kept[step] else []
            )
            return step, [x.clone() for x in streams]
        reused = self._history(generation).recall(step, self._kinds[step])
        if self._residual:
            reused = passed(self._unit, entering(self._unit, module, args, kwargs), reused)
        return step, reused

    @torch.compiler.disable
    def _store(self, step: int, streams: list[Tensor], output: Any) -> None:
        value = added(self._unit, streams, output) if self._residual else output
        self._history(self._clock.now).store(step, value)

    def _history(self, generation: Generation) -> History:
        return generation.kept.setdefault((self, generation.branch), History(self._order))


class GuidanceHook(UnitHook):
    """Around a denoiser: runs its whole batch, or the half with the condition, whose output the other's is told from."""

    @between_graphs
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        if self._clock.removed:
            return forward(*args, **kwargs)  # type: ignore[misc]  # set by the registry
        if not is_pair(args, kwargs):
            raise SdfpError(
                WHERE,
                "reuses guidance, and this generation is not guided by a second half of its batch",
                "Guide it as in the search, from the first step to the last, or remove the plan.",
            )
        step, held = self._begin(module, args, kwargs)
        if not self._runs[step]:
            args, kwargs = conditioned(self._unit, args, kwargs)
            return both(self._unit, forward(*args, **kwargs), held)  # type: ignore[misc]
        output = forward(*args, **kwargs)  # type: ignore[misc]
        if self._kept[step]:
            self._store(step, held, difference(self._unit, output))
        return output


S = TypeVar("S", bound="Skipping")


class Skipping:
    """Hooks that skip units of a denoiser. `remove()`, or leaving a `with` block, gives it back as it was.

    Args:
        denoiser: The denoiser, or those of all stages in order.
        gates: (steps, units); the first row of every stage is all True.
        rhythm: The calls of a generation; a list of timesteps for one call at each.
        forecasts: (steps, units) of kinds (`forecast.KINDS`), in place of `order`; not read where a gate is open.
        hook_all: Also units that always run, to measure what hooks take.
        check: Called with the pipeline (None: there is none) before the first call of every generation; may refuse it.

    Raises:
        SdfpError: If hooks of this kind are on the denoiser already.
    """

    clock_type: type[Clock] = Clock
    hook_type: type[UnitHook] = UnitHook

    def __init__(
        self,
        denoiser: nn.Module | Sequence[nn.Module],
        layout: Layout,
        gates: Gates,
        reuse: str,
        order: int,
        rhythm: Rhythm | Sequence[float],
        check: Callable[[Any], None] = lambda pipe: None,
        forecasts: Forecasts | None = None,
        hook_all: bool = False,
    ):
        self._denoisers = [denoiser] if isinstance(denoiser, nn.Module) else list(denoiser)
        for each in self._denoisers:
            if HookRegistry.check_if_exists_or_initialize(each).get_hook(_CLOCK) is not None:
                raise SdfpError(
                    type(each).__name__,
                    "a DiP-GO plan is applied already",
                    "Remove it first: handle.remove().",
                )
        rhythm = rhythm_of(rhythm)
        self._clock = self.clock_type(rhythm, check, self._before_call, self._after_call)
        # Of each denoiser: a unit that always runs is let alone, and costs nothing.
        self._units = [
            {i: each.get_submodule(layout.units[i].name) for i in np.flatnonzero(~gates.all(0) | hook_all)}
            for each in self._denoisers
        ]
        runs = gates.T.tolist()
        kinds = (np.full(gates.shape, str(order)) if forecasts is None else forecasts).T.tolist()
        # (units, steps, steps)
        taken = np.array([recalled(r, order, rhythm.stages, k) for r, k in zip(runs, kinds, strict=True)])
        self._recalled: NDArray[np.bool_] = np.any(taken, axis=0)
        kept = np.any(taken, axis=1).tolist()  # whether a unit's value of a step is taken later
        # Units that are reached in a step: what is within the whole network is not where that is reused.
        within = [i for i in self._units[0] if layout.units[i].guidance]
        self._reached = [
            len(self._units[0]) - (0 if gates[t, -1] else len(within)) for t in range(len(gates))
        ]
        residual = reuse == "residual"
        for stage, each in enumerate(self._denoisers):
            for i, module in self._units[stage].items():
                hook_type = GuidanceHook if layout.units[i].guidance else self.hook_type
                hook = hook_type(self._clock, layout.units[i], runs[i], kept[i], residual, kinds[i])
                if module is each or not put_around(module, hook):
                    _register(module, hook, f"{_UNIT}_{i}")
            # Last, so that it is the outermost where the denoiser itself is the unit.
            _register(each, self._clock.hook(stage), _CLOCK)

    def _before_call(self, generation: Generation, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuses a call that would take values of a batch of another shape: a tensor may well fit, and mean others."""
        step, shapes = generation.step, generation.kept.setdefault((_SHAPES, generation.branch), {})
        shapes[step] = tuple(batch_of(args, kwargs).shape)
        for source in np.flatnonzero(self._recalled[step]):
            if shapes[source] != shapes[step]:
                raise SdfpError(
                    WHERE,
                    f"reuses values of call {source} in call {step}, but the batch has changed from "
                    f"{shapes[source]} to {shapes[step]}",
                    "Keep guidance on, and the batch and size as they are, to the end of a generation, or remove the plan.",
                )

    def _after_call(self, generation: Generation) -> None:
        if generation.kept.pop(MET, 0) != self._reached[generation.step]:
            raise SdfpError(
                WHERE,
                "its hooks on units were taken off by something else, or a unit is called in parts",
                "Take the plan off (handle.remove()) and apply it again, after what changes the units' forward. "
                "Plans of granularity branch do not go with enable_forward_chunking().",
            )

    def remove(self) -> None:
        """Takes the hooks off; a second time does nothing."""
        self._clock.removed = True
        for denoiser, units in zip(self._denoisers, self._units, strict=True):
            for unit in units.values():
                take_off(unit, UnitHook)
            named = [(denoiser, _CLOCK), *((unit, f"{_UNIT}_{i}") for i, unit in reversed(units.items()))]
            # Outermost first: a hook beneath another one is not taken out of what that calls.
            for module, name in named:
                with _beneath_offloading(module):
                    HookRegistry.check_if_exists_or_initialize(module).remove_hook(name, recurse=False)
        self._clock.forget()

    def __enter__(self) -> Skipping:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _register(module: nn.Module, hook: ModelHook, name: str) -> None:
    with _beneath_offloading(module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


@contextmanager
def _beneath_offloading(module: nn.Module) -> Iterator[None]:
    """Changes to `module.forward` go beneath accelerate's hook, where there is one.

    Going, that hook puts back the `forward` which it found, and a pipeline takes it off and on with every generation.
    """
    outer = vars(module).get("forward")
    if getattr(getattr(outer, "func", None), "__module__", None) != "accelerate.hooks":
        yield
        return
    module.forward = module._old_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        module._old_forward, module.forward = module.forward, outer  # type: ignore[assignment]


def apply_dipgo(pipe: Any, plan: DipgoPlan | str | Path) -> Skipping:
    """Makes `pipe` skip what `plan` leaves out, from its next generation on; returns the handle to take it off.

    Args:
        pipe: A loaded diffusers pipeline.
        plan: A plan, or the path of one.

    Raises:
        SdfpError: If the plan belongs to another model or cannot work on it, or a plan is
            applied already. A generation with another scheduler or other timesteps than the
            plan's raises at its first denoiser call, before anything is computed.
    """
    if not isinstance(plan, DipgoPlan):
        plan = load_plan(plan)
    where = f"DiP-GO plan for {plan.pipeline}"
    found = denoisers_of(pipe)
    names = plan.rhythm.denoisers or tuple(found)[:1]
    if differences := plan.fingerprint.differences(pipeline_fingerprint(pipe)):
        raise PlanError(where, "was made for another model: " + "; ".join(differences), _SEARCH)
    if missing := [name for name in names if name not in found]:
        raise PlanError(where, f"is for pipe.{missing[0]}, which this pipeline does not have", _SEARCH)
    for name in names:
        if is_one_graph(getattr(pipe, name)):
            raise SdfpError(
                where,
                f"decides between {_PARTS[plan.granularity]}, and pipe.{name} is compiled as one graph",
                "Compile it without fullgraph=True"
                + (
                    ""
                    if plan.granularity == "branch"
                    else f", or its blocks: pipe.{name}.compile_repeated_blocks(fullgraph=True)"
                )
                + ".",
            )
    denoisers = [found[name] for name in names]
    layout = units_for(plan, denoisers, where)
    for denoiser in denoisers:
        for i in np.flatnonzero(~plan.gates.all(0)):
            if block := one_graph_around(denoiser, layout.units[i].name):
                raise SdfpError(
                    where,
                    f"decides within {block}, which is compiled as one graph",
                    "Compile it without fullgraph=True, or search with --granularity block.",
                )
    return put_on(pipe, plan, denoisers, layout, Skipping)


def put_on(pipe: Any, plan: DipgoPlan, denoisers: Sequence[nn.Module], layout: Layout, kind: type[S]) -> S:
    """Puts a plan that was found to fit on the denoisers of `pipe`, whose scheduler every generation is held against."""
    scheduler = plan.scheduler

    def check(running: Any) -> None:
        # Another pipeline may be built around the same denoiser, with a scheduler of its own.
        if differences := scheduler.differences(scheduler_fingerprint((running or pipe).scheduler)):
            raise SdfpError(
                f"DiP-GO plan for {plan.pipeline}",
                "does not fit this generation: " + "; ".join(differences),
                f"Use {scheduler.name} with num_inference_steps={scheduler.num_inference_steps}, "
                "or search a plan for these settings.",
            )

    return kind(
        denoisers, layout, plan.gates, plan.reuse, plan.order, plan.rhythm, check, plan.forecast_kinds
    )


def _has(denoiser: nn.Module, name: str) -> bool:
    try:
        denoiser.get_submodule(name)  # which sees through compiled modules, unlike their names
    except AttributeError:
        return False
    return True


def _read(layout: Layout) -> list[tuple[str, tuple[int, ...]]]:
    return [(unit.name, unit.inputs) for unit in layout.units]


def units_for(plan: DipgoPlan, denoisers: Sequence[nn.Module], where: str) -> Layout:
    """The plan's units, held against every denoiser they are for.

    A plan that was made before units had streams gets those of the class.

    Raises:
        PlanError: If a denoiser has other units.
    """
    layout = Layout(tuple(plan.units))
    for denoiser in denoisers:
        if plan.granularity != "step" and is_listed(denoiser):
            known = layout_of(denoiser, plan.granularity)
            described = plan.granularity == "block" and any(unit.branch for unit in layout.units)
            if not described and _read(known) != _read(layout):
                raise PlanError(f"{where}: field units", "names other units than this denoiser has", _SEARCH)
            if not layout.residual:
                layout = known
        if missing := [unit.name for unit in layout.units if not _has(denoiser, unit.name)]:
            raise PlanError(
                f"{where}: field units", f"names {missing[0]}, which this denoiser does not have", _SEARCH
            )
    if plan.reuse == "residual" and not layout.residual:
        raise PlanError(f"{where}: field reuse", "is residual, but units change their input's shape", _SEARCH)
    return layout
