"""Drafts that read a window of the KV cache on the V2 runner: V1's, and answers are plain vLLM's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine_v2.test_graphs import recording, with_graphs  # noqa: F401
from tests.engine_v2.test_same_drafts import drafts_of
from tests.support.engines import engine, runner, tokens

pytestmark = pytest.mark.engine

SETTINGS = dict(block_size=32, max_model_len=256)
LENGTH = 16


def test_v1_and_v2_draft_the_same_tokens_and_answers_are_plain_vllms(
    target: Path, plan: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """Contexts without a gap, with one, and with one that grows meanwhile; alone and in one batch."""
    text = [token for p in prompts for token in p]
    some = [text[i : i + n] for i, n in enumerate((20, 90, 122, 180))]
    speculative = {"method": "sdfp", "model": plan, "window": 20}
    with engine(target, **SETTINGS) as llm:
        want = tokens(llm, some, max_tokens=LENGTH)
    drafts = []
    for v2 in (True, False):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(v2)))
        with engine(target, speculative, **SETTINGS) as llm:
            assert hasattr(runner(llm), "speculator") == v2
            drafts.append(drafts_of(llm, some))
            assert tokens(llm, some, max_tokens=LENGTH) == want
            if v2:  # what they would be over the whole context
                runner(llm).speculator.window = None
                llm.reset_prefix_cache()
                whole = drafts_of(llm, some)
    assert drafts[0] == drafts[1] != whole


@pytest.mark.parametrize("fused", [True, False], ids=["one graph a round", "one graph a step"])
def test_graphs_draft_as_eager_rounds(
    target: Path,
    plan: str,
    prompts: list[list[int]],
    recording: None,  # noqa: F811
    fused: bool,
):
    """They read the edited block table and lengths where the target's were."""
    text = [token for p in prompts for token in p]
    some = [text[i : i + n] for i, n in enumerate((20, 90, 180))]
    with engine(target, {"method": "sdfp", "model": plan, "window": 20}, **SETTINGS) as llm:
        eager = drafts_of(llm, some)
        speculator = with_graphs(llm, fused)
        llm.reset_prefix_cache()
        assert drafts_of(llm, some) == eager
        speculator.window = None
        llm.reset_prefix_cache()
        assert drafts_of(llm, some) != eager
