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

from sdfp_vllm.fit.rollout import DraftRollout
from sdfp_vllm.fit.shared_attention import DraftRows, rollout_attention
from sdfp_vllm.keep import Branch, KeepSet

BRANCHES: tuple[Branch, Branch] = ("attention", "mlp")
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
        if keep in self._overlaps:
            return self._overlaps[keep]
        total = 0.0
        with self.stack.keeping(keep):
            hidden = self._hidden(self._rows)
        for ours, theirs in zip(hidden.split(_HEAD_ROWS), self._full.split(_HEAD_ROWS), strict=True):
            p, q = (self.stack.head(h).float().softmax(-1) for h in (theirs, ours))
            total += float(torch.minimum(p, q).sum())
        self._overlaps[keep] = total / len(hidden)
        return self._overlaps[keep]

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
                target = self.stack.head(theirs).float().log_softmax(-1)
            draft = self.stack.head(ours).float().log_softmax(-1)
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


def _at(rows: DraftRows, which: Tensor) -> DraftRows:
    """A draft's first step from some of the rows of another, by ascending index."""
    which = which.to(rows.start.device)
    return DraftRows(rows.full, rows.sequence[which], rows.start[which])


def gates_of(keep: KeepSet, num_layers: int) -> Tensor:
    """float32 [L, 2]: 1 where a branch is kept."""
    return torch.tensor([[float(b in keep.branches(i)) for b in BRANCHES] for i in range(num_layers)])
