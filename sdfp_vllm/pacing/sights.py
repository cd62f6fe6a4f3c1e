"""Sights: whose drafts see the whole of a long context although the plan has a window.

What a window leaves out is missed by some texts (sources, summaries) and not by others. So it is decided for each request: with p,
the chance that a draft of it is accepted, and its share of what a verification and one more draft cost,

    tokens / milliseconds  =  max over k > 0 of  (1 + p + ... + p^k) / (verify + k * draft)

and the sight with the larger one is taken. A request is known by its own drafts where it has been tried, and by those of all
where it has not. Changing costs nothing: the round's block table is edited for a request, or not.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdfp_vllm.pacing.live import LiveCosts, Shares
from sdfp_vllm.pacing.odds import Average

_MEMORY = 48.0  # drafts of a request
_PRIOR = 3.0  # what is known of all counts as so many of its own
_ALL_MEMORY = 512.0
_AHEAD = 1.1  # how much better the other sight must look: chances are estimates
# Rounds after which a request's experience with the sight it does not use is forgotten, so that it may be tried again: so many,
# then twice as many each time, up to the latter.
_FORGOTTEN, _LONGEST_MEMORY = 64, 256


class _Known:
    """A request's own drafts with one sight."""

    def __init__(self) -> None:
        self.right = self.tried = 0.0

    def chance(self, all_of_them: float) -> float:
        return (self.right + _PRIOR * all_of_them) / (self.tried + _PRIOR)


class _Request:
    def __init__(self) -> None:
        self.whole = False
        self.by_sight = {False: _Known(), True: _Known()}
        self.rounds, self.patience = 0, _FORGOTTEN  # since it changed, or forgot

    def change(self) -> None:
        self.whole, self.rounds = not self.whole, 0

    def goes_on(self) -> None:
        """One more round with the same sight."""
        self.rounds += 1
        if self.rounds > self.patience:
            self.by_sight[not self.whole] = _Known()
            self.rounds, self.patience = 0, min(2 * self.patience, _LONGEST_MEMORY)


class Sights:
    """Chooses between the window and the whole context, by request.

    Args:
        chance: Of a draft to be accepted, to begin with; the plan's first.
        longest: Most drafts of a round.
    """

    def __init__(self, chance: float, longest: int):
        self._longest = max(1, longest)
        self._all = {whole: Average(chance, 8.0, _ALL_MEMORY) for whole in (False, True)}
        self._requests: dict[str, _Request] = {}

    def choose(
        self, requests: Sequence[str], held: Sequence[int], seen: Sequence[int], costs: LiveCosts
    ) -> list[bool]:
        """Whether each request of a batch sees its whole context. Others are forgotten.

        Args:
            held: Tokens of context that each has.
            seen: How many of them the window shows.
        """
        self._requests = {r: self._requests.get(r) or _Request() for r in requests}
        # Nothing is hidden, or nothing says yet what seeing it would cost.
        if held == seen or not costs.reading_is_known:
            return [False] * len(held)
        shares = costs.shares(len(requests))
        return [
            context > shown and self._sees_all(self._requests[r], context, shown, shares)
            for r, context, shown in zip(requests, held, seen, strict=True)
        ]

    def observe(self, request: str, whole: bool, right: int, tried: int) -> None:
        """Learns from a request whose first `right` of `tried` model drafts, made with that sight, were accepted."""
        known = self._requests.get(request)
        if known is None or not tried:
            return
        count = min(right + 1, tried)  # what follows a rejected draft says nothing
        mine = known.by_sight[whole]
        fade = (1 - 1 / _MEMORY) ** count
        mine.right, mine.tried = mine.right * fade + right, mine.tried * fade + count
        self._all[whole].observe(right, count)

    def _sees_all(self, request: _Request, context: int, shown: int, shares: Shares) -> bool:
        request.goes_on()
        rates = {
            whole: self._rate(
                request.by_sight[whole].chance(self._all[whole].value),
                *shares.ms(context, context if whole else shown),
            )
            for whole in (False, True)
        }
        if rates[not request.whole] > _AHEAD * rates[request.whole]:
            request.change()
        return request.whole

    def _rate(self, chance: float, verify: float, draft: float) -> float:
        best, tokens, next_one = 0.0, 1.0, 1.0
        for k in range(1, self._longest + 1):  # where no draft pays, the sight with which it would sooner
            next_one *= chance
            tokens += next_one
            best = max(best, tokens / (verify + k * draft))
        return best
