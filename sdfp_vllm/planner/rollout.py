"""Acceptance of a layer-skipping draft, estimated for the situation it meets in the engine.

There the draft shares the target's K/V cache. With a round starting at position s (the token
at s is chosen, its K/V is not computed yet), draft step j feeds one token at position s + j
through the kept layers. It sees the full model's K/V at positions below s, and at s..s+j the
K/V that the kept layers themselves wrote in this round. Step j is accepted if it chooses the
token that the target chooses, and all steps before it were accepted.

On text that the target itself would write greedily, accepted drafts are the text's own tokens,
so step j can be run for every s of every sequence in one forward: one row per (sequence, s).
Rows whose draft was wrong leave after each step.

Prompts of different lengths are padded on the left, so that all texts begin in one column. A token's position
is its column: rotary embeddings are relative, so an offset changes nothing. Padding is never attended to. Behind images
with positions of their own (`shown.py`) a token's rotary position is another; what it attends to goes by columns there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.bridge_file import Run
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.planner.bridged_stack import bridging
from sdfp_vllm.planner.rounds import AcceptedRuns
from sdfp_vllm.planner.shared_attention import DraftRows, FullPass, rollout_attention
from sdfp_vllm.planner.shown import Shown, entering, places
from sdfp_vllm.planner.stack import DecoderStack

_HEAD_ROWS = 256  # rows of logits alive at once: a large vocabulary times all rows would not fit

# Prompts of one length, int64 [N, P], or of any lengths: ids of each, as int64 [P] or a list.
Prompts = Tensor | Sequence[Tensor | Sequence[int]]


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
        begins: int64 [N], the position of each sequence's first token; columns before it are padding. Zeros
            where it is left out.
        shown: What each sequence shows in its prompt; empty for text.
    """

    ids: Tensor
    first: int
    ends: Tensor
    chosen: Tensor | None = None
    full: Sequence[FullPass] = ()
    begins: Tensor = None  # type: ignore[assignment]
    shown: Sequence[Shown | None] = ()

    def __post_init__(self) -> None:
        if self.begins is None:
            object.__setattr__(self, "begins", self.ids.new_zeros(len(self.ids)))

    @cached_property
    def _places(self) -> Tensor | None:
        """Rotary positions of tokens that are text, int64 [N, T]; None where they are the columns."""
        if not any(s is not None and s.positions is not None for s in self.shown):
            return None
        return places(self.ids, self.begins, self.shown)[0]  # text has one number in all three rows

    def rotary(self, sequence: Tensor, position: Tensor) -> Tensor:
        """Rotary positions, int64 [R], of R tokens of text at columns `position` of sequences `sequence`."""
        return position if self._places is None else self._places[sequence, position]

    def images(self) -> Tensor:
        """Where tokens of images are, bool [N, T]."""
        image = torch.zeros(self.ids.shape, dtype=torch.bool, device=self.ids.device)
        for n, s in enumerate(self.shown):
            if s is not None:
                begin = int(self.begins[n])
                image[n, begin : begin + len(s.image)] = s.image.to(image.device)
        return image

    def whole(self, stack: DecoderStack, n: int) -> dict[str, Any]:
        """Keywords of the decoder's forward for all of sequence n, without padding."""
        begin = int(self.begins[n])
        if self.shown and self.shown[n] is not None:
            given = entering(
                stack.embed, self.ids[n : n + 1, begin:], self.begins.new_zeros(1), self.shown[n : n + 1]
            )
            given["position_ids"] = given["position_ids"] + begin
            return given
        position = torch.arange(begin, self.ids.shape[1], device=self.ids.device)
        return {"input_ids": self.ids[n : n + 1, begin:], "position_ids": position[None]}

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
        return Continuations(
            self.ids[which],
            self.first,
            self.ends[which],
            chosen,
            self.full[which],
            self.begins[which],
            self.shown[which],
        )


