"""Options: what the requests of a round may do before it is known, and what that would gain.

Each request takes tokens of its context (a copy), drafts of the model or nothing. A draft step is run for the whole
batch, so it is paid once; the verification is paid by the rows of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdfp_vllm.pacing.ngram import Match


@dataclass(frozen=True)
class Copy:
    """`length` tokens of a match: `gain` is the value of those expected to be accepted, `worth` that less their price."""

    length: int = 0
    gain: float = 0.0
    worth: float = 0.0


def best_copy(
    match: Match | None, chances: Sequence[float], prices: Sequence[float], most: int, worth: float = 1.0
) -> Copy:
    """The best length of a copy, at most `most`.

    Args:
        chances: That the next token is right where 1, 2, ... agree before it; more than there are count as the last.
        prices: In tokens, of a copy of 0, 1, ... tokens.
        worth: Value of a token to the request.
    """
    best = Copy()
    if match is None:
        return best
    sure, gain = 1.0, 0.0
    for j in range(1, min(len(match.tokens), len(prices) - 1, most) + 1):
        sure *= chances[min(match.length + j - 1, len(chances)) - 1]
        gain += worth * sure
        if gain - prices[j] > best.worth:
            best = Copy(j, gain, gain - prices[j])
    return best


@dataclass(frozen=True)
class Option:
    """`steps` draft steps, and per request how many tokens it copies; `net` tokens gained less what their time is worth."""

    net: float
    steps: int
    copies: list[int]


class Options:
    """The options of one round.

    Args:
        kinds, most: Of the requests that may draft: what their model drafts are like, and how many are of use.
        copies: The copy that each would make.
        worths: Value of a token to each.
        model: Per kind, tokens expected to be accepted of 0, 1, ... model drafts.
        shares: What a token is worth where n = 0, 1, ... requests gain one, of what it is where all do.
        reserve: Tokens that drafting must gain before it pays: what unevenness will cost that is not in the gains.
        price: Tokens that a millisecond is worth.
        step_ms: One draft step.
        rows_ms: What so many more rows add to the verification.
    """

    def __init__(
        self,
        *,
        kinds: Sequence[int],
        most: Sequence[int],
        copies: Sequence[Copy],
        worths: Sequence[float],
        model: Mapping[int, Sequence[float]],
        shares: Sequence[float],
        reserve: float,
        price: float,
        step_ms: float,
        rows_ms: Callable[[int], float],
    ):
        self._price, self._step_ms, self._rows_ms, self._reserve = price, step_ms, rows_ms, reserve
        count, longest = len(kinds), len(model[kinds[0]]) - 1
        self._steps = np.arange(longest + 1)
        # How many requests share in the gain, from the least gain on, times what a token is then worth.
        self._weights = np.array([n * shares[n] for n in range(count, 0, -1)])
        # [draft steps, request]: drafts of the model that are of use, and those expected to be accepted.
        self._own = np.minimum(self._steps[:, None], np.array(most)[None])
        chances = np.array([model[kind] for kind in kinds])
        # [request], and [draft steps, request]: the value of drafts of the model.
        self._worths = np.array(worths)
        self._model = chances[np.arange(count)[None], self._own] * self._worths
        self._lengths, self._gain, self._worth = (
            np.array([getattr(copy, name) for copy in copies]) for name in ("length", "gain", "worth")
        )

    def best(self) -> Option:
        """With any number of draft steps, with copies or without: the option that gains most.

        Where copies are allowed, a request takes the better of its copy and the model's drafts."""
        count = self._own.shape[1]
        row_price = np.array(
            [0.0, *(self._price * self._rows_ms(count * k) / (count * k) for k in self._steps[1:].tolist())]
        )
        copies = np.where(self._worth > self._model - self._own * row_price[:, None], self._lengths[None], 0)
        options = []
        for chosen in (np.zeros_like(copies), copies):
            gains = np.where(chosen > 0, self._gain[None], self._model)
            net = self._net(gains, np.where(chosen > 0, chosen, self._own).sum(1))
            k = int(net.argmax())
            options.append(Option(float(net[k]), k, chosen[k].tolist()))
        return max(options, key=lambda option: option.net)

    def could_pay(self) -> bool:
        """Whether the model's drafts would pay were every one accepted: else there is nothing to find out."""
        return bool((self._net(self._own * self._worths, self._own.sum(1))[1:] > 0).any())

    def _net(self, gains: np.ndarray, drafts: np.ndarray) -> np.ndarray:
        """Per number of draft steps: tokens gained, each layer of the gains weighed by who shares in it, less their price."""
        layers = np.diff(np.sort(gains, axis=1), axis=1, prepend=0.0)
        rows_ms = np.array([self._rows_ms(n) for n in drafts.tolist()])
        net = layers @ self._weights - self._price * (self._steps * self._step_ms + rows_ms)
        return np.where(drafts > 0, net - self._reserve, 0.0)
