"""What a request says of its own drafts, on the V2 runner: the scheduler takes no more of them than it wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, tokens

pytestmark = pytest.mark.engine


def test_each_request_of_a_batch_gets_what_it_asks_for(target: Path, plan: str, prompts: list[list[int]]):
    from vllm import SamplingParams

    extra: list[dict[str, Any]] = [{}, {"sdfp_draft": False}, {"sdfp_max_draft_tokens": 1}]
    some = [p[:40] for p in prompts[:3]]
    with engine(target) as llm:
        expected = tokens(llm, some, max_tokens=14)
    inputs = [{"prompt_token_ids": p} for p in some]
    params = [SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, extra_args=e) for e in extra]
    settings = {"method": "sdfp", "model": plan}
    with engine(target, settings, per_request_spec_decode_metrics="detailed") as llm:
        done = [o.outputs[0] for o in llm.generate(inputs, params, use_tqdm=False)]
    assert [[list(c.token_ids)] for c in done] == expected
    assert [max(c.spec_decode_metrics.per_step_drafted, default=0) for c in done] == [3, 0, 1]
