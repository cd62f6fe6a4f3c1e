"""Engines in processes of their own that take turns: who runs when, and that a run may end before its last turn."""

from __future__ import annotations

import pytest

from sdfp_vllm.measure.engines import EngineSpec, Turn, run_engines
from tests.support.engines import pacing_by_hand, write_plan

pytestmark = pytest.mark.engine


def test_engines_take_turns_until_told_to_stop(target, kept, prompts, tmp_path):
    """Sampled requests are paced as users' are: they get no seed that nobody asked for."""
    plan = write_plan(target, tmp_path, kept, k=3, pacing=pacing_by_hand())
    turns = [Turn(prompts=[p[:32]], max_tokens=4 + i) for i, p in enumerate(prompts[:4])]
    sampled = Turn(prompts=[prompts[0][:32]], max_tokens=8, temperature=0.8)
    common = dict(
        model=str(target),
        warm_up=prompts[0][:8],
        dtype="float32",
        engine={"max_model_len": 256, "max_num_seqs": 2, "enforce_eager": True},
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    drafting = {"method": "sdfp", "model": plan}
    specs = [
        EngineSpec(turns=turns, **common),
        EngineSpec(turns=[sampled], speculative=drafting, ignore_eos=True, **common),
        EngineSpec(turns=turns, speculative=drafting, **common),
    ]
    steps, asked = [], []

    def goes_on(turn: int) -> bool:
        asked.append(turn)
        return turn < 2

    plain, short, drafted = run_engines(specs, lambda engine, done: steps.append((engine, done)), goes_on)
    assert asked == [0, 1, 2]
    assert steps == [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4), (2, 5), (0, 6), (2, 7)]
    assert [len(m.turns) for m in (plain, short, drafted)] == [2, 1, 2]
    assert [len(t.token_ids[0]) for t in plain.turns] == [4, 5]
    assert [t.token_ids for t in drafted.turns] == [t.token_ids for t in plain.turns]
    assert len(short.turns[0].token_ids[0]) == 8 and short.turns[0].paced
    assert drafted.whole.rounds > 0 == plain.whole.rounds
