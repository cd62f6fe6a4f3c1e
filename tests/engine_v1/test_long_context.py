"""Drafts that read a window of the KV cache: the text is plain vLLM's, and what they read is what the page says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdfp_vllm.engine.inspect_engine import fix_drafts
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import StoredView
from sdfp_vllm.plan.window import DraftWindow
from tests.engine_v1.test_sampling import draw
from tests.support.bigram import bigram, exact, z_score  # noqa: F401
from tests.support.engines import (
    assert_identical,
    costs_by_hand,
    engine,
    metric,
    pacing_by_hand,
    runner,
    spec_counters,
    tokens,
    write_plan,
)
from tests.support.exact_sampling import THRESHOLD
from tests.support.tiny_models import tiny_model
from tests.support.window_reads import watched

pytestmark = pytest.mark.engine

BLOCK, NEW, K = 32, 24, 3
# Prompts in several chunks; too few blocks for eight long requests, so that some are thrown out and come back.
SETTINGS: dict[str, Any] = dict(block_size=BLOCK, max_num_batched_tokens=96, num_gpu_blocks_override=22)
# Around the first block, the edges of others, and S + W of every window below, up to the last position there is.
LENGTHS = [
    1,
    3,
    4,
    5,
    20,
    24,
    25,
    31,
    32,
    33,
    36,
    37,
    44,
    60,
    63,
    64,
    65,
    68,
    80,
    96,
    100,
    128,
    160,
    200,
    300,
    440,
    488,
]
WINDOWS = [1, 20, 32, 33, 64, 600]  # less than a block, a block and its edges, two, more than there is


@pytest.fixture(scope="module")
def texts(prompts) -> list[list[int]]:
    """Every other one begins as the one before it: blocks are shared."""
    text = [token for p in prompts for token in p]
    return [text[7 * (i // 2) :][:length] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def plain(target, texts) -> list[list[list[int]]]:
    with engine(target, **SETTINGS) as llm:
        return tokens(llm, texts, max_tokens=NEW)


@pytest.fixture(scope="module")
def llm(target, kept, plain, tmp_path_factory):
    view = StoredView.of(KeepSet.of(kept), 16, window=DraftWindow(last=20))
    plan = write_plan(target, tmp_path_factory.mktemp("plan"), kept, K, view=view)
    with engine(target, {"method": "sdfp", "model": plan}, **SETTINGS) as llm:
        assert runner(llm).drafter.window == DraftWindow(sinks=4, last=20)
        yield llm


def narrow(llm: Any, window: DraftWindow | None) -> None:
    """Gives a running engine's drafts another window, and forgets the prompts it has seen."""
    runner(llm).drafter.window = window
    llm.reset_prefix_cache()


@pytest.mark.parametrize("last", WINDOWS)
def test_text_is_plain_vllms_and_drafts_read_what_they_should(llm, texts, plain, last):
    narrow(llm, DraftWindow(last=last))
    before, preempted = spec_counters(llm), metric(llm, "num_preemptions")
    with watched(llm) as reads:
        assert_identical(tokens(llm, texts, max_tokens=NEW), plain)
    after = spec_counters(llm)
    assert reads.wrong == [] and reads.rows > 1000
    assert (reads.gapped > 500) == (last < 600) and (reads.gapped == 0) == (last == 600)
    accepted, drafted = (after[n] - before[n] for n in ("num_accepted_tokens", "num_draft_tokens"))
    assert 0 < accepted < drafted
    assert metric(llm, "num_preemptions") > preempted and metric(llm, "prefix_cache_hits") > 0


@pytest.mark.parametrize(
    "window",
    [DraftWindow(sinks=0, last=20), DraftWindow(sinks=33, last=20), DraftWindow(last=20, beyond=210)],
    ids=str,
)
def test_no_first_tokens_more_than_a_block_of_them_and_long_contexts_alone(llm, texts, plain, window):
    narrow(llm, window)
    with watched(llm) as reads:
        assert_identical(tokens(llm, texts[-8:], max_tokens=NEW), plain[-8:])
    assert reads.wrong == [] and reads.gapped > 100


