"""A restricted draft head in the V2 runner: what V1 drafts with it, within its tokens; and sampled text is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdfp_vllm.engine.draft.head import DraftHead
from tests.engine_v2.test_draws import draw
from tests.engine_v2.test_same_drafts import drafts_of, greedy_drafts
from tests.support.bigram import VOCAB, z_score
from tests.support.engines import engine, runner, spec_counters
from tests.support.exact_sampling import THRESHOLD
from tests.support.restricted_plans import write_restricted_plan

pytestmark = pytest.mark.engine


def test_v1_and_v2_draft_the_same_tokens_of_the_part(
    target: Path,
    kept: list[int],
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    part = [t for i, t in enumerate(sorted({t for p in prompts for t in p})) if i % 3]
    plan = write_restricted_plan(target, tmp_path, kept, 3, part)
    some = [prompts[0][:30]]
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        assert isinstance(runner(llm).speculator.model._head, DraftHead)
        v2 = drafts_of(llm, some)
    assert len(v2) > 4 and {t for drafted in v2 for t in drafted} <= set(part)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert v2 == greedy_drafts(target, plan, some)


@pytest.mark.slow
def test_sampled_text_follows_the_exact_distribution(bigram: Path, exact: torch.Tensor, tmp_path: Path):
    """1,248 draws, of which the draft can propose 5 of 8 tokens."""
    plan = write_restricted_plan(bigram, tmp_path, [0, 3], 3, [1, 2, 4, 5, 7])
    settings = {"method": "sdfp", "model": plan}
    with engine(bigram, settings, max_model_len=64, max_num_seqs=32, skip_tokenizer_init=True) as llm:
        ids = draw(llm, temperature=1.0)
        counters = spec_counters(llm)
    assert 0.05 < counters["num_accepted_tokens"] / counters["num_draft_tokens"] < 0.95
    assert set(ids.flatten().tolist()) == set(range(VOCAB))
    z = z_score(ids, exact, temperature=1.0)
    print(f"z {z:.2f}")
    assert z < THRESHOLD
