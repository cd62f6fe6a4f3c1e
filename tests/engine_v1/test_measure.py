"""Engines in processes of their own that take turns: who runs when, that a run may end early, and text while it comes."""

from __future__ import annotations

import json
import shutil

import pytest

from sdfp_vllm.measure.engines import run_engine, run_engines
from sdfp_vllm.measure.spec import EngineSpec, Turn
from tests.support.engines import pacing_by_hand, write_plan

pytestmark = pytest.mark.engine


@pytest.mark.more
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
        EngineSpec(turns=[None, sampled], speculative=drafting, ignore_eos=True, **common),  # sits one out
        EngineSpec(turns=turns, speculative=drafting, **common),
    ]
    steps, asked = [], []

    def goes_on(turn: int) -> bool:
        asked.append(turn)
        return turn < 2

    plain, short, drafted = run_engines(specs, lambda engine, done: steps.append((engine, done)), goes_on)
    assert asked == [0, 1, 2]
    assert steps == [(0, 0), (1, 1), (2, 2), (0, 3), (2, 4), (0, 5), (1, 6), (2, 7)]
    assert [len(m.turns) for m in (plain, short, drafted)] == [2, 1, 2]
    assert [len(t.token_ids[0]) for t in plain.turns] == [4, 5]
    assert [t.token_ids for t in drafted.turns] == [t.token_ids for t in plain.turns]
    assert len(short.turns[0].token_ids[0]) == 8 and short.turns[0].paced
    assert drafted.whole.rounds > 0 == plain.whole.rounds


def test_streamed_text_comes_in_pieces_that_join_to_the_unstreamed_text(target, kept, tmp_path):
    """Of characters that span two tokens each, which rounds of drafts cut anywhere."""
    model = tmp_path / "model"
    shutil.copytree(target, model)
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    hash_sign, newline = vocab["#"], vocab["\u010a"]
    # The two tokens trade names with the two bytes of an e with an acute accent, as byte-level BPE writes them.
    for mine, byte in (("#", "\u00c3"), ("\u010a", "\u00a9")):
        vocab[mine], vocab[byte] = vocab[byte], vocab[mine]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")

    asked = dict(prompts=[[hash_sign, newline] * 12], max_tokens=101)
    spec = EngineSpec(
        model=str(model),
        turns=[Turn(**asked), Turn(**asked, streamed=True)],
        warm_up=[hash_sign] * 8,
        speculative={
            "method": "sdfp",
            "model": write_plan(model, tmp_path / "plan", kept, k=3),
            "num_speculative_tokens": 3,
        },
        ignore_eos=True,
        dtype="float32",
        engine={"max_model_len": 256, "enforce_eager": True, "enable_prefix_caching": False},
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    pieces: list[str] = []
    unstreamed, streamed = run_engine(spec, pieces.append).turns
    times = {"seconds", "decode_seconds", "draft_seconds"}
    assert streamed.model_dump(exclude=times) == unstreamed.model_dump(exclude=times)
    assert streamed.decode_seconds > 0 and streamed.rounds > 0
    assert "".join(pieces) == streamed.texts[0]
    assert len(pieces) > 2, "the text came when it was whole"
    assert streamed.texts[0].count("\u00e9") > 20 and "\ufffd" not in streamed.texts[0]
