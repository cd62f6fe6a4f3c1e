"""The first draft step, judged smoothly: what keep sets and gates do to the draft's distribution.

A rollout counts accepted tokens: exact, but coarse on little text, and several steps long. Here one
step is taken from every start position of text the target wrote, over the full model's K/V as in
`rollout.py`, and distributions are compared:

    overlap      mean over positions of sum_x min(p(x), q(x)), the chance that a sampled draft is accepted
    divergence   mean KL(p || q) in nats, p the full model's distribution and q the draft's

The divergence is differentiated by gates, one for every residual branch, that multiply what the
branch adds to the stream: with 1 it runs, with 0 it is skipped. One backward pass gives all
derivatives, those of skipped branches included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.plan.keep import Branch, KeepSet
from sdfp_vllm.plan.view import BRANCHES
from sdfp_vllm.planner.bridged_stack import placing
from sdfp_vllm.planner.rollout import DraftRollout
from sdfp_vllm.planner.shared_attention import DraftRows, rollout_attention

_HEAD_ROWS = 256  # rows of logits alive at once
_BACKWARD_ROWS = 64


class FirstStep:
    """The first draft step at start positions of a rollout's text.

    Args:
        sequences: Use this many of its sequences, from the first; None for all.
    """

    @torch.no_grad()
    def __init__(self, rollout: DraftRollout, sequences: int | None = None):
        self._rollout, self.stack = rollout, rollout.stack
        self._overlaps: dict[KeepSet, float] = {}
        self._target: list[Tensor] | None = None
        self._center = KeepSet()
        self._streams: dict[int, Tensor] = {}  # of the residual after each layer of `center`, [1, R, hidden]
        rows, text = rollout.all_rows(), rollout.text
        used = rows.start < text.ends[rows.sequence]
        if sequences is not None:
            used &= rows.sequence < sequences
        self._rows = rows.select(used)
        count = len(self._rows.start)
        # What a backward pass keeps alive at a time.
        self.chunks = [_at(self._rows, part) for part in torch.arange(count).split(_BACKWARD_ROWS)]
        self._full = self._hidden(self._rows)  # of the full model, every layer in place

    @torch.no_grad()
    def overlap(self, keep: KeepSet) -> float:
        """The mean overlap of the draft's distribution with the full model's; computed once for each keep set."""
        if keep not in self._overlaps:
            self._overlaps[keep] = self._overlap(self._hidden_of(keep))
        return self._overlaps[keep]

    @torch.no_grad()
    def center(self, keep: KeepSet) -> None:
        """Overlaps to come start from what `keep` and they have in common: its streams after each layer are kept."""
        self._center, self._streams = keep, {}
        with self.stack.keeping(keep) as model, contextlib.ExitStack() as hooks:
            layers: Any = model.model.layers
            for i in keep.touched():
                hook = layers[i].register_forward_hook(self._note(i))
                hooks.callback(hook.remove)
            hidden = self._hidden(self._rows)
        self._overlaps[keep] = self._overlap(hidden)

    def _note(self, i: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Tensor) -> None:
            self._streams[i] = out

        return note

    def _hidden_of(self, keep: KeepSet) -> Tensor:
        """Final hidden states [R, hidden] of a draft, resumed where it parts from `center`."""
        last = None  # layer up to which both run the same
        for i in range(self.stack.num_layers):
            if _seen(keep, i) != _seen(self._center, i):
                break
            last = i if i in self._streams else last
        if last is None:
            with self.stack.keeping(keep):
                return self._hidden(self._rows)
        with placing(self.stack, keep.after(last), {last: _Resume(self._streams[last])}):
            return self._hidden(self._rows)

    def _overlap(self, hidden: Tensor) -> float:
        if self._target is None:
            parts = (self.stack.head(h).float() for h in self._full.split(_HEAD_ROWS))
            self._target = [self.stack.scaled(part).softmax(-1) for part in parts]
        total, head = 0.0, self._rollout.head or self.stack.head
        for ours, p in zip(hidden.split(_HEAD_ROWS), self._target, strict=True):
            draft = self.stack.scaled(head(ours).float())
            total += float(torch.minimum(p, draft.softmax(-1)).sum())
        return total / len(hidden)

    def divergence(self, gates: Tensor, chunks: Sequence[int] | None = None) -> tuple[float, Tensor]:
        """The mean divergence, and its derivative by the gates.

        Args:
            gates: float [L, 2], attention and MLP.
            chunks: Which of `chunks` to take the mean over; None for all.

        Returns:
            (nats a token, derivative float32 [L, 2] on the CPU).
        """
        leaf = gates.detach().to(self.stack.device, torch.float32).requires_grad_()
        chosen = range(len(self.chunks)) if chunks is None else chunks
        rows = sum(len(self.chunks[i].start) for i in chosen)
        total, derivative = 0.0, torch.zeros_like(leaf)
        for i in chosen:
            with torch.enable_grad(), self._gating(leaf):
                full = self._full[_BACKWARD_ROWS * i :][: len(self.chunks[i].start)]
                value = self._divergence(self._hidden(self.chunks[i]), full) / rows
                (part,) = torch.autograd.grad(value, leaf)
            total, derivative = total + float(value.detach()), derivative + part
        return total, derivative.cpu()

    def _divergence(self, hidden: Tensor, full: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        for ours, theirs in zip(hidden.split(_HEAD_ROWS), full.split(_HEAD_ROWS), strict=True):
            with torch.no_grad():
                target = self.stack.scaled(self.stack.head(theirs).float()).log_softmax(-1)
            draft = self.stack.scaled(self.stack.head(ours).float()).log_softmax(-1)
            total = total + nn.functional.kl_div(draft, target, log_target=True, reduction="sum")
        return total

    def _hidden(self, chunk: DraftRows) -> Tensor:
        """Final hidden states [R, hidden] of the model as it stands, one row a start position."""
        fresh = DraftRows(chunk.full, chunk.sequence, chunk.start)  # its chain of K/V starts anew
        ids = self._rollout.text.ids[fresh.sequence, fresh.start]
        with rollout_attention(self.stack):
            return self._rollout.hidden(ids, fresh.start, fresh)

    @contextlib.contextmanager
    def _gating(self, gates: Tensor) -> Iterator[None]:
        def hook(gate: Tensor) -> Callable[..., Any]:
            def scale(module: nn.Module, args: Any, out: Any) -> Any:
                if isinstance(out, tuple):
                    return (out[0] * gate.to(out[0].dtype), *out[1:])
                return out * gate.to(out.dtype)

            return scale

        hooks = [
            self.stack.branch_end(i, branch).register_forward_hook(hook(gates[i, j]))
            for i in range(self.stack.num_layers)
            for j, branch in enumerate(BRANCHES)
        ]
        try:
            yield
        finally:
            for h in hooks:
                h.remove()


class _Resume(nn.Module):
    """Stands in for a layer up to which the residual stream [1, R, hidden] is known."""

    def __init__(self, stream: Tensor):
        super().__init__()
        self.stream = stream

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.stream


def _at(rows: DraftRows, which: Tensor) -> DraftRows:
    """A draft's first step from some of the rows of another, by ascending index."""
    which = which.to(rows.start.device)
    return DraftRows(rows.full, rows.sequence[which], rows.start[which])


def _seen(view: KeepSet, i: int) -> set[tuple[Branch, str]]:
    """What of layer i runs, and how."""
    return {(b, view.precision(i, b)) for b in view.branches(i)}


def gates_of(keep: KeepSet, num_layers: int) -> Tensor:
    """float32 [L, 2]: 1 where a branch is kept."""
    return torch.tensor([[float(b in keep.branches(i)) for b in BRANCHES] for i in range(num_layers)])