def test_up_to_that_length_nothing_changes_to_the_bit(llm, texts, plain):
    """And in a batch with a longer context, the shorter one's drafts are what they were."""
    window = DraftWindow(last=64)
    some = [p for p in texts if len(p) + NEW + K <= window.sinks + window.last]
    hidden = []
    for given in (None, window):
        narrow(llm, given)
        with watched(llm) as reads:
            tokens(llm, some, batch=1, max_tokens=NEW)
        assert reads.gapped == 0
        hidden.append(reads.hidden)
    assert len(hidden[0]) == len(hidden[1]) > 50
    assert all(a.equal(b) for a, b in zip(*hidden, strict=True))
    rows = []
    for given in (None, window):
        narrow(llm, given)
        with watched(llm) as reads:
            assert_identical(
                tokens(llm, [some[-1], texts[-2]], max_tokens=NEW), [plain[len(some) - 1], plain[-2]]
            )
        rows.append([h[0] for h in reads.hidden if len(h) == 2])
    assert reads.gapped > 0 and len(rows[0]) >= 5 * K
    assert all(a.equal(b) for a, b in zip(*rows, strict=True))


def test_some_of_a_batch_see_past_the_window(target, kept, texts, plain, tmp_path):
    """Where drafts are paced it is each request's own; here every other one's, by turns."""
    view = StoredView.of(KeepSet.of(kept), 16, window=DraftWindow(last=20))
    plan = write_plan(
        target, tmp_path, kept, K, view=view, **costs_by_hand(pacing_by_hand(), 16, view.branches)
    )
    with engine(target, {"method": "sdfp", "model": plan, "ngram": False}, **SETTINGS) as llm:
        fix_drafts(llm, K)  # so that no clock has a say in how many there are
        observed = []
        with watched(llm) as reads:

            def choose(requests, held, seen, costs):
                first = len(reads.hidden) % 2
                reads.whole = [
                    h > s and (i + first) % 2 == 0 for i, (h, s) in enumerate(zip(held, seen, strict=True))
                ]
                return reads.whole

            runner(llm).drafter.pacer.policy.sights = SimpleNamespace(
                choose=choose,
                observe=lambda request, whole, right, tried: observed.append((whole, right, tried)),
            )
            assert_identical(tokens(llm, texts, max_tokens=NEW), plain)
    assert reads.wrong == [] and reads.gapped > 200
    for seen_whole in (False, True):
        told = [(right, tried) for whole, right, tried in observed if whole == seen_whole]
        assert sum(tried for _, tried in told) > 50
        assert 0 < sum(right for right, _ in told) < sum(tried for _, tried in told)


def test_a_window_of_a_layers_own_is_kept(tmp_path):
    """Gemma 3: three of four layers slide, in a KV cache group of their own, or with all in one."""
    sizes = dict(
        hidden_size=64, intermediate_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1
    )
    changes = dict(max_position_embeddings=256, query_pre_attn_scalar=32, sliding_window=48)
    model = tmp_path / "model"
    made = tiny_model("gemma3_text", seed=0, **sizes, **changes)
    made.save_pretrained(model)
    sliding = {
        f"model.layers.{i}.self_attn.attn" for i, t in enumerate(made.config.layer_types) if "sliding" in t
    }
    plan = write_plan(model, tmp_path / "plan", range(4), K)
    asked = [[(11 * i + 7 * j) % 57 + 3 for j in range(n)] for i, n in enumerate((9, 40, 70, 120, 160))]
    settings = dict(max_model_len=192, block_size=BLOCK, skip_tokenizer_init=True)
    with engine(model, **settings) as llm:
        want = tokens(llm, asked, max_tokens=NEW)
    speculative = {"method": "sdfp", "model": plan, "window": 20}
    groups = []
    for together in (False, True):
        with engine(model, speculative, disable_hybrid_kv_cache_manager=together, **settings) as llm:
            groups.append(len(runner(llm).drafter._by_gid))
            with watched(llm, own_window=sliding) as reads:
                assert_identical(tokens(llm, asked, max_tokens=NEW), want)
        assert 0 < len(sliding) < 4 and reads.wrong == [] and reads.gapped > 50
    assert groups[0] > groups[1] == 1


