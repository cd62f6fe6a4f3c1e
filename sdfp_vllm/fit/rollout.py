"""Acceptance of a layer-skipping draft, estimated for the situation it meets in the engine.

There the draft shares the target's K/V cache. With a round starting at position s (the token
at s is chosen, its K/V is not computed yet), draft step j feeds one token at position s + j
through the kept layers. It sees the full model's K/V at positions below s, and at s..s+j the
K/V that the kept layers themselves wrote in this round. Step j is accepted if it chooses the
token that the target chooses, and all steps before it were accepted.

On text that the target itself would write greedily, accepted drafts are the text's own tokens,
so step j can be run for every s of every sequence in one forward: one row per (sequence, s).
Rows whose draft was wrong leave after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sdfp_vllm.bridge import Bridge
from sdfp_vllm.bridge_file import Run
from sdfp_vllm.fit.bridged_stack import bridging
from sdfp_vllm.fit.head import restricted_linear
from sdfp_vllm.fit.rounds import AcceptedRuns
from sdfp_vllm.fit.shared_attention import DraftRows, FullPass, rollout_attention
from sdfp_vllm.fit.stack import DecoderStack
from sdfp_vllm.keep import KeepSet

_HEAD_ROWS = 256  # rows of logits alive at once: a large vocabulary times all rows would not fit


@dataclass(frozen=True)
class Continuations:
    """Sequences whose tail the target wrote itself.

    Attributes:
        ids: int64 [N, T].
        first: Position of the first token that the target wrote.
        ends: int64 [N], the length of each sequence up to and including its first end-of-text token.
        chosen: int64 [N, T - first], the token that the target chooses after each position from `first` on;
            None where it is not known, as in text that was read or sampled.
        full: With `chosen`, the full model's K/V of each sequence: views of one tensor a layer, freed together.
    """

    ids: Tensor
    first: int
    ends: Tensor
    chosen: Tensor | None = None
    full: Sequence[FullPass] = ()

    def written(self) -> Tensor:
        """The tokens that the target wrote, int64 [n]: what a draft has to propose."""
        position = torch.arange(self.first, self.ids.shape[1], device=self.ids.device)
        return self.ids[:, self.first :][position < self.ends.to(position)[:, None]]

    def split(self, count: int) -> tuple[Continuations, Continuations | None]:
        """The first `count` sequences, and the others (None: there are none)."""
        rest = self._part(slice(count, None))
        return self._part(slice(count)), rest if len(rest.ids) else None

    def _part(self, which: slice) -> Continuations:
        chosen = None if self.chosen is None else self.chosen[which]
        return Continuations(self.ids[which], self.first, self.ends[which], chosen, self.full[which])


@torch.no_grad()
def greedy_continuations(
    stack: DecoderStack, prompts: Tensor, new_tokens: int, advance: Callable[[int], None] | None = None
) -> Continuations:
    """Continues each prompt with the target's most likely tokens, the text that greedy drafting meets.

    The K/V and choices of the writing are kept: a rollout over the text needs no further pass of the full model.

    Args:
        prompts: int64 [N, P], no padding.
        new_tokens: Tokens to add to each.
        advance: Called with 1 after each token added.
    """
    cache = DynamicCache()  # not told of sliding windows, which would drop the K/V behind them
    written = step = prompts.to(stack.device)
    for i in range(new_tokens + 1):  # one more: what the target chooses after the text
        logits = stack.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1:].argmax(-1)
        written = torch.cat([written, step], dim=1)
        if advance and i < new_tokens:
            advance(1)
    ids, first = written[:, :-1], prompts.shape[1]
    layers: list[tuple[int, Any]] = list(enumerate(cache.layers))
    full = [
        FullPass({i: layer.keys[n] for i, layer in layers}, {i: layer.values[n] for i, layer in layers})
        for n in range(len(ids))
    ]
    return Continuations(ids, first, _ends(stack, ids, first), written[:, first + 1 :], full)


def _ends(stack: DecoderStack, ids: Tensor, first: int) -> Tensor:
    generation = getattr(stack.model, "generation_config", None)
    stop = getattr(generation, "eos_token_id", None)
    stops = torch.tensor([stop] if isinstance(stop, int) else stop or [], device=ids.device, dtype=ids.dtype)
    stopped = torch.isin(ids[:, first:], stops)
    after = stopped.int().argmax(1) + first + 1
    return torch.where(stopped.any(1), after, ids.shape[1])


class DraftRollout:
    """Runs drafts over the target's own text.

    The full model's K/V and choices come with the text; where they do not, a full pass is done once, at construction.
    Memory: K/V of all layers for all of `text` (2 * N * T * Hkv * D numbers a layer), held once.
    """

    @torch.no_grad()
    def __init__(self, stack: DecoderStack, text: Continuations):
        self.stack, self.text = stack, text
        # `target`, int64 [N, T - first]: the token the target chooses after each position from `first` on.
        if text.chosen is None:
            self.full, self.target = self._full_passes()
        else:
            self.full, self.target = text.full, text.chosen

    def _full_passes(self) -> tuple[Sequence[FullPass], Tensor]:
        full, chosen = [], []
        with rollout_attention(self.stack):
            for ids in self.text.ids:
                full.append(FullPass())
                hidden = self.hidden(ids, torch.arange(len(ids), device=ids.device), full[-1])
                chosen.append(self._argmax(hidden[self.text.first :], self.stack.head))
        return full, torch.stack(chosen)

    @torch.no_grad()
    def run(
        self,
        keep: KeepSet | Iterable[int],
        steps: int,
        proceed: Callable[[AcceptedRuns], bool] = lambda runs: True,
        bridges: Mapping[Run, Bridge] | None = None,
        watch: Callable[[Tensor, Tensor], None] | None = None,
        tokens: Tensor | None = None,
    ) -> AcceptedRuns:
        """Drafts up to `steps` tokens from every start position with what is in `keep`.

        Args:
            keep: A keep set, or the layers that are kept whole.
            bridges: Over runs of skipped layers, as the engine has them.
            tokens: int64 [M], ascending, all that the draft's head can propose; None for the full head.
            proceed: Asked after each step but the last with the result so far; False stops early.
            watch: Called after each step with each row's confidence (its largest probability), float [R], and
                whether its draft was right, bool [R].

        Raises:
            SdfpError: If `keep` is not ascending or names layers that are not there.
        """
        text = self.text
        lengths = torch.zeros(len(text.ids), text.ids.shape[1] - text.first, dtype=torch.int64)
        runs = AcceptedRuns(lengths, (text.ends - text.first).cpu(), 0)
        rows = self.all_rows()
        head = self.stack.head if tokens is None else restricted_linear(self.stack, tokens)
        with bridging(self.stack, keep, bridges), rollout_attention(self.stack):
            for j in range(steps):
                rows = rows.select(rows.start + j < text.ends[rows.sequence])
                if len(rows.start):
                    position = rows.start + j
                    hidden = self.hidden(text.ids[rows.sequence, position], position, rows)
                    target = self.target[rows.sequence, position - text.first]
                    right = self._argmax(hidden, head, tokens) == target
                    if watch:
                        watch(_confidence(head, hidden), right)
                    rows = rows.select(right)
                    lengths[rows.sequence.cpu(), (rows.start - text.first).cpu()] += 1
                runs = AcceptedRuns(lengths, runs.ends, j + 1)
                if j + 1 < steps and not proceed(runs):
                    break
        return runs

    def all_rows(self) -> DraftRows:
        """A draft at its first step, from every start position of the text."""
        count, length = self.text.ids.shape
        start = torch.arange(self.text.first, length, device=self.text.ids.device)
        sequence = torch.arange(count, device=start.device).repeat_interleave(len(start))
        return DraftRows(self.full, sequence, start.repeat(count))

    def hidden(self, ids: Tensor, position: Tensor, state: FullPass | DraftRows) -> Tensor:
        """Final hidden states [R, hidden] of R rows, int64 ids and positions [R]."""
        inner = self.stack.model.model
        return inner(
            input_ids=ids[None], position_ids=position[None], use_cache=False, rollout=state
        ).last_hidden_state[0]

    def _argmax(self, hidden: Tensor, head: nn.Module, tokens: Tensor | None = None) -> Tensor:
        """Ids that `head` chooses, int64 [R]; its rows are `tokens`, or all."""
        rows = torch.cat([head(part).argmax(-1) for part in hidden.split(_HEAD_ROWS)])
        return rows if tokens is None else tokens.to(rows.device)[rows]


def _confidence(head: nn.Module, hidden: Tensor) -> Tensor:
    """The largest probability of each row, [R]; logits as the head gives them, without scale and soft cap."""
    logits = (head(rows).float() for rows in hidden.split(_HEAD_ROWS))
    return torch.cat([(rows.amax(-1) - rows.logsumexp(-1)).exp() for rows in logits])
