"""One generation listened to before anything is searched: which calls of which denoiser a pipeline makes.

Nothing of this can be read from the scheduler alone: Flux hands on a thousandth of its timesteps, Qwen-Image asks for guidance
in a call of its own, image-to-image begins later, and Wan changes over to another denoiser on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sdfp_vllm.dipgo.clock import timestep_of
from sdfp_vllm.dipgo.fingerprint import SchedulerFingerprint, scheduler_fingerprint
from sdfp_vllm.dipgo.rhythm import Rhythm
from sdfp_vllm.errors import SdfpError

_HOOK = "sdfp_dipgo_rehearsal"
Call = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Rehearsed:
    """What a generation of one image was found to do.

    Attributes:
        rhythm: Its denoiser calls.
        scheduler: Its scheduler, at the first call.
        calls: Of every stage, the arguments of the calls of its first step.
    """

    rhythm: Rhythm
    scheduler: SchedulerFingerprint
    calls: list[list[Call]]


@dataclass
class _Step:
    """The calls between two steps of the scheduler."""

    names: list[str]
    timesteps: list[float]
    shapes: list[tuple]
    calls: list[Call]


def rehearse(pipe: Any, denoisers: Mapping[str, nn.Module], generate: Callable[[], Any]) -> Rehearsed:
    """Runs `generate`, a generation of one image, and notes how it calls `denoisers`.

    The denoiser computes only once for each form of call: later calls of the same shapes get the first answer again, for
    neither timesteps nor shapes depend on what is predicted.

    Raises:
        SdfpError: If the pipeline's way of calling cannot be planned, with the setting to change.
    """
    steps: list[_Step] = []
    fingerprints: list[SchedulerFingerprint] = []
    with _listening(pipe, denoisers, steps, fingerprints), torch.no_grad():
        generate()
    steps = [step for step in steps if step.calls]
    name = type(pipe).__name__
    if not steps:
        raise SdfpError(name, "never called its denoiser", "Use a pipeline whose scheduler makes steps.")
    for i, step in enumerate(steps):
        _check(name, i, step, steps[0])
    stages = [i for i, step in enumerate(steps) if i == 0 or step.names[0] != steps[i - 1].names[0]]
    order = [steps[i].names[0] for i in stages]
    if len(set(order)) != len(order):
        raise SdfpError(name, "goes to and fro between its denoisers", "DiP-GO plans one after the other.")
    for begin, end in zip(stages, [*stages[1:], len(steps)], strict=True):
        for i in range(begin, end):
            if steps[i].shapes != steps[begin].shapes:
                raise SdfpError(
                    name,
                    f"changes its batch in step {i}, from {steps[begin].shapes[0]} to {steps[i].shapes[0]}",
                    "Keep guidance on, and the size as it is, to the end of a generation.",
                )
    return Rehearsed(
        Rhythm(
            timesteps=[step.timesteps[0] for step in steps],
            branches=len(steps[0].calls),
            stages=tuple(stages),
            denoisers=tuple(order),
        ),
        fingerprints[0],
        [steps[i].calls for i in stages],
    )


def _check(name: str, i: int, step: _Step, first: _Step) -> None:
    if len(step.calls) != len(first.calls):
        raise SdfpError(
            name,
            f"calls its denoiser {len(first.calls)} time(s) in step 0 and {len(step.calls)} in step {i}",
            "Switch off what adds or leaves out calls in some steps (skipped layers, guidance that ends on the way).",
        )
    if len(set(step.names)) > 1 or len(set(step.timesteps)) > 1:
        raise SdfpError(
            name,
            f"calls its denoisers at several timesteps, or several denoisers, in step {i}",
            "Use a scheduler that makes a step after every prediction.",
        )


@contextmanager
def _listening(
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    steps: list[_Step],
    fingerprints: list[SchedulerFingerprint],
) -> Iterator[None]:
    scheduler, begin = pipe.scheduler, lambda: steps.append(_Step([], [], [], []))
    begin()
    # Pipelines look at the parameters of `step`, which `wraps` keeps.
    plain = scheduler.step

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        begin()
        return plain(*args, **kwargs)

    scheduler.step = step
    for name, denoiser in denoisers.items():
        hook = _Listener(pipe, name, steps, fingerprints)
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(hook, _HOOK)
    try:
        yield
    finally:
        del scheduler.step
        for denoiser in denoisers.values():
            HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(_HOOK, recurse=False)


class _Listener(ModelHook):
    def __init__(self, pipe: Any, name: str, steps: list[_Step], fingerprints: list[SchedulerFingerprint]):
        super().__init__()
        self._pipe, self._name, self._steps, self._fingerprints = pipe, name, steps, fingerprints
        self._answers: dict[Any, Any] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The containers anew: some denoisers take arguments out of them.
        call = tree_map(lambda leaf: leaf, (args, kwargs))
        if not self._fingerprints:
            self._fingerprints.append(scheduler_fingerprint(self._pipe.scheduler))
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(call) if isinstance(leaf, Tensor))
        step = self._steps[-1]
        step.names.append(self._name)
        step.timesteps.append(timestep_of(module, args, kwargs)[1])
        step.shapes.append(shapes)
        first = all(self._name not in before.names for before in self._steps[:-1])
        step.calls.append(call if first else ((), {}))  # only those of a stage's first step are asked for
        if shapes not in self._answers:
            self._answers[shapes] = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self._answers[shapes])
