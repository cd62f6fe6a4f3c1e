"""Whether drafts run the adapter of their request: as asked, else by what it costs on the platform."""

from __future__ import annotations

import pytest

from sdfp_vllm.engine import config
from sdfp_vllm.errors import SdfpError


@pytest.mark.parametrize(
    ("asked", "cpu", "own"),
    [("own", True, True), ("base", False, False), ("auto", True, False), ("auto", False, True)],
)
def test_own_adapters(monkeypatch, asked, cpu, own):
    monkeypatch.setattr(type(config.current_platform), "is_cpu", lambda self: cpu)
    assert config.own_adapters(asked) is own


@pytest.mark.parametrize("asked", ["mine", None, True])
def test_anything_else_is_refused(asked):
    with pytest.raises(SdfpError, match=r"speculative_config\['adapters'\].*Give \"own\""):
        config.own_adapters(asked)
