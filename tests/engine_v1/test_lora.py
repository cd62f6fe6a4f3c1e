"""LoRA adapters: plain vLLM's answers for each, and drafts that run the request's adapter.

A wrong adapter in drafts changes no answer. It shows in acceptance: the first view here keeps every layer at full
precision, so that drafts are accepted but for rounding if, and only if, each request's drafts run its own adapter.
"""

from __future__ import annotations

from typing import Any

import pytest

from sdfp_vllm.plan.schema import DraftHead, StoredView
from sdfp_vllm.plan.view import DraftView
from tests.support.adapters import adapted_tokens, adapter, plain_answers, write_adapter
from tests.support.bridged_plans import write_bridged_plan
from tests.support.engines import (
    assert_identical,
    engine,
    metric,
    pacing_by_hand,
    runner,
    spec_counters,
    write_plan,
)
from tests.support.restricted_plans import write_restricted_plan

pytestmark = pytest.mark.engine

LORA: dict[str, Any] = dict(enable_lora=True, max_loras=2, max_lora_rank=8, enable_prefix_caching=True)
WHOLE = range(16)


@pytest.fixture(scope="module")
def adapters(target, tmp_path_factory) -> dict[str, Any]:
    """Two that a batch mixes with the base model, the second of head and embedding too, and one to take a slot."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "first": {},
        "second": dict(head=0.5, embedding=0.3),
        "third": dict(modules=("q_proj", "v_proj", "down_proj"), strength=0.5, rank=4),
    }
    return {
        name: adapter(name, number, write_adapter(target, folder / name, seed=number, **kind))
        for number, (name, kind) in enumerate(kinds.items(), 1)
    }


@pytest.fixture(scope="module")
def mixed(adapters) -> list[Any]:
    """By prompt, in turn: the base model and two adapters."""
    return [None, adapters["first"], adapters["second"]]


@pytest.fixture(scope="module")
def some(prompts):
    return prompts[:12]


@pytest.fixture(scope="module")
def plain(target, some, mixed, adapters) -> dict[str, Any]:
    """Plain vLLM's answers with the same adapters."""
    with engine(target, **LORA) as llm:
        base = adapted_tokens(llm, some, [None])
        answers: dict[str, Any] = {
            "mixed": plain_answers(llm, some, mixed),
            "third": adapted_tokens(llm, some[:3], [adapters["third"]]),
            "prompt scores": prompt_scores(llm, some[1], adapters["first"]),
        }
    different = sum(got != want for got, want in zip(answers["mixed"], base, strict=True))
    assert different == len(some) * 2 // 3, "an adapter does nothing"
    return answers


