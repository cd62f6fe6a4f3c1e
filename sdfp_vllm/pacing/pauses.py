"""When to try again what has not paid of late: ever more seldom, so that what the tries cost fades."""

from __future__ import annotations

# Rounds. A try costs a static batch most of a round, for what it gains is lost on those it passed by: two within the
# first dozen rounds of an answer of 33 tokens were 4 % of it.
FIRST = 16
LONGEST = 128


class Pauses:
    """Counts rounds without drafts, by batch sizes that are alike (the same power of two)."""

    def __init__(self) -> None:
        self._left: dict[int, tuple[int, int]] = {}  # rounds until the next try, rounds of this pause

    def over(self, batch: int) -> bool:
        """Counts one round; True where a try is due. The next pause is twice as long, up to LONGEST rounds."""
        size = batch.bit_length()
        left, pause = self._left.get(size, (FIRST, FIRST))
        if left > 0:
            self._left[size] = (left - 1, pause)
            return False
        pause = min(2 * pause, LONGEST)
        self._left[size] = (pause, pause)
        return True

    def end(self, batch: int) -> None:
        """It pays again: the next pause is a short one."""
        self._left.pop(batch.bit_length(), None)
