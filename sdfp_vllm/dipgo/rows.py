"""Denoiser calls whose rows belong to several requests, each at a step of its own: continuous batching.

Every request has a clock and a history of its own. A unit runs for the rows of those whose step it is open in; the others
take what it gave for them before, as they would alone.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sdfp_vllm.dipgo.clock import WHERE, Clock, Generation
from sdfp_vllm.dipgo.graph_breaks import between_graphs
from sdfp_vllm.dipgo.layout import unwrapped
from sdfp_vllm.dipgo.runtime import MET, Skipping, UnitHook
from sdfp_vllm.dipgo.streams import added, argument, batch_of, entering, passed
from sdfp_vllm.errors import SdfpError

# Parameters of blocks and denoisers that have a row for each of the batch. Others, such as rotary embeddings, are shared.
_BATCHED = (
    "attention_mask", "class_labels", "encoder_attention_mask", "encoder_hidden_states",
    "encoder_hidden_states_mask", "guidance", "hidden_states", "hidden_states_mask", "modulate_index",
    "pooled_projections", "temb", "timestep",
)  # fmt: skip


class Request:
    """A request, as a clock's owner of a generation: under way for as long as `state`, the server's record of it, lives.

    Args:
        state: Has the request's `scheduler`, and as `step_index` the steps it has made.
    """

    frame = 1  # of no stack: it belongs to no run of a pipeline

    def __init__(self, state: Any):
        self._state = weakref.ref(state)
        self.thread = threading.current_thread()

    @property
    def key(self) -> Hashable:
        return id(self)  # a generation under way holds it

    @property
    def pipe(self) -> Any | None:
        return self._state()

    @property
    def steps_done(self) -> int | None:
        return getattr(self._state(), "step_index", None)

    @property
    def gone(self) -> bool:
        return self._state() is None


class RowClock(Clock):
    """A clock for calls of one generation, and within `rows` for those of several.

    How many calls a step has is counted, for a server guides each request as that asks, in whichever way it does.
    """

    count_calls = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._requests: list[tuple[Request | None, int]] | None = None
        # Of the call under way, where its rows are of several: each one's generation (None: runs in full) and rows.
        self.parts: list[tuple[Generation | None, slice]] | None = None

    @contextmanager
    def rows(self, requests: Sequence[tuple[Request | None, int]]) -> Iterator[None]:
        """In here, the rows of a call are so many of each of `requests`, in this order; those of None run in full."""
        self._requests = list(requests)
        try:
            yield
        finally:
            self._requests = self.parts = None

    def enter(self, stage: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.parts = None
        if self._requests is None:
            return super().enter(stage, module, args, kwargs)
        batch, given = batch_of(args, kwargs), argument(module, "timestep", args, kwargs)
        times = given.flatten().tolist()
        if not len(times) == len(batch) == sum(count for _, count in self._requests):
            raise SdfpError(
                WHERE,
                f"the denoiser is called with {len(batch)} rows and {len(times)} timesteps for "
                f"{sum(count for _, count in self._requests)} rows of requests",
                "Remove the plan, or ask for guidance in calls of its own.",
            )
        parts: list[tuple[Generation | None, slice]] = []
        begin = 0
        for request, count in self._requests:
            rows = slice(begin, begin + count)
            begin += count
            if request is None:
                parts.append((None, rows))
                continue
            if len(set(times[rows])) > 1:
                raise SdfpError(
                    WHERE, "the rows of one request are at different timesteps", "Remove the plan."
                )
            now = times[rows.start]
            generation = self._advance(stage, request, given, now, (), {"hidden_states": batch[rows]})
            parts.append((generation, rows))
        self.parts = parts

    def leave(self) -> None:
        parts, self.parts = self.parts, None
        if parts is None:
            return super().leave()
        for generation, _ in parts:
            if generation is not None:
                self._done(generation)

    def forget(self) -> None:
        super().forget()
        self.parts = None


class RowHook(UnitHook):
    """Runs its unit for some rows of a call and gives the others what it gave for them before."""

    _clock: RowClock

    @between_graphs
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._clock.removed or self._clock.parts is None:
            return super().new_forward(module, *args, **kwargs)
        entered, running = self._split(module, args, kwargs)
        output = None
        if running is not None:
            output = self.fn_ref.original_forward(*running[0], **running[1])  # type: ignore[misc]  # set by the registry
        return self._joined(entered, output)

    @torch.compiler.disable
    def _split(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[list[list[Tensor]], tuple[tuple, dict[str, Any]] | None]:
        """The streams of each part as they go in, and the arguments for the rows that the unit runs for (None: there are none)."""
        parts = self._clock.parts or []
        for generation, _ in parts:
            if generation is not None:
                generation.kept[MET] = generation.kept.get(MET, 0) + 1
        streams = entering(self._unit, module, args, kwargs)
        entered = [[x[rows] for x in streams] for _, rows in parts]
        running = [rows for generation, rows in parts if self._open(generation)]
        if not running:
            return entered, None
        if len(running) < len(parts):
            return entered, _chosen(module, args, kwargs, running, parts[-1][1].stop)
        if self._residual:
            entered = [
                [x.clone() for x in each] for each in entered
            ]  # the unit may write into what it is given
        return entered, (args, kwargs)

    @torch.compiler.disable
    def _joined(self, entered: list[list[Tensor]], output: Any) -> Any:
        """What the unit gave for the rows that it ran for, and what it gave before for the others; in the order of the call."""
        pieces, begin = [], 0
        for (generation, rows), streams in zip(self._clock.parts or [], entered, strict=True):
            if self._open(generation):
                end = begin + rows.stop - rows.start
                piece = tree_map(partial(_rows, slice(begin, end)), output)
                begin = end
                if generation is not None and self._kept[generation.step]:
                    value = added(self._unit, streams, piece) if self._residual else piece
                    self._history(generation).store(generation.step, value)
            else:
                assert generation is not None, "what runs in full is open"
                history = self._history(generation)
                history.refit({s.place: x.shape[1] for s, x in zip(self._unit.streams, streams, strict=True)})
                reused = history.recall(generation.step, self._kinds[generation.step])
                piece = passed(self._unit, streams, reused) if self._residual else reused
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else tree_map(_one, *pieces)

    def _open(self, generation: Generation | None) -> bool:
        return generation is None or self._runs[generation.step]


def _chosen(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], running: list[slice], size: int
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with some of its rows; those that are shared by all rows as they are."""

    def chosen(name: str, value: Any) -> Any:
        if name not in _BATCHED or not isinstance(value, Tensor):
            return value
        if len(value) != size:
            raise SdfpError(
                type(module).__name__,
                f"has {len(value)} rows of {name} for a batch of {size}",
                "Remove the plan, or serve requests one at a time.",
            )
        return torch.cat([value[rows] for rows in running])

    names = list(inspect.signature(type(unwrapped(module)).forward).parameters)[1:]
    return (
        tuple(chosen(name, value) for name, value in zip(names, args, strict=False)),
        {name: chosen(name, value) for name, value in kwargs.items()},
    )


def _rows(rows: slice, value: Any) -> Any:
    return value[rows] if isinstance(value, Tensor) else value


def _one(*pieces: Any) -> Any:
    return torch.cat(pieces) if isinstance(pieces[0], Tensor) else pieces[0]


class RowSkipping(Skipping):
    """Hooks that skip units of a denoiser, in calls of one generation or of rows of several."""

    clock_type = RowClock
    hook_type = RowHook

    _clock: RowClock

    def rows(self, requests: Sequence[tuple[Request | None, int]]) -> Any:
        """A context in which the rows of a call are those of `requests`; see `RowClock.rows`."""
        return self._clock.rows(requests)
