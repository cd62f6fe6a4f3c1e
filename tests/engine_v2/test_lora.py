"""LoRA adapters on the V2 runner: plain vLLM's answers on the same runner, and drafts that run the request's adapter."""

from __future__ import annotations

from typing import Any

import pytest

from sdfp_vllm.plan.view import DraftView
from tests.engine_v2.test_graphs import recording, with_graphs  # noqa: F401
from tests.support.adapters import adapted_tokens, adapter, plain_answers, write_adapter
from tests.support.engines import assert_identical, engine, runner, spec_counters, write_plan
from tests.support.restricted_plans import write_restricted_plan

pytestmark = pytest.mark.engine

LORA: dict[str, Any] = dict(enable_lora=True, max_loras=2, max_lora_rank=8)
LENGTH = 12
WHOLE = range(16)


@pytest.fixture(scope="module")
def mixed(target, tmp_path_factory) -> list[Any]:
    """By prompt, in turn: the base model and two adapters, the second of head and embedding too."""
    folder = tmp_path_factory.mktemp("adapters")
    first = write_adapter(target, folder / "first", seed=1)
    second = write_adapter(target, folder / "second", seed=2, head=0.5, embedding=0.3)
    return [None, adapter("first", 1, first), adapter("second", 2, second)]


@pytest.fixture(scope="module")
def some(prompts):
    return [p[:50] for p in prompts[:6]]


@pytest.fixture(scope="module")
def plain(target, some, mixed) -> list[list[int]]:
    with engine(target, **LORA) as llm:
        base = adapted_tokens(llm, some, [None], max_tokens=LENGTH)
        answers = plain_answers(llm, some, mixed, max_tokens=LENGTH)
    assert sum(got != want for got, want in zip(answers, base, strict=True)) == 4
    return answers


def acceptance(llm: Any, before: dict[str, Any] | None = None) -> float:
    now = spec_counters(llm)
    drafted, accepted = (
        now[name] - (before or {}).get(name, 0) for name in ("num_draft_tokens", "num_accepted_tokens")
    )
    assert drafted > 30
    return accepted / drafted


def test_drafts_run_the_adapter_of_their_request(target, some, mixed, plain, tmp_path, monkeypatch):
    plan = write_plan(target, tmp_path, WHOLE, k=3)
    with engine(target, {"method": "sdfp", "model": plan, "adapters": "own"}, **LORA) as llm:
        for batch in (1, 6):
            assert_identical(adapted_tokens(llm, some, mixed, batch=batch, max_tokens=LENGTH), plain)
        assert acceptance(llm) > 0.98
        adapters = runner(llm).speculator.adapters
        begin, before = adapters.begin, spec_counters(llm)
        monkeypatch.setattr(adapters, "begin", lambda ids, *rows: begin([0] * len(ids), *rows))
        assert_identical(adapted_tokens(llm, some, mixed, max_tokens=LENGTH), plain)
        assert acceptance(llm, before) < 0.9


@pytest.mark.parametrize(
    "fused",
    [
        pytest.param(True, id="one graph a round"),
        pytest.param(False, id="one graph a step", marks=pytest.mark.more),
    ],
)
def test_replayed_rounds_run_adapters(target, some, mixed, plain, tmp_path, recording, fused):  # noqa: F811
    plan = write_plan(target, tmp_path, WHOLE, k=3)
    with engine(target, {"method": "sdfp", "model": plan, "adapters": "own"}, **LORA) as llm:
        speculator = with_graphs(llm, fused)
        before = spec_counters(llm)
        assert_identical(adapted_tokens(llm, some, mixed, batch=3, max_tokens=LENGTH), plain)
        assert acceptance(llm, before) > 0.98
        replays = {
            d.num_reqs: graph.replays for d, graph in speculator.decode_cudagraph_manager.graphs.items()
        }
    assert replays[4] > 3, replays  # 3 run in the graph for 4


def test_rounded_layers_and_a_restricted_head(target, some, mixed, plain, tmp_path):
    rounded = write_plan(target, tmp_path / "int8", DraftView.at(WHOLE, "int8"), k=3)
    known = sorted({t for answer in plain for t in answer})
    restricted = write_restricted_plan(target, tmp_path / "head", WHOLE, 3, known)
    for plan, bound in ((rounded, 0.8), (restricted, 0.98)):
        with engine(target, {"method": "sdfp", "model": plan, "adapters": "own"}, **LORA) as llm:
            assert_identical(adapted_tokens(llm, some, mixed, max_tokens=LENGTH), plain)
            assert acceptance(llm) > bound
