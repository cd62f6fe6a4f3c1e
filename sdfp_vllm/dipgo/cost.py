"""What a budget is a share of: operations (macs.py) or time (latency.py, which stopwatch.py measures)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from sdfp_vllm.dipgo.layout import Gates, Layout

CostName = Literal["macs", "latency"]


class Cost(BaseModel):
    """The cost of a generation: every call costs `rest`, and `units[i]` where unit i runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    units: list[Any]
    rest: Any

    @abstractmethod
    def share(self, executed: Gates) -> float:
        """The cost when the units in `executed` (calls, units) run, over that of the full run."""

    def cascade(self, layout: Layout, reuse: str) -> NDArray[np.float64]:
        """DiP-GO's gamma: the share of a call's cost saved by closing unit i alone, with what that makes useless."""
        n = len(self.units)
        everything = np.ones((1, n), dtype=bool)
        gamma = np.empty(n)
        for i in range(n):
            gates = everything.copy()
            gates[0, i] = False
            gamma[i] = 1 - self.share(layout.closure(gates, reuse))
        return gamma
