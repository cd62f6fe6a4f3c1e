"""Places: whether requests that get ahead of their batch are of use to the others.

Tokens that only some requests gain let these end sooner. Where others wait, a new one takes the place, so the batch
stays full and a token is worth the same whoever gains it. Where none does, the others go on in a smaller batch, which
is hardly faster: tokens that some gain are then worth little more than the rows that they leave.
"""

from __future__ import annotations

from sdfp_vllm.pacing.odds import Average

_MEMORY = 64.0  # requests
# To begin with, and at least: requests that are ahead now may be those behind later.
_TAKEN = 0.2


class Places:
    """The share of ended requests whose place was taken at once."""

    def __init__(self) -> None:
        self._taken = Average(0.0, _MEMORY / 16, _MEMORY)

    @property
    def taken(self) -> float:
        return _TAKEN + (1 - _TAKEN) * self._taken.value

    def observe(self, stayed: int, ended: int, came: int) -> None:
        """Takes the requests of a batch that are still in the next one, and those that ended and came between the two.

        Where none stayed, it may have been another day: that tells nothing.
        """
        if stayed and ended:
            self._taken.observe(min(came, ended), ended)
