"""Text that an engine writes while its parent reads."""

from __future__ import annotations

import pytest

from sdfp_vllm.measure.engines import _EngineProcess
from sdfp_vllm.measure.spec import EngineSpec, Turn


def test_a_character_is_told_once_and_when_its_last_byte_is_there(tmp_path):
    turn = Turn(prompts=["x"], max_tokens=1, streamed=True)
    engine = _EngineProcess(EngineSpec(model="none", turns=[turn], warm_up="x"), tmp_path)
    told: list[str] = []
    with engine.text.open("ab", buffering=0) as text:
        for byte in "a→b".encode():
            text.write(bytes([byte]))
            engine._tell(told.append)
            engine._tell(told.append)  # nothing is new
    assert told == ["a", "→", "b"]


def test_texts_of_several_prompts_are_not_streamed():
    with pytest.raises(ValueError, match="a streamed turn has one prompt"):
        Turn(prompts=["x", "y"], max_tokens=1, streamed=True)
