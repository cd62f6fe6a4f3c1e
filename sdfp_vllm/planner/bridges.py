"""Bridges fitted in closed form to what really enters and should leave each run of skipped layers.

A run is bridged from h, the residual stream that the draft brings to it, to t, the full model's
stream behind it at the same position. Rows are first draft steps at every position of text that the
target wrote: past K/V from the full model, everything else from the pruned path, with the bridges of
the runs before in place. (Fitted on ordinary text, bridges gained less, and lost at some sizes.)
Least squares is weighted by 1 / rms(t), since the next norm divides by that.

    bias       shift = mean(t - h)
    affine     per channel, ridge towards the identity
    low-rank   reduced-rank ridge regression of t - h on h - mean(h) (Izenman 1975; with ridge:
               Mukherjee and Zhu 2011, eq. 2): the ridge solution projected on the leading right
               singular vectors of its fitted values

The ridge penalty is chosen on held-out rows; a run whose bridge does not lower the error there is
left without one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sdfp_vllm.plan.bridge import Bridge, BridgeKind
from sdfp_vllm.plan.bridge_file import Run
from sdfp_vllm.plan.schema import BridgeRun, runs_skipped
from sdfp_vllm.planner.bridged_stack import like_model, placing
from sdfp_vllm.planner.rollout import Continuations
from sdfp_vllm.planner.shared_attention import DraftRows, FullPass, rollout_attention
from sdfp_vllm.planner.stack import DecoderStack

# Penalties tried, over the mean square of the inputs.
_PENALTIES: dict[BridgeKind, tuple[float, ...]] = {
    "bias": (0.0,),
    "affine": (0.0, 0.03, 0.3, 1.0, 3.0),
    "low-rank": (0.01, 0.1, 1.0, 10.0, 100.0),
}
_HELD_OUT = 4  # one sequence in four chooses the penalty


@dataclass
class FittedBridges:
    """Bridges of one keep set, and how each did on the held-out rows."""

    runs: list[BridgeRun] = field(default_factory=list)
    bridges: dict[Run, Bridge] = field(default_factory=dict)


class _Fitting(nn.Module):
    """Stands in for the first skipped layer of a run: fits the run's bridge to its rows, then is it."""

    def __init__(self, fit: Callable[[Tensor], Bridge | None]):
        super().__init__()
        self.fit = fit

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bridge = self.fit(hidden_states[0])
        return hidden_states if bridge is None else bridge.apply(hidden_states)


