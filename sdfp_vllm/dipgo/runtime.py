"""Running a pipeline with a plan: units that the plan leaves out are not executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from sdfp_vllm.dipgo.clock import Clock
from sdfp_vllm.dipgo.fingerprint import pipeline_fingerprint, scheduler_fingerprint
from sdfp_vllm.dipgo.history import History
from sdfp_vllm.dipgo.layout import Gates, Layout, denoiser_of, layout_of
from sdfp_vllm.dipgo.plan import DipgoPlan, load_plan
from sdfp_vllm.errors import PlanError, SdfpError

_CLOCK, _UNIT = "sdfp_dipgo_clock", "sdfp_dipgo_unit"
_SEARCH = "Make one for this pipeline with `sdfp dipgo search`."


class UnitHook(ModelHook):
    """Runs its unit, or gives what the unit gave before.

    With residual reuse the history holds what the unit added to its input; a unit that runs
    still returns its own output, bit for bit.
    """

    def __init__(self, clock: Clock, runs: list[bool], residual: bool, order: int):
        super().__init__()
        self.history = History(order)
        self._clock, self._runs, self._residual = clock, runs, residual

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step = self._clock.step
        if self._runs[step]:
            output = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]  # set by the registry
            self.history.store(step, output - input_of(args, kwargs) if self._residual else output)
            return output
        reused = self.history.recall(step)
        return input_of(args, kwargs) + reused if self._residual else reused


def input_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


class Skipping:
    """Hooks that skip units of a denoiser. `remove()`, or leaving a `with` block, gives it back as it was.

    Args:
        gates: (calls, units); the first row is all True.
        timesteps: Of every call of a generation.
        check: Called before the first call of every generation; may refuse it.

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
        check: Callable[[], None] = lambda: None,
    ):
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        if registry.get_hook(_CLOCK) is not None:
            raise SdfpError(
                type(denoiser).__name__,
                "a DiP-GO plan is applied already",
                "Remove it first: handle.remove().",
            )
        self._denoiser, self._check = denoiser, check
        self._clock = Clock(timesteps, on_start=self._start, on_end=self._forget)
        self._units = layout.modules(denoiser)
        self._hooks = [
            UnitHook(self._clock, gates[:, i].tolist(), reuse == "residual", order)
            for i in range(len(self._units))
        ]
        for module, hook in zip(self._units, self._hooks, strict=True):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _UNIT)
        # Last, so that it is the outermost where the denoiser itself is the unit.
        registry.register_hook(self._clock, _CLOCK)

    def _start(self) -> None:
        self._forget()
        self._check()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.history.clear()

    def remove(self) -> None:
        """Takes the hooks off; a second time does nothing."""
        HookRegistry.check_if_exists_or_initialize(self._denoiser).remove_hook(_CLOCK, recurse=False)
        for module in self._units:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(_UNIT, recurse=False)
        self._forget()

    def __enter__(self) -> Skipping:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


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
    _, denoiser = denoiser_of(pipe)
    if differences := plan.fingerprint.differences(pipeline_fingerprint(pipe)):
        raise PlanError(where, "was made for another model: " + "; ".join(differences), _SEARCH)
    layout = layout_of(denoiser, plan.granularity)
    if plan.units != list(layout.units):
        raise PlanError(f"{where}: field units", "names other units than this denoiser has", _SEARCH)
    if plan.reuse == "residual" and not layout.residual:
        raise PlanError(f"{where}: field reuse", "is residual, but units change their input's shape", _SEARCH)

    def check() -> None:
        if differences := scheduler.differences(scheduler_fingerprint(pipe.scheduler)):
            raise SdfpError(
                where,
                "does not fit this generation: " + "; ".join(differences),
                f"Use {scheduler.name} with num_inference_steps={scheduler.num_inference_steps}, "
                "or search a plan for these settings.",
            )

    return Skipping(denoiser, layout, plan.gates, plan.reuse, plan.order, scheduler.timesteps, check)
