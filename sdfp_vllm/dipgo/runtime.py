"""Running a pipeline with a plan: units that the plan leaves out are not executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from sdfp_vllm.dipgo.clock import WHERE, Clock, Generation
from sdfp_vllm.dipgo.fingerprint import pipeline_fingerprint, scheduler_fingerprint
from sdfp_vllm.dipgo.history import History, recalled
from sdfp_vllm.dipgo.layout import Gates, Layout, denoiser_of, layout_of
from sdfp_vllm.dipgo.plan import DipgoPlan, load_plan
from sdfp_vllm.errors import PlanError, SdfpError

_CLOCK, _UNIT = "sdfp_dipgo_clock", "sdfp_dipgo_unit"
_SHAPES, _MET = "shapes of the calls' samples", "units that were reached in this call"
_SEARCH = "Make one for this pipeline with `sdfp dipgo search`."


class UnitHook(ModelHook):
    """Runs its unit, or gives what the unit gave before.

    With residual reuse what is kept is what the unit added to its input; a unit that runs
    still returns its own output, bit for bit.
    """

    def __init__(self, clock: Clock, runs: list[bool], residual: bool, order: int):
        super().__init__()
        self._clock, self._runs, self._residual, self._order = clock, runs, residual, order
        self._kept = [bool(taken.any()) for taken in recalled(runs, order).T]

    # The unit itself may be compiled: what is called from here is no part of what is left out.
    @partial(torch.compiler.disable, recursive=False, reason="a DiP-GO plan skips it in some calls")
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        if self._clock.removed:
            return forward(*args, **kwargs)  # type: ignore[misc]  # set by the registry
        generation = self._clock.now
        step, kept = generation.step, generation.kept
        kept[_MET] = kept.get(_MET, 0) + 1
        history = kept.setdefault(self, History(self._order))
        if not self._runs[step]:
            reused = history.recall(step)
            return input_of(args, kwargs) + reused if self._residual else reused
        if not self._kept[step]:
            return forward(*args, **kwargs)  # type: ignore[misc]
        # Of the input as it is now: the unit may write into it.
        entering = input_of(args, kwargs).clone() if self._residual else None
        output = forward(*args, **kwargs)  # type: ignore[misc]
        history.store(step, output if entering is None else output - entering)
        return output


def input_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


class Skipping:
    """Hooks that skip units of a denoiser. `remove()`, or leaving a `with` block, gives it back as it was.

    Args:
        gates: (calls, units); the first row is all True.
        timesteps: Of every call of a generation.
        check: Called with the pipeline (None: there is none) before the first call of every generation; may refuse it.

    Raises:
        SdfpError: If hooks of this kind are on the denoiser already.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layout: Layout,
        gates: Gates,
        reuse: str,
        order: int,
        timesteps: Sequence[float],
        check: Callable[[Any], None] = lambda pipe: None,
    ):
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        if registry.get_hook(_CLOCK) is not None:
            raise SdfpError(
                type(denoiser).__name__,
                "a DiP-GO plan is applied already",
                "Remove it first: handle.remove().",
            )
        self._denoiser = denoiser
        self._clock = Clock(timesteps, check, self._before_call, self._after_call)
        self._units = layout.modules(denoiser)
        runs = gates.T.tolist()
        self._recalled = np.any([recalled(column, order) for column in runs], axis=0)
        for module, column in zip(self._units, runs, strict=True):
            _register(module, UnitHook(self._clock, column, reuse == "residual", order), _UNIT)
        # Last, so that it is the outermost where the denoiser itself is the unit.
        _register(denoiser, self._clock, _CLOCK)

    def _before_call(self, generation: Generation, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuses a call that would take values of a batch of another shape: a tensor may well fit, and mean others."""
        step, shapes = generation.step + 1, generation.kept.setdefault(_SHAPES, [])
        shapes.append(tuple((kwargs["sample"] if "sample" in kwargs else input_of(args, kwargs)).shape))
        for source in np.flatnonzero(self._recalled[step]):
            if shapes[source] != shapes[step]:
                raise SdfpError(
                    WHERE,
                    f"reuses values of call {source} in call {step}, but the batch has changed from "
                    f"{shapes[source]} to {shapes[step]}",
                    "Keep guidance on, and the batch and size as they are, to the end of a generation, or remove the plan.",
                )

    def _after_call(self, generation: Generation) -> None:
        if generation.kept.pop(_MET, 0) != len(self._units):
            raise SdfpError(
                WHERE,
                "its hooks on units were taken off by something else",
                "Take the plan off (handle.remove()) and apply it again, after what changes the units' forward.",
            )

    def remove(self) -> None:
        """Takes the hooks off; a second time does nothing."""
        self._clock.removed = True
        for module, name in ((self._denoiser, _CLOCK), *((unit, _UNIT) for unit in self._units)):
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
        pipe: A loaded diffusers pipeline around a supported denoiser.
        plan: A plan, or the path of one.

    Raises:
        SdfpError: If the plan belongs to another model or cannot work on it, or a plan is
            applied already. A generation with another scheduler or other timesteps than the
            plan's raises at its first denoiser call, before anything is computed.
    """
    if not isinstance(plan, DipgoPlan):
        plan = load_plan(plan)
    scheduler = plan.scheduler
    where = f"DiP-GO plan for {plan.pipeline}"
    name, denoiser = denoiser_of(pipe)
    if getattr(getattr(getattr(pipe, name), "dynamo_ctx", None), "fullgraph", False):
        raise SdfpError(
            where,
            f"decides between blocks, and pipe.{name} is compiled as one graph",
            f"Compile it without fullgraph=True: pipe.{name} = torch.compile(pipe.{name}).",
        )
    if differences := plan.fingerprint.differences(pipeline_fingerprint(pipe)):
        raise PlanError(where, "was made for another model: " + "; ".join(differences), _SEARCH)
    layout = layout_of(denoiser, plan.granularity)
    if plan.units != list(layout.units):
        raise PlanError(f"{where}: field units", "names other units than this denoiser has", _SEARCH)
    if plan.reuse == "residual" and not layout.residual:
        raise PlanError(f"{where}: field reuse", "is residual, but units change their input's shape", _SEARCH)

    def check(running: Any) -> None:
        # Another pipeline may be built around the same denoiser, with a scheduler of its own.
        if differences := scheduler.differences(scheduler_fingerprint((running or pipe).scheduler)):
            raise SdfpError(
                where,
                "does not fit this generation: " + "; ".join(differences),
                f"Use {scheduler.name} with num_inference_steps={scheduler.num_inference_steps}, "
                "or search a plan for these settings.",
            )

    return Skipping(denoiser, layout, plan.gates, plan.reuse, plan.order, scheduler.timesteps, check)
