"""Two minutes of rough clients against a real server; `benchmarks/studies/soak.py` runs longer by hand."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.more]


def test_two_minutes_of_rough_clients_then_a_killed_engine(target, plan):
    """What is checked besides the counts below: the docstring of `benchmarks/studies/soak.py`."""
    from benchmarks.studies.soak import soak

    seen = soak(target, plan, seconds=120)
    print(seen)
    assert seen["failures"] == []
    for kind in ("completed", "streamed", "hung up", "sampled", "refused", "in a burst"):
        assert seen["requests"][kind] > 0, seen["requests"]
    # As plain vLLM, which `failures` compares: the client is told, the log says why, nothing stays behind.
    killed = seen["engine_killed"]
    assert killed["request"] == "error" and "EngineDeadError" in killed["log names"] and killed["left"] == []