def prompt_scores(llm: Any, prompt: list[int], request: Any) -> list[float]:
    """Log-probabilities of a prompt's tokens, which vLLM computes after drafting."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    (out,) = llm.generate([{"prompt_token_ids": prompt}], params, lora_request=request, use_tqdm=False)
    return [next(iter(scores.values())).logprob for scores in out.prompt_logprobs if scores]


class Acceptance:
    """Drafts accepted of those made since it was made."""

    def __init__(self, llm: Any):
        self._llm, self._before = llm, spec_counters(llm)

    def __call__(self) -> float:
        now = spec_counters(self._llm)
        drafted, accepted = (
            now[name] - self._before[name] for name in ("num_draft_tokens", "num_accepted_tokens")
        )
        assert drafted > 25
        return accepted / drafted


# ---------------------------------------------------------------- every layer, at full precision
@pytest.fixture(scope="module")
def whole(target, plain, tmp_path_factory):
    plan = write_plan(target, tmp_path_factory.mktemp("whole"), WHOLE, k=3)
    with engine(target, {"method": "sdfp", "model": plan, "adapters": "own"}, **LORA) as llm:
        yield llm


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_drafts_run_the_adapter_of_their_request(whole, some, mixed, plain, batch):
    """Base and adapters in one batch, in which requests come and go; prefixes of earlier runs are cached by adapter."""
    count = 6 if batch == 1 else len(some)
    accepted = Acceptance(whole)
    assert_identical(adapted_tokens(whole, some[:count], mixed, batch=batch), plain["mixed"][:count])
    assert accepted() > 0.98


def test_drafts_of_the_base_model_are_exact_and_accepted_less(whole, some, mixed, plain, monkeypatch):
    """`"adapters": "base"`; and what the bounds in this file can see."""
    monkeypatch.setattr(runner(whole).drafter.adapters, "own", False)
    accepted = Acceptance(whole)
    assert_identical(adapted_tokens(whole, some, mixed), plain["mixed"])
    assert accepted() < 0.9


def test_lengths_of_answers_and_drafts_vary(whole, some, mixed, plain):
    """Rows move in the batch as requests end; some are never drafted for."""
    params = [
        {},
        {"max_tokens": 5},
        {"extra_args": {"sdfp_draft": False}},
        {"max_tokens": 11, "extra_args": {"sdfp_max_draft_tokens": 1}},
    ]
    lengths = [16, 5, 16, 11]
    accepted = Acceptance(whole)
    got = adapted_tokens(whole, some, mixed, params=params)
    assert_identical(got, [answer[: lengths[i % 4]] for i, answer in enumerate(plain["mixed"])])
    assert accepted() > 0.95


def test_another_adapter_in_the_slot_of_one_that_was_unloaded(whole, some, mixed, plain, adapters):
    slots = runner(whole).model.lora_manager.lora_index_to_id
    adapted_tokens(whole, some[:3], mixed)
    slot = slots.index(1)
    assert whole.llm_engine.remove_lora(1)
    assert whole.llm_engine.add_lora(adapters["third"])
    assert slots.index(3) == slot and 1 not in slots
    accepted = Acceptance(whole)
    assert_identical(adapted_tokens(whole, some[:3], [adapters["third"]]), plain["third"])
    assert accepted() > 0.98
    # Back again: the slots are full, and the least recently used one is taken.
    accepted = Acceptance(whole)
    assert_identical(adapted_tokens(whole, some, mixed), plain["mixed"])
    assert accepted() > 0.98


def test_an_adapter_loaded_over_another_in_place(whole, some, plain, adapters):
    """The same number and slot, other weights: as a trainer does between rounds."""
    over = adapter("over", 2, adapters["third"].lora_path, load_inplace=True)
    whole.llm_engine.add_lora(over)
    accepted = Acceptance(whole)
    again = adapter("over", 2, adapters["third"].lora_path)
    assert_identical(adapted_tokens(whole, some[:3], [again]), plain["third"])
    assert accepted() > 0.98
    whole.llm_engine.remove_lora(2)  # other tests have another under this number


def test_the_mapping_is_the_targets_after_drafting(whole, some, mixed, plain, adapters, monkeypatch):
    """vLLM scores prompts then."""
    manager, drafter = runner(whole).model.lora_manager, runner(whole).drafter
    propose, put_back = drafter.propose, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        before = manager._last_mapping
        drafts = propose(*args, **kwargs)
        put_back.append(manager._last_mapping == before)
        return drafts

    monkeypatch.setattr(drafter, "propose", spy)
    assert_identical(adapted_tokens(whole, some[:3], mixed), plain["mixed"][:3])
    assert len(put_back) > 3 and all(put_back)
    whole.reset_prefix_cache()
    got = prompt_scores(whole, some[1], adapters["first"])
    assert got == pytest.approx(plain["prompt scores"], abs=1e-4)


def test_prefixes_of_another_adapter_are_not_used(whole, some, mixed, plain):
    whole.reset_prefix_cache()
    hits = metric(whole, "prefix_cache_hits")
    adapted_tokens(whole, some, mixed[1:] + mixed[:1], max_tokens=1)
    assert_identical(adapted_tokens(whole, some, mixed), plain["mixed"])
    assert metric(whole, "prefix_cache_hits") == hits
    assert_identical(adapted_tokens(whole, some, mixed), plain["mixed"])
    assert metric(whole, "prefix_cache_hits") > hits


# ---------------------------------------------------------------- other views
def test_paced_drafts_on_rounded_weights(target, some, mixed, plain, tmp_path):
    """An adapter's part stays full precision; skipped branches, padded rows, copies, and what requests ask for."""
    view = DraftView.from_units(
        {
            (b, i): "int8"
            for i in WHOLE
            for b in ("attention", "mlp")
            if (b, i) not in (("mlp", 5), ("attention", 9))
        }
    )
    plan = write_plan(
        target, tmp_path, view, 3, pacing=pacing_by_hand(), view=StoredView.of(view, 16, head=DraftHead(precision="int8"))
    )  # fmt: skip
    with engine(target, {"method": "sdfp", "model": plan, "adapters": "own"}, **LORA) as llm:
        runner(llm).drafter.pacer.timed = False
        assert_identical(adapted_tokens(llm, some, mixed, batch=3), plain["mixed"])
        params = [{"extra_args": {"sdfp_copies": False}}, {"extra_args": {"sdfp_max_draft_tokens": 1}}]
        accepted = Acceptance(llm)
        assert_identical(adapted_tokens(llm, some, mixed, params=params), plain["mixed"])
        assert accepted() > 0.7
        tally = runner(llm).drafter.pacer.tally
        assert tally.model_drafts > 50 and tally.copied_drafts > 0


def test_a_restricted_head_has_its_rows_of_the_adapter(target, some, mixed, plain, adapters, tmp_path):
    """Over just the answers' tokens, every draft is right if the head's change is that of its rows; in every slot."""
    known = sorted({t for answers in (plain["mixed"], plain["third"]) for answer in answers for t in answer})
    plan = write_restricted_plan(target, tmp_path, WHOLE, 3, known)
    with engine(target, {"method": "sdfp", "model": plan, "adapters": "own"}, **LORA) as llm:
        for requests, want in (
            (mixed, plain["mixed"]),
            ([adapters["third"]], plain["third"]),
            (mixed, plain["mixed"]),
        ):
            accepted = Acceptance(llm)
            assert_identical(adapted_tokens(llm, some[: len(want)], requests), want)
            assert accepted() > 0.98


def test_bridged_drafts_through_a_window(target, kept, some, mixed, plain, tmp_path):
    plan, _ = write_bridged_plan(target, tmp_path, kept, 3)
    settings = {"method": "sdfp", "model": plan, "window": 20, "adapters": "own"}
    with engine(target, settings, block_size=32, **LORA) as llm:
        assert_identical(adapted_tokens(llm, some, mixed), plain["mixed"])
        assert spec_counters(llm)["num_accepted_tokens"] > 0


# ---------------------------------------------------------------- longer
@pytest.mark.more
def test_without_enforce_eager(target, some, mixed, plain, tmp_path):
    """On a CPU vLLM compiles nothing where adapters are on."""
    plan = write_plan(target, tmp_path, WHOLE, k=3)
    with engine(
        target, {"method": "sdfp", "model": plan, "adapters": "own"}, enforce_eager=False, **LORA
    ) as llm:
        accepted = Acceptance(llm)
        assert_identical(adapted_tokens(llm, some, mixed), plain["mixed"])
        assert accepted() > 0.98
