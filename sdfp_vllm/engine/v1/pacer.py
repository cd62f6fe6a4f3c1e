"""Pacer: lets a DraftPolicy decide every round of the V1 runner, per request.

The policy counts in tokens and milliseconds; this is its link to the runner's batch: who is in it,
what the context of each offers to copy, what became of the drafts of the round before. Needs drafts
that may differ in number between requests, so synchronous scheduling.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sdfp_vllm.engine.metrics import CountedDrafts, counts_of
from sdfp_vllm.engine.request_limits import is_ruled, limits
from sdfp_vllm.engine.upstream.symbols import SamplingMetadata
from sdfp_vllm.engine.v1.draft_step import GREEDY_BELOW, DraftStep
from sdfp_vllm.engine.v1.media import without_media
from sdfp_vllm.pacing.ngram import latest_longest_match
from sdfp_vllm.pacing.paces import Paces
from sdfp_vllm.pacing.policy import GREEDY, RULED, SAMPLED, DraftPolicy, Round, Row


@dataclass(frozen=True)
class Verified:
    """What the target just computed, on the host.

    Attributes:
        tokens, positions: Fed to it, per request: the token before the drafts, then the drafts.
        accepted: Drafts accepted, per request.
        sampled: The token sampled after the last accepted one, per request.
    """

    tokens: list[list[int]]
    positions: list[list[int]]
    accepted: list[int]
    sampled: list[int]

    @staticmethod
    def read(
        tokens: torch.Tensor,
        positions: torch.Tensor,
        starts: torch.Tensor,
        last: torch.Tensor,
        sampled: torch.Tensor,
    ) -> Verified:
        """Args: int [T] tokens and positions, int [batch + 1] first index of each request, int [batch] last accepted
        index and sampled token."""
        bounds = starts.tolist()
        spans = list(itertools.pairwise(bounds))
        t, p = tokens[: bounds[-1]].tolist(), positions[: bounds[-1]].tolist()
        return Verified(
            [t[a:b] for a, b in spans],
            [p[a:b] for a, b in spans],
            [i - a for (a, _), i in zip(spans, last.tolist(), strict=True)],
            sampled.tolist(),
        )


@dataclass
class Tally:
    """What an engine's rounds came to, for benchmarks and tests.

    Attributes:
        rounds: How often requests, all of them drafted for before, met (batch size, rows just verified, draft steps
            that followed). The steps after a prefill are left out, as is the prefill.
        model_drafts, copied_drafts: Tokens drafted by the model, and copied from the context.
    """

    rounds: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    model_drafts: int = 0
    copied_drafts: int = 0

    def add(self, round: Round, verified: int | None, counts: Mapping[str, float]) -> None:
        """Adds a round; `counts` is what it adds to the server's metrics."""
        if verified is not None:
            self.rounds[round.batch, verified, round.steps] += 1
        self.model_drafts += int(counts["model_draft_tokens"])
        self.copied_drafts += int(counts["copied_draft_tokens"])


