"""BatchPolicy: one draft length for the whole batch, where drafts can neither differ nor stop midway.

So it is where scheduling runs ahead of the model (asynchronous scheduling) and where a round is one CUDA graph
(the V2 runner). The scheduler asks for the length of every step and sees what was accepted; that is
all this needs, so nothing on the device has to be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdfp_vllm.pacing.odds import PositionOdds
from sdfp_vllm.pacing.pauses import Pauses
from sdfp_vllm.pacing.record import Pacing


class BatchPolicy:
    """Chooses the length that is expected to be fastest, by the plan's costs and the acceptance of late.

    Stands where vLLM's scheduler keeps a list of draft lengths by batch size.

    Args:
        lengths: Draft lengths to choose from, beside 0: those the runner has graphs for.

    Attributes:
        ruled: Share of the running requests whose rules reject drafts (penalties, grammars, ...), told by the scheduler. Their
            acceptance is counted apart, so that it weighs by their number now and says nothing of the others.
    """

    def __init__(self, costs: Pacing, lengths: Sequence[int]):
        self._costs = costs
        self._lengths = sorted(set(lengths) - {0})
        longest = max(self._lengths, default=0)
        self._position = {ruled: PositionOdds(costs.acceptance, longest) for ruled in (False, True)}
        self.ruled = 0.0
        self._pauses = Pauses()

    def __getitem__(self, batch: int) -> int:
        """The draft length of a step with `batch` requests; now and then one that does not pay, to see whether it would."""
        best = max((0, *self._lengths), key=lambda k: self.rate(batch, k))
        if best or not self._lengths:
            self._pauses.end(batch)
            return best
        return self._lengths[0] if self._pauses.over(batch) else 0

    def rate(self, batch: int, k: int) -> float:
        """Tokens per millisecond with k drafts a request."""
        tokens = (1 - self.ruled) * self._tokens(k, False) + self.ruled * self._tokens(k, True)
        ms = k * self._costs.step_ms(batch) + self._costs.verify_ms(batch * (k + 1))
        return batch * tokens / (ms + self._costs.round_overhead_ms)

    def _tokens(self, k: int, ruled: bool) -> float:
        """Tokens expected of a request's round with k drafts."""
        chance, tokens = 1.0, 1.0
        for j in range(k):
            chance *= self._position[ruled][j]
            tokens += chance
        return tokens

    def observe(self, drafted: int, accepted: int, ruled: bool = False) -> None:
        """Learns from one request's verification."""
        self._position[ruled].observe(accepted, drafted)
