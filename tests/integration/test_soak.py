"""A minute of rough clients against a real server; `benchmarks/soak.py` runs longer by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_minute_of_rough_clients(target, plan):
    from soak import soak

    seen = soak(target, plan, seconds=60)
    assert seen["failures"] == []
    for kind in ("completed", "streamed", "hung up", "sampled", "refused"):
        assert seen["requests"][kind] > 0, seen["requests"]
