"""Memory: what rounded copies of a view's weights take, and how much they may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sdfp_vllm.common.amount import bytes_of
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import DraftView, Precision


@dataclass(frozen=True)
class Memory:
    """Bytes that rounded copies take, by branch and precision, and the most that they may.

    Attributes:
        limit: Bytes; None for no limit.
        branches: Of one layer's branch at a precision.
        head: Of the whole head's rows at a precision.
    """

    limit: int | None = None
    branches: Mapping[tuple[str, Precision], int] = field(default_factory=dict)
    head: Mapping[Precision, int] = field(default_factory=dict)

    def of(self, view: KeepSet, head: Precision = "full") -> int:
        """What `view` takes beside the model."""
        copies = sum(self.branches.get((b, p), 0) for b, _, p in DraftView.of(view).rounded)
        return copies + self.head.get(head, 0)

    def less(self, taken: int) -> Memory:
        """With `taken` bytes gone."""
        return self if self.limit is None else replace(self, limit=self.limit - taken)

    def admits(self, view: KeepSet, head: Precision = "full") -> bool:
        """Whether that is within the limit."""
        return self.admits_bytes(self.of(view, head))

    def admits_bytes(self, wanted: int) -> bool:
        """Whether so many bytes are within the limit."""
        return self.limit is None or wanted <= self.limit


UNLIMITED = Memory()


def parse_memory(asked: str | None, model_bytes: int) -> int | None:
    """Bytes of `--extra-memory`: "500MB", "2GiB", or a share of the model's weights such as "30%"; None: no limit.

    Raises:
        SdfpError: For anything else.
    """
    return None if asked is None else bytes_of("--extra-memory", asked, model_bytes)