class Writing:
    """Sequences that the target is writing, a token each at a time, over one K/V cache.

    Attributes:
        ids: int64 [N, T], what has been written, on the model's device.
        begins: int64 [N], the position of each sequence's first token; columns before it hold token 0.
        stops: int64 [E], the model's end-of-text tokens.
        shown: What each sequence shows in its prompt; empty for text.

    Raises:
        SdfpError: If a prompt is empty or holds a token that the model does not have.
    """

    def __init__(self, stack: DecoderStack, prompts: Prompts, shown: Sequence[Shown | None] = ()):
        self._stack = stack
        self.shown = shown if any(shown) else ()
        self._cache = DynamicCache()  # not told of sliding windows, which would drop the K/V behind them
        self.ids, self.begins = _left_padded(prompts, stack)
        self.ids, self.begins = self.ids.to(stack.device), self.begins.to(stack.device)
        self._padded = bool(self.begins.any())
        self._prompts: dict[str, Any] = {}
        if self.shown:
            self._prompts = entering(stack.embed, self.ids, self.begins, self.shown)
        stop = getattr(getattr(stack.model, "generation_config", None), "eos_token_id", None)
        self.stops = self.ids.new_tensor([stop] if isinstance(stop, int) else stop or [])

    @torch.no_grad()
    def logits(self) -> Tensor:
        """What comes after each sequence's last token, [N, V] in the model's dtype; asked once a token."""
        known, length = self._cache.get_seq_length(), self.ids.shape[1]
        column = torch.arange(length, device=self.ids.device)
        mask = (column >= self.begins[:, None]).long() if self._padded else None
        given, self._prompts = self._prompts, {}
        if not given:
            rotary = places(self.ids, self.begins, self.shown)
            given = {"input_ids": self.ids[:, known:], "position_ids": rotary[..., known:]}
        return self._stack.model(
            **given,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def add(self, tokens: Tensor) -> None:
        """Appends a token to each sequence, int64 [N]."""
        self.ids = torch.cat([self.ids, tokens.to(self.ids)[:, None]], dim=1)

    def full(self) -> list[FullPass]:
        """The K/V of each sequence, but for the last token's: without padding, whose K/V mean nothing."""
        layers: list[tuple[int, Any]] = list(enumerate(self._cache.layers))
        return [
            FullPass(
                {i: layer.keys[n, :, begin:] for i, layer in layers},
                {i: layer.values[n, :, begin:] for i, layer in layers},
                begin,
            )
            for n, begin in enumerate(self.begins.tolist())
        ]


def _left_padded(prompts: Prompts, stack: DecoderStack) -> tuple[Tensor, Tensor]:
    """Ids int64 [N, P], token 0 before shorter ones, and where each begins, int64 [N]."""
    rows = [torch.as_tensor(p, dtype=torch.int64).flatten() for p in prompts]
    if not rows or not all(len(row) for row in rows):
        raise SdfpError("prompts", "are empty", "Give at least one, of at least one token each.")
    embedding: Any = stack.embed
    known = embedding.weight.shape[0]
    strange = next((i for row in rows for i in (int(row.min()), int(row.max())) if not 0 <= i < known), None)
    if strange is not None:
        raise SdfpError(
            "prompts",
            f"hold token {strange}, which is not in the model's vocabulary of {known}",
            "Put the model's own tokenizer in its folder.",
        )
    longest = max(len(row) for row in rows)
    begins = torch.tensor([longest - len(row) for row in rows])
    return torch.stack([pad(row, (longest - len(row), 0)) for row in rows]), begins


@torch.no_grad()
def greedy_continuations(
    stack: DecoderStack,
    prompts: Prompts,
    new_tokens: int,
    advance: Callable[[int], None] | None = None,
    shown: Sequence[Shown | None] = (),
) -> Continuations:
    """Continues each prompt with the target's most likely tokens, the text that greedy drafting meets.

    The K/V and choices of the writing are kept: a rollout over the text needs no further pass of the full model.
    Writing stops once every sequence has ended, so there may be fewer than `new_tokens` columns of it.

    Args:
        prompts: int64 [N, P], no padding; or N prompts of any lengths, each int64 [P] or a list of ids.
        new_tokens: Tokens to add to each, at most.
        advance: Called with 1 after each token added, and with what is left where writing stops early.
        shown: What each prompt shows; empty for text.

    Raises:
        SdfpError: If a prompt is empty or holds a token that the model does not have.
    """
    writing = Writing(stack, prompts, shown)
    first, added = writing.ids.shape[1], 0
    ended = torch.zeros(len(writing.ids), dtype=torch.bool, device=writing.ids.device)
    while True:
        step = writing.logits().argmax(-1)
        writing.add(step)
        if added == new_tokens or bool(ended.all()):
            break  # that one was one more: what the target chooses after the text
        ended |= torch.isin(step, writing.stops)
        added += 1
        if advance:
            advance(1)
    if advance and added < new_tokens:
        advance(new_tokens - added)
    ids, chosen = writing.ids[:, :-1], writing.ids[:, first + 1 :]
    ends = _ends(ids, first, writing.stops)
    return Continuations(ids, first, ends, chosen, writing.full(), writing.begins, writing.shown)


def _ends(ids: Tensor, first: int, stops: Tensor) -> Tensor:
    stopped = torch.isin(ids[:, first:], stops)
    after = stopped.int().argmax(1) + first + 1
    return torch.where(stopped.any(1), after, ids.shape[1])


class DraftRollout:
    """Runs drafts over the target's own text.

    The full model's K/V and choices come with the text; where they do not, a full pass is done once, at construction.
    Args:
        head: The draft's head (`RolledHead`) in every run; None for the target's.

    Memory: K/V of all layers for all of `text` (2 * N * T * Hkv * D numbers a layer), held once.
    """

    @torch.no_grad()
    def __init__(self, stack: DecoderStack, text: Continuations, head: nn.Module | None = None):
        self.stack, self.text, self.head = stack, text, head
        # `target`, int64 [N, T - first]: the token the target chooses after each position from `first` on.
        if text.chosen is None:
            self.full, self.target = self._full_passes()
        else:
            self.full, self.target = text.full, text.chosen

    def _full_passes(self) -> tuple[Sequence[FullPass], Tensor]:
        full, chosen = [], []
        with rollout_attention(self.stack):
            for n, begin in enumerate(self.text.begins.tolist()):
                full.append(FullPass(begin=begin))
                hidden = self._states(self.text.whole(self.stack, n), full[-1])
                chosen.append(self._argmax(hidden[self.text.first - begin :], self.stack.head))
        return full, torch.stack(chosen)

    @torch.no_grad()
    def run(
        self,
        keep: KeepSet | Iterable[int],
        steps: int,
        proceed: Callable[[AcceptedRuns], bool] = lambda runs: True,
        bridges: Mapping[Run, Bridge] | None = None,
        watch: Callable[[Tensor, Tensor], None] | None = None,
        head: nn.Module | None = None,
    ) -> AcceptedRuns:
        """Drafts up to `steps` tokens from every start position with what is in `keep`.

        Args:
            keep: A keep set, or the layers that are kept whole.
            bridges: Over runs of skipped layers, as the engine has them.
            head: The draft's head (`RolledHead`) in this run; None for the rollout's own.
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
        tokens = getattr(head, "tokens", None)
        head = head or self.head or self.stack.head
        with bridging(self.stack, keep, bridges), rollout_attention(self.stack):
            for j in range(steps):
                rows = rows.select(rows.start + j < text.ends[rows.sequence])
                if len(rows.start):
                    position = rows.start + j
                    hidden = self.hidden(text.ids[rows.sequence, position], position, rows)
                    target = self.target[rows.sequence, position - text.first]
                    right = self._argmax(hidden, head, tokens) == target
                    if watch:
                        watch(self._confidence(head, hidden), right)
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

    def hidden(self, ids: Tensor, position: Tensor, rows: DraftRows) -> Tensor:
        """Final hidden states [R, hidden] of R rows, int64 ids and columns [R]."""
        at = self.text.rotary(rows.sequence, position)
        return self._states({"input_ids": ids[None], "position_ids": at[None]}, rows)

    def _states(self, given: dict[str, Any], state: FullPass | DraftRows) -> Tensor:
        return self.stack.model.model(**given, use_cache=False, rollout=state).last_hidden_state[0]

    def _argmax(self, hidden: Tensor, head: nn.Module, tokens: Tensor | None = None) -> Tensor:
        """Ids that `head` chooses, int64 [R]; its rows are `tokens`, or all."""
        rows = torch.cat([head(part).argmax(-1) for part in hidden.split(_HEAD_ROWS)])
        return rows if tokens is None else tokens.to(rows.device)[rows]

    def _confidence(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """The largest probability of each row, [R]."""
        logits = (self.stack.scaled(head(rows).float()) for rows in hidden.split(_HEAD_ROWS))
        return torch.cat([(rows.amax(-1) - rows.logsumexp(-1)).exp() for rows in logits])