@contextlib.contextmanager
def _recording(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yields a list that the hidden states [T, H] entering each of `modules` are added to, as they run."""
    entered: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((args[0] if args else kwargs["hidden_states"])[0])

    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield entered
    finally:
        for h in hooks:
            h.remove()


class BridgeFitter:
    """Fits bridges on the target's own text; the full pass over it is done once, at construction.

    Memory: for all tokens of `text`, K/V and the residual stream of every layer.

    Args:
        text: Other than what the bridges are judged on. Its prompts are fitted to as well.
    """

    @torch.no_grad()
    def __init__(self, stack: DecoderStack, text: Continuations):
        self.stack = stack
        self._ids = text.ids
        self._full = list(text.full)
        streams = []  # per window [L + 1, T - begin, H]: what enters each layer, and the final norm
        begins = text.begins.tolist()
        with rollout_attention(stack):
            for n, begin in enumerate(begins):
                full = FullPass(begin=begin)
                with _recording([*stack.layers, stack.norm]) as entered:
                    self._forward(text.whole(stack, n), full)
                streams.append(torch.stack(entered))
                if not text.full:  # K/V that came with the text are not held twice
                    self._full.append(full)
        # A text's first token, where attention sinks live, is never drafted; nor is an image; past its end a text is not read.
        position = torch.arange(self._ids.shape[1], device=stack.device)
        begin_of, end_of = (t.to(stack.device)[:, None] for t in (text.begins, text.ends))
        used = (position > begin_of) & (position < end_of) & ~text.images().to(stack.device)
        sequence, start = used.nonzero(as_tuple=True)
        self._rows, self._rotary = (sequence, start), text.rotary(sequence, start)
        self._streams = torch.cat(
            [s[:, used[n, begins[n] :]] for n, s in enumerate(streams)], dim=1
        )  # [L + 1, rows, H]
        count = len(self._ids)
        share = max(1, count // _HELD_OUT)
        self._held = sequence >= count - share if count > 1 else start % _HELD_OUT == 0

    @torch.no_grad()
    def fit(self, keep: Sequence[int], kind: BridgeKind, rank: int) -> FittedBridges:
        """Fits a bridge of `kind` over every run that `keep` skips, run after run in draft order."""
        fitted = FittedBridges()
        rank = min(rank, self._streams.shape[-1])

        def fit_run(run: Run, h: Tensor) -> Bridge | None:
            bridge, penalty, error = fit_bridge(h, self._streams[run[1] + 1], self._held, kind, rank)
            if error >= 1.0:
                return None
            fitted.bridges[run] = bridge
            fitted.runs.append(
                BridgeRun(first=run[0], last=run[1], regularisation=penalty, error=round(error, 6))
            )
            return like_model(bridge, self.stack)

        modules = {
            run[0]: _Fitting(partial(fit_run, run))
            for run in sorted(runs_skipped(keep, self.stack.num_layers))
        }
        with placing(self.stack, keep, modules), rollout_attention(self.stack):
            self._first_steps()
        return fitted

    def blank(self, kind: BridgeKind, rank: int) -> Bridge:
        """A bridge of the shape that `fit` gives, to be timed before any is fitted."""
        vector = self._streams.new_zeros(self._streams.shape[-1])
        matrix = vector.repeat(min(rank, len(vector)), 1)
        return {
            "bias": Bridge(vector),
            "affine": Bridge(vector, scale=vector),
            "low-rank": Bridge(vector, mean=vector, down=matrix, up=matrix),
        }[kind]

    def _first_steps(self) -> None:
        """Runs the first draft step of every row, on the model as it stands."""
        sequence, start = self._rows
        given = {"input_ids": self._ids[sequence, start][None], "position_ids": self._rotary[None]}
        self._forward(given, DraftRows(self._full, sequence, start))

    def _forward(self, given: dict[str, Any], state: FullPass | DraftRows) -> None:
        self.stack.model.model(**given, use_cache=False, rollout=state)


def fit_bridge(
    h: Tensor, target: Tensor, held: Tensor, kind: BridgeKind, rank: int
) -> tuple[Bridge, float, float]:
    """Fits one bridge.

    Args:
        h, target: [R, H], what enters the run and what should leave it.
        held: bool [R], rows that choose the penalty; the others are fitted.

    Returns:
        The bridge (float32), its penalty, and its weighted squared error on the held-out rows over that
        of no bridge (infinite where that has none: there is nothing to mend).
    """
    h, target = h.double(), target.double()
    weight = target.square().mean(-1, keepdim=True).rsqrt()
    base = ((target - h) * weight)[held].square().sum()
    solve = {"bias": _bias, "affine": _affine, "low-rank": _low_rank}[kind]
    best: tuple[float, float, Bridge] | None = None
    for penalty, bridge in solve(h[~held], target[~held], weight[~held], rank, _PENALTIES[kind]):
        error = float(((target - bridge.apply(h)) * weight)[held].square().sum() / base)
        if best is None or error < best[0]:
            best = (error, penalty, bridge)
    assert best is not None
    error, penalty, bridge = best
    if not error < float("inf"):  # the target equals its input, or is not finite
        error = float("inf")
    return bridge.to(dtype=torch.float32), penalty, error


_Fits = Iterator[tuple[float, Bridge]]


def _means(h: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means [H] of the input and of what the run adds to it."""
    w = weight.square() / weight.square().sum()
    return (w * h).sum(0), (w * (target - h)).sum(0)


def _bias(h: Tensor, target: Tensor, weight: Tensor, rank: int, penalties: Sequence[float]) -> _Fits:
    yield 0.0, Bridge(_means(h, target, weight)[1])


def _affine(h: Tensor, target: Tensor, weight: Tensor, rank: int, penalties: Sequence[float]) -> _Fits:
    mean, added = _means(h, target, weight)
    x, y = (h - mean) * weight, (target - h - added) * weight
    variance = x.square().sum(0).clamp_min(torch.finfo(x.dtype).tiny)
    for penalty in penalties:
        slope = (x * y).sum(0) / (variance * (1.0 + penalty))
        yield penalty, Bridge(added - slope * mean, scale=1.0 + slope)


def _low_rank(h: Tensor, target: Tensor, weight: Tensor, rank: int, penalties: Sequence[float]) -> _Fits:
    mean, added = _means(h, target, weight)
    x, y = (h - mean) * weight, (target - h - added) * weight
    u, s, v = _thin_svd(x)
    seen = u.T @ y  # [K, H]: what the inputs can say about the outputs
    for penalty in penalties:
        ridge = s.square() + penalty * s.square().mean()
        # Of the fitted values in the metric of the penalised problem, the leading directions.
        _, _, directions = _thin_svd(seen * (s / ridge.sqrt())[:, None], rank)
        down = v @ ((s / ridge)[:, None] * (seen @ directions))  # [H, rank]
        missing = (0, 0, 0, rank - directions.shape[1])  # fewer directions than asked for
        yield penalty, Bridge(added, mean=mean, down=pad(down.T, missing), up=pad(directions.T, missing))


def _thin_svd(a: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, K], S [K] descending, V [H, K] of a [N, H], by the eigenvectors of the smaller Gram matrix.

    Args:
        rank: Keeps this many at most; K is that, or the numerical rank.
    """
    wide = a.shape[0] < a.shape[1]
    values, vectors = torch.linalg.eigh(a @ a.T if wide else a.T @ a)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > values[0] * 1e-12
    if rank is not None:
        keep[rank:] = False
    if not keep.any():
        keep[0] = True
    s, vectors = values[keep].clamp_min(torch.finfo(a.dtype).tiny).sqrt(), vectors[:, keep]
    other = (a.T if wide else a) @ vectors / s
    return (vectors, s, other) if wide else (other, s, vectors)