class Pacer:
    """Paces the drafts of one engine.

    Args:
        policy: Decides.
        runner: vLLM's V1 model runner; read late.
        copies: Whether drafts may be copied from the context.
        timed: Whether this worker's clock corrects the plan's costs; not where several workers must decide alike.
    """

    def __init__(self, policy: DraftPolicy, runner: Any, copies: bool, timed: bool):
        self.policy, self._runner, self.copies, self.timed = policy, runner, copies, timed
        self._left = 0.0  # when the last round's drafting ended
        self._open: tuple[Round, list[str], list[int]] | None = None
        self._paces = Paces()
        self.tally = Tally()

    def paces(self, sampling: SamplingMetadata) -> bool:
        """Whether rounds of this batch may differ in length: not where a seed must repeat its draws."""
        if sampling.generators:
            self._open = None
        return not sampling.generators

    def propose(
        self,
        verified: Verified,
        drafting: Callable[[Sequence[bool]], Iterator[DraftStep]],
        sampling: SamplingMetadata,
    ) -> tuple[list[list[int]], torch.Tensor | None]:
        """Settles the last round, decides the next and runs what draft steps it wants.

        Args:
            drafting: Gives draft steps of the whole batch, run at each `next`, in which these requests see all of their context
                whatever the window.

        Returns:
            The drafts per request, and their distributions, float32 [batch, longest, vocabulary], where sampled.
        """
        came = time.perf_counter()
        ids = list(self._runner.input_batch.req_ids)
        count = sum(map(len, verified.tokens))
        settled = self._settle(ids, verified)
        if settled and self.timed:
            self.policy.costs.verified(count, (came - self._left) * 1e3)
        rows = self._rows(verified, sampling)
        round = self.policy.begin(rows, *self._sights(verified, ids, rows))
        steps = drafting([row.whole for row in rows])
        drafts: list[list[int]] = [
            row.match.tokens[: row.drafts] if row.copies and row.match else [] for row in rows
        ]
        probs: list[torch.Tensor] = []
        while round.goes_on():
            began = time.perf_counter()
            step = next(steps)
            assert step.confidence is not None
            confidence = step.confidence.tolist()
            if self.timed:
                self.policy.costs.stepped(round.batch, (time.perf_counter() - began) * 1e3)
            kept = round.saw(confidence)
            for draft, token, keep in zip(drafts, step.tokens.tolist(), kept, strict=True):
                if keep:
                    draft.append(token)
            if step.probs is not None:
                probs.append(step.probs)
        self._open = (
            round,
            ids,
            [p[0] + n + 1 for p, n in zip(verified.positions, verified.accepted, strict=True)],
        )
        out = None if sampling.all_greedy else _distributions(drafts, rows, probs)
        self._left = time.perf_counter()
        counts = counts_of(rows, (self._left - came) * 1e3)
        self.tally.add(round, count if settled else None, counts)
        return CountedDrafts(drafts, counts), out

    def _rows(self, verified: Verified, sampling: SamplingMetadata) -> list[Row]:
        batch = self._runner.input_batch
        waits = self._runner.discard_request_mask.np[: len(verified.tokens)].tolist()
        temperature = sampling.temperature
        sampled = [False] * len(waits)
        if not sampling.all_greedy and temperature is not None:
            sampled = (temperature[: len(waits)] >= GREEDY_BELOW).tolist()
        rows = []
        paces = self._paces.ahead(batch.req_ids)
        for i, (wait, draws, ahead) in enumerate(zip(waits, sampled, paces, strict=True)):
            params = self._runner.requests[batch.req_ids[i]].sampling_params
            kind = RULED if is_ruled(params) else SAMPLED if draws else GREEDY
            asked = limits(params)
            most = min(self._tokens_left(i, verified) - 1, asked.longest)
            row = Row(None if wait else kind, most=most, ahead=ahead)
            if self.copies and asked.copies and not wait:
                row.match = latest_longest_match(self._context(batch, i, verified), self.policy.longest)
            rows.append(row)
        return rows

    def _sights(self, verified: Verified, ids: Sequence[str], rows: list[Row]) -> tuple[float, float]:
        """Decides whose drafts see past the window.

        Returns:
            Tokens of context that requests have, and that drafts see of them; the means over the batch.
        """
        held = [p[0] + n + 2 for p, n in zip(verified.positions, verified.accepted, strict=True)]
        window, seen = self._runner.drafter.window, held
        if window is not None:
            seen = [window.seen(n) for n in held]
            if self.timed and self.policy.sights:
                whole = self.policy.sights.choose(ids, held, seen, self.policy.costs)
                seen = [all_ if w else some for all_, some, w in zip(held, seen, whole, strict=True)]
                for row, w in zip(rows, whole, strict=True):
                    row.whole = w
        return sum(held) / len(held), sum(seen) / len(seen)

    def _tokens_left(self, i: int, verified: Verified) -> int:
        """Tokens that request i may still be given after the one just sampled."""
        request = self._runner.requests[self._runner.input_batch.req_ids[i]]
        given = verified.positions[i][0] + verified.accepted[i] + 2 - request.num_prompt_tokens
        return (request.sampling_params.max_tokens or 1 << 30) - given

    def _context(self, batch: Any, i: int, verified: Verified) -> np.ndarray:
        """Every token of request i up to the one just sampled; the batch holds those up to the last step's.

        A prompt of embeddings has no ids, and what the batch holds in their place was somebody else's. Where an image
        is, there is no text.
        """
        known = int(batch.num_tokens_no_spec[i])
        begin = int(batch.num_prompt_tokens[i]) if i in batch.req_prompt_embeds else 0
        accepted = verified.accepted[i]
        end = verified.positions[i][0] + accepted + 1  # tokens before the one just sampled
        new = verified.tokens[i][accepted + 1 - (end - known) : accepted + 1] if end > known else []
        before = batch.token_ids_cpu[i, begin : min(known, end)]
        context = np.concatenate([before, [*new, verified.sampled[i]]])
        return without_media(context, self._runner.requests[batch.req_ids[i]].mm_features, begin)

    def _settle(self, ids: Sequence[str], verified: Verified) -> bool:
        """Tells the policy what became of the last round; whether all that was just verified was of that round."""
        if self._open is None:
            return False
        (round, asked, positions), self._open = self._open, None
        where = {request: i for i, request in enumerate(ids)}
        stayed = len(where.keys() & set(asked))
        self.policy.places.observe(stayed, len(asked) - stayed, len(ids) - stayed)
        seen = 0
        accepted, tried = [], []
        for row, request, position in zip(round.rows, asked, positions, strict=True):
            i = where.get(request, -1)
            if row.kind is None or i < 0 or verified.positions[i][0] != position:
                row.kind = None  # in its prefill, or gone: finished, aborted, preempted
                accepted.append(0)
                tried.append(0)
                continue
            seen += 1
            self._paces.observe(request, 1 + verified.accepted[i])
            accepted.append(verified.accepted[i])
            tried.append(len(verified.tokens[i]) - 1)
            if not row.copies and self.policy.sights:
                self.policy.sights.observe(request, row.whole, accepted[-1], min(tried[-1], len(row.bins)))
            if row.match:
                came = verified.tokens[i][1 : verified.accepted[i] + 1]
                self.policy.learn_copying(row.match, [*came, verified.sampled[i]], row.kind)
        self.policy.settle(round, accepted, tried)
        return seen == len(ids)


def _distributions(
    drafts: list[list[int]], rows: list[Row], probs: list[torch.Tensor]
) -> torch.Tensor | None:
    """What each draft was drawn from, float32 [batch, longest, vocabulary]; None where all were copied.

    A copied token is drawn from a distribution that is all on it. (Drafts without distributions are
    taken for just that, so a round of copies alone needs none.)
    """
    if not probs:
        return None
    batch, vocabulary = probs[0].shape
    longest = max(len(probs), max(map(len, drafts)))
    out = probs[0].new_zeros(batch, longest, vocabulary)
    for j, q in enumerate(probs):
        out[:, j] = q
    for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
        if row.copies:
            out[i].zero_()
            out[i, range(len(draft)), draft] = 1.0
    return out