def test_sampled_text_follows_the_exact_distribution(bigram, exact, tmp_path):  # noqa: F811
    """25,344 draws, a third of them by drafts that do not see all of their context."""
    plan = write_plan(bigram, tmp_path, [0, 3], K)
    size = dict(max_model_len=128, max_num_seqs=256, block_size=BLOCK, skip_tokenizer_init=True)
    with engine(bigram, {"method": "sdfp", "model": plan, "window": 1}, **size) as llm:
        with watched(llm) as reads:
            reads.step = lambda forward, metadata, *args: seen(reads, metadata) or forward(metadata, *args)
            ids = draw(llm, temperature=0.7)
        counters = spec_counters(llm)
    assert reads.gapped > 1000
    assert 0.05 < counters["num_accepted_tokens"] / counters["num_draft_tokens"] < 0.95
    z = z_score(ids, exact, temperature=0.7)
    print(f"z {z:.2f}")
    assert z < THRESHOLD


def seen(reads: Any, metadata: dict[str, Any]) -> None:
    """Counts requests with a gap, without looking at every slot of 256 of them."""
    built = next(iter(metadata.values()))
    positions = reads.drafter.positions[: len(built.seq_lens)]
    reads.gapped += int((built.seq_lens <= positions).sum())


@pytest.mark.more
def test_auto_measures_on_the_engine_of_the_check(target, plan, monkeypatch):
    from rich.progress import Progress

    from sdfp_vllm.common.checkpoint import load_tokenizer
    from sdfp_vllm.common.progress import Stages
    from sdfp_vllm.plan.store import load_plan
    from sdfp_vllm.planner import engine_check, window_search
    from sdfp_vllm.planner.long_texts import long_texts
    from sdfp_vllm.planner.options import PlanOptions
    from sdfp_vllm.planner.work import Work

    contexts = (256, 512, 1024)  # the model has 512 positions
    monkeypatch.setattr(engine_check, "CONTEXTS", contexts)
    monkeypatch.setattr(engine_check, "LASTS", (64,))
    monkeypatch.setattr(window_search, "LASTS", (64,))
    made, bar = load_plan(plan), Stages(Progress(disable=True))
    options = PlanOptions(eager=True)
    texts = long_texts(target, load_tokenizer(target), options, 2, contexts)
    work = Work("target", target, made.fingerprint, Path(plan), options, None, bar)  # no texts are asked for
    assert [len(t.document) for t in texts] == [512, 512]
    prompts = [texts[0].document[:20], texts[1].document[:30]]
    assert engine_check.with_check(work, made, prompts, texts) is made  # without costs the dtype is not known
    made = made.model_copy(update=costs_by_hand(pacing_by_hand(), 16, made.view.branches))
    found = engine_check.with_check(work, made, prompts, texts)
    assert [(t.context, t.last) for t in found.windows] == [(256, None), (256, 64), (512, None), (512, 64)]
    assert all(t.tokens_per_second > 0 and 0 < t.acceptance_rate < 1 for t in found.windows)
    assert found.view.window == window_search.best_window(found.windows)
    assert found.check.prompts == found.check.identical == 2


@pytest.mark.more
def test_a_plan_is_checked_where_long_contexts_do_not_fit(target, plan, monkeypatch):
    from rich.progress import Progress

    from sdfp_vllm.common.progress import Stages
    from sdfp_vllm.plan.store import load_plan
    from sdfp_vllm.planner import engine_check
    from sdfp_vllm.planner.long_texts import LongText
    from sdfp_vllm.planner.options import PlanOptions
    from sdfp_vllm.planner.work import Work

    made, bar = load_plan(plan), Stages(Progress(disable=True))
    made = made.model_copy(update=costs_by_hand(pacing_by_hand(), 16, made.view.branches))
    work = Work("target", target, made.fingerprint, Path(plan), PlanOptions(eager=True), None, bar)
    too_long = LongText([7] * 4096)  # the engine refuses it: the model has 512 positions
    found = engine_check.with_check(work, made, [[5, 6, 7, 8]], [too_long])
    assert found.check.identical == 1 and not found.windows and found.view.window == made.view.window
