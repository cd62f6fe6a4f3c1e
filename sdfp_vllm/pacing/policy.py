"""DraftPolicy: in every round, which requests draft, how far, and whether from the context or with the model.

A round of decoding yields one token a request and the drafts accepted, and costs the draft steps and
the verification of all rows. With `rate`, the tokens per millisecond that rounds of this batch size
have yielded lately, one more draft pays exactly if

    chance that it counts  >  rate * milliseconds it adds

(the optimal-stopping rule of a renewal-reward process: stop where the marginal yield falls below the
average one), where the rate is taken for at least CAUTION times plain decoding's. The chance that draft j
counts is the product of the chances of drafts 1..j. Before a step is run the next draft's chance is that of
its position; once it is run, that of its confidence.

Exact for sampled requests: whether a token is drafted or kept depends on what stood before it and on
the distribution it is drawn from, never on the token drawn.

Costs are the plan's, corrected by a clock where one worker decides; tensor-parallel workers must decide alike and
go by the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sdfp_vllm.pacing.live import LiveCosts
from sdfp_vllm.pacing.ngram import LONGEST, Match
from sdfp_vllm.pacing.odds import Average, Odds, PositionOdds
from sdfp_vllm.pacing.options import Options, best_copy
from sdfp_vllm.pacing.pauses import Pauses
from sdfp_vllm.pacing.places import Places
from sdfp_vllm.pacing.record import Pacing, confidence_bin
from sdfp_vllm.pacing.sights import Sights

# Rounds that a rate is averaged over.
RATE_MEMORY = 32.0
# Drafting must be this much faster than plain decoding: chances and costs are estimates. Where it is, what else a draft must earn
# would only be lost.
CAUTION = 1.1
# Share of a batch's tokens that is lost to luck where places are not taken: of requests with equal chances some fall behind,
# and the rounds that these still need are for few.
UNEVEN = 0.05
# Kinds of requests, each of which teaches its own alone. A model's confidence says something else about greedy tokens than
# about sampled ones, and where rules change the output (penalties, grammars, ...) drafts are rejected that are right elsewhere.
KINDS = GREEDY, SAMPLED, RULED = 0, 1, 2


@dataclass
class Row:
    """One request in a round.

    Attributes:
        kind: Of KINDS; None where nothing is to be drafted (in the middle of its prefill).
        match: What the context offers as drafts.
        most: Drafts that are of use: one less than the tokens it may still be given, or as many as it asks for.
        ahead: Tokens a round that it got of late, over its batch's mean.
        drafts: Drafts kept so far; of a row that copies, the length of the copy.
        copies: Whether its drafts are the match's tokens.
        whole: Whether its drafts see all of its context, whatever the window.
        chance: That all its drafts so far are accepted.
        bins: Confidence bins of its model drafts, for the reckoning.
    """

    kind: int | None
    match: Match | None = None
    most: int = 1 << 30
    ahead: float = 1.0
    drafts: int = 0
    copies: bool = False
    whole: bool = False
    chance: float = 1.0
    bins: list[int] = field(default_factory=list)
    drafting: bool = False

    @property
    def worth(self) -> float:
        """Value of a token to this request, relative to one to a request that is neither ahead nor behind.

        A user sees milliseconds per token, t = ms / tokens. What a token takes off that, and a millisecond adds, is its
        derivative: -ms / tokens^2 and 1 / tokens. So whoever is behind gains most by a token, and loses most by a long round.
        """
        return self.ahead**-2


class Round:
    """The decisions of one round, in turn: `goes_on`, then a draft step, then `saw`, and again."""

    def __init__(self, policy: DraftPolicy, rows: list[Row]):
        self._policy, self.rows = policy, rows
        self.batch = len(rows)
        self.steps = 0
        waiting = sum(1 / row.ahead for row in rows) / len(rows)
        self.price = waiting * policy.worth_of_ms([row.kind or GREEDY for row in rows])
        self._verified = self.batch
        self.first_step = False
        policy.assign(self)
        self._verified += sum(row.drafts for row in rows)

    @property
    def verified(self) -> int:
        """Rows that the next verification computes."""
        return self._verified

    def rows_ms(self, extra: int) -> float:
        """What `extra` more rows add to the verification, milliseconds."""
        costs = self._policy.costs
        return costs.verify_ms(self._verified + extra) - costs.verify_ms(self._verified)

    def goes_on(self) -> bool:
        """Whether one more draft step pays for those still drafting."""
        if self.steps >= self._policy.longest:
            return False
        active = [row for row in self.rows if row.drafting and row.drafts < row.most]
        if not active:
            return False
        if not self.steps:
            return self.first_step
        position = self._policy.position
        gain = sum(row.worth * row.chance * position[row.kind or GREEDY][self.steps] for row in active)
        return gain > self.price * (self._policy.costs.step_ms(self.batch) + self.rows_ms(len(active)))

    def saw(self, confidence: Sequence[float]) -> list[bool]:
        """Takes a step's confidences, one per row; returns which rows keep the step's token as a draft."""
        self.steps += 1
        drafting = max(1, sum(row.drafting for row in self.rows))
        row_price = self.price * self.rows_ms(drafting) / drafting
        kept = []
        for row, value in zip(self.rows, confidence, strict=True):
            keep = False
            if row.drafting:
                bucket = confidence_bin(value)
                row.chance *= self._policy.confidence[row.kind or GREEDY][bucket]
                keep = row.worth * row.chance > row_price and row.drafts < row.most
                if keep:
                    row.drafts += 1
                    row.bins.append(bucket)
                    self._verified += 1
                row.drafting = keep
            kept.append(keep)
        return kept

    @property
    def ms(self) -> float:
        """What the round costs: its draft steps and its verification."""
        costs = self._policy.costs
        return self.steps * costs.step_ms(self.batch) + costs.verify_ms(self._verified)


class DraftPolicy:
    """What is learned from round to round, and the rules that use it.

    Args:
        plan: The plan's chances and times, what the policy begins with; `costs.verified` and `costs.stepped` may be
            told what a clock says.
        longest: Most drafts of one request in a round.
    """

    def __init__(self, plan: Pacing, longest: int):
        self.costs, self.longest = LiveCosts(plan), longest
        self.position = [PositionOdds(plan.acceptance, longest) for _ in KINDS]
        self.confidence = [Odds(plan.confidence) for _ in KINDS]
        # Copies: by how many tokens already agree, the match and the copies before. n / (n + 1) is the rule of
        # succession after n successes in a row, with no failure seen; it fades within a few dozen rounds.
        self.copying = [Odds([n / (n + 1) for n in range(1, LONGEST + 1)], weight=4.0) for _ in KINDS]
        self._rates: dict[tuple[int, int], Average] = {}
        self._pauses = Pauses()
        self.places = Places()
        self.sights: Sights | None = Sights(plan.acceptance[0], longest)

    # ------------------------------------------------------------ what is known
    def rate(self, kinds: Sequence[int]) -> float:
        """Tokens per millisecond of late without copies, of requests of these kinds together; at least plain decoding's.

        What a millisecond is worth in tokens: it is what an accepted draft saves."""
        batch, plain = len(kinds), self.costs.plain_rate(len(kinds))
        return max(sum(self._rate(batch, kind).value for kind in kinds) / batch, 1.0) * plain

    def worth_of_ms(self, kinds: Sequence[int]) -> float:
        """What a millisecond has to bring in tokens: the rate, and where that is hardly plain decoding's, somewhat more."""
        return max(self.rate(kinds), CAUTION * self.costs.plain_rate(len(kinds)))

    def _rate(self, batch: int, kind: int) -> Average:
        """Tokens per request of a kind in the time of a plain step, in rounds of about this batch size.

        In steps, not milliseconds: what those are changes with the context, and with what else the machine does.
        """
        size = batch.bit_length()
        if (size, kind) not in self._rates:
            rate, ms = self._best_fixed(batch, kind)
            step = self.costs.verify_ms(batch)
            self._rates[size, kind] = Average(rate / batch * step, ms / step * RATE_MEMORY / 4, RATE_MEMORY)
        return self._rates[size, kind]

    def _best_fixed(self, batch: int, kind: int) -> tuple[float, float]:
        """(rate, milliseconds) of the best round in which requests of one kind all draft alike, at least one token."""
        best = (0.0, 1.0)
        for k, accepted in enumerate(self._expected(kind)[1:], 1):
            ms = k * self.costs.step_ms(batch) + self.costs.verify_ms(batch * (k + 1))
            best = max(best, (batch * (1.0 + accepted) / ms, ms))
        return best

    # ------------------------------------------------------------ a round
    def begin(self, rows: list[Row], context: float = 0.0, seen: float | None = None) -> Round:
        """A round over these requests.

        Args:
            context: Tokens of context that they have, on average; 0 where it is not known.
            seen: How many of them a draft step reads; None for all.
        """
        self.costs.at(len(rows), context, context if seen is None else seen)
        return Round(self, rows)

    def assign(self, round: Round) -> None:
        """Gives each request the context's tokens, the model's drafts or nothing; the round may stop sooner, or go on."""
        rows = [row for row in round.rows if row.kind is not None and row.most > 0]
        if not rows:
            return
        options = self._options(round, rows)
        best = options.best()
        for row, length in zip(rows, best.copies, strict=True):
            row.copies, row.drafts, row.drafting = length > 0, length, length == 0
        if best.steps:
            self._pauses.end(round.batch)
        # Now and then although it would not pay, to see whether that is still so.
        round.first_step = best.steps > 0 or (
            any(row.drafting for row in rows) and options.could_pay() and self._pauses.over(round.batch)
        )

    def _options(self, round: Round, rows: Sequence[Row]) -> Options:
        shares = self._shares(len(rows))  # who prefills or is about to end stays behind nobody
        # A copy is priced as if all copied that can.
        matching = sum(row.match is not None for row in rows)
        prices = [
            round.price * round.rows_ms(matching * length) / max(matching * shares[matching], 1e-9)
            for length in range(self.longest + 1)
        ]
        kinds = [row.kind or GREEDY for row in rows]
        chances = {kind: [self.copying[kind][n] for n in range(LONGEST)] for kind in set(kinds)}
        return Options(
            kinds=kinds,
            most=[row.most for row in rows],
            copies=[
                best_copy(row.match, chances[kind], prices, row.most, row.worth)
                for row, kind in zip(rows, kinds, strict=True)
            ],
            worths=[row.worth for row in rows],
            model={kind: self._expected(kind) for kind in set(kinds)},
            shares=shares,
            reserve=UNEVEN * (1 - self.places.taken) * (len(rows) - 1),
            price=round.price,
            step_ms=self.costs.step_ms(round.batch),
            rows_ms=round.rows_ms,
        )

    def _shares(self, batch: int) -> list[float]:
        """What a token is worth where n = 0, 1, ... `batch` requests gain one, of what it is where all do (`Places`)."""
        ms = [0.0, *map(self.costs.verify_ms, range(1, batch + 1))]
        taken = self.places.taken
        return [0.0] + [
            taken + (1 - taken) * min(max(batch / n * (1 - ms[batch - n] / ms[batch]), 0.0), 1.0)
            for n in range(1, batch + 1)
        ]

    def _expected(self, kind: int) -> list[float]:
        """Drafts expected to be accepted of 0, 1, 2, ... that the model makes for a request."""
        expected, chance = [0.0], 1.0
        for j in range(self.longest):
            chance *= self.position[kind][j]
            expected.append(expected[-1] + chance)
        return expected

    # ------------------------------------------------------------ what came of it
    def settle(self, round: Round, accepted: Sequence[int], tried: Sequence[int]) -> None:
        """Learns from a round that was verified whole.

        Args:
            accepted: Drafts accepted, per row of the round.
            tried: Drafts verified, per row; a scheduler may take fewer than it was given.
        """
        tokens: dict[int, list[int]] = {}  # of requests, by kind
        for row, right, out_of in zip(round.rows, accepted, tried, strict=True):
            if row.kind is None or row.copies or row.most < 1:
                continue
            tokens.setdefault(row.kind, []).append(1 + right)
            self.position[row.kind].observe(right, min(out_of, len(row.bins)))
            for j, bucket in enumerate(row.bins[: min(right + 1, out_of)]):
                self.confidence[row.kind].observe(bucket, j < right)
        # Copies are left out: where they are found says nothing of what a token is worth elsewhere. So is who wants no drafts.
        for kind, given in tokens.items():
            steps = round.ms / self.costs.verify_ms(round.batch)
            self._rate(round.batch, kind).observe(sum(given) / len(given), steps)

    def learn_copying(self, match: Match, actual: Sequence[int], kind: int = GREEDY) -> None:
        """Compares what a match offered a request of this kind with the tokens that came, whether it was used or not."""
        for j, (offered, came) in enumerate(zip(match.tokens, actual, strict=False)):
            self.copying[kind].observe(match.length + j - 1, offered == came)
            if offered != came:
                break
