"""What a request says of its own drafts is obeyed for it alone, its answer stays, and wrong fields are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sdfp_vllm.pacing.policy import GREEDY, RULED
from tests.support.engines import assert_identical, engine, pacing_by_hand, runner, tokens, write_plan

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def paced_plan(target, kept, tmp_path_factory):
    return write_plan(target, tmp_path_factory.mktemp("paced"), kept, k=3, pacing=pacing_by_hand())


@pytest.fixture(scope="module", params=["paced", "fixed"])
def llm(request, target, kept, plain_tokens, tmp_path_factory):
    """Pacing decides each request's length, or all have one; drafts cost next to nothing, so that they are long."""
    cheap = pacing_by_hand(row_ms=0.01, draft_ms=[0.01, 0.02], acceptance=[0.9] * 8, confidence=[0.9] * 15)
    cheap_plan = write_plan(target, tmp_path_factory.mktemp("cheap"), kept, k=3, pacing=cheap)
    fixed = {"num_speculative_tokens": 3} if request.param == "fixed" else {}
    settings = {"method": "sdfp", "model": cheap_plan, **fixed}
    with engine(target, settings, per_request_spec_decode_metrics="detailed") as llm:
        if pacer := runner(llm).drafter.pacer:
            pacer.timed = False  # by the costs above, whatever the machine does
        yield llm


def asked(llm: Any, prompts: Sequence[Any], extra: Sequence[dict[str, Any]], **fields: Any) -> list[Any]:
    """Greedy completions of one batch, `extra` arguments by request."""
    from vllm import SamplingParams

    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True, **fields}
    params = [SamplingParams(**common, extra_args=e or None) for e in extra]
    inputs = [{"prompt_token_ids": list(p)} for p in prompts]
    return [o.outputs[0] for o in llm.generate(inputs, params, use_tqdm=False)]


def lengths(completion: Any) -> list[int]:
    """Drafts that were verified of a request, in each round that had some."""
    return completion.spec_decode_metrics.per_step_drafted


def test_each_request_of_a_batch_gets_what_it_asks_for(llm, prompts, plain_tokens):
    kinds: list[dict[str, Any]] = [
        {},
        {"sdfp_draft": False},
        {"sdfp_max_draft_tokens": 1},
        {"sdfp_max_draft_tokens": 0},
        {"sdfp_draft": True, "sdfp_max_draft_tokens": 2},
        {"sdfp_draft": 0, "sdfp_max_draft_tokens": 2},
        {"sdfp_copies": False, "note": "another's"},
        {"sdfp_copies": 1},
    ]
    done = asked(llm, prompts[:32], kinds * 4)
    assert_identical([[list(c.token_ids)] for c in done], plain_tokens[:32])
    longest = [max((n for c in done[i::8] for n in lengths(c)), default=0) for i in range(8)]
    assert [longest[i] for i in (1, 2, 3, 4, 5)] == [0, 1, 0, 2, 0]
    assert min(longest[i] for i in (0, 6, 7)) >= 3


def test_where_no_request_wants_drafts_no_draft_step_is_run(llm, prompts, plain_tokens, monkeypatch):
    drafter, steps = runner(llm).drafter, []
    forward = drafter._forward
    monkeypatch.setattr(drafter, "_forward", lambda *args: (steps.append(1), forward(*args))[1])
    done = asked(llm, prompts[:8], [{"sdfp_draft": False}] * 8)
    assert_identical([[list(c.token_ids)] for c in done], plain_tokens[:8])
    assert not steps
    asked(llm, prompts[:8], [{}] * 8)
    assert steps


def test_a_seed_beside_a_limit_repeats_and_obeys(llm, prompts):
    extra = [{"sdfp_draft": False}, {"sdfp_max_draft_tokens": 1}, {}]
    first, again = (asked(llm, prompts[:3], extra, temperature=1.0, seed=7) for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert [max(lengths(c), default=0) for c in first] == [0, 1, 3]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"sdfp_draft": "false"}, "sdfp_draft is 'false'. Give true or false"),
        ({"sdfp_draft": 2}, "sdfp_draft is 2"),
        ({"sdfp_copies": 1.0}, "sdfp_copies is 1.0"),
        ({"sdfp_copies": [1]}, r"sdfp_copies is \[1\]"),
        ({"sdfp_max_draft_tokens": -1}, "sdfp_max_draft_tokens is -1. Give a whole number"),
        ({"sdfp_max_draft_tokens": 2.5}, "sdfp_max_draft_tokens is 2.5"),
        ({"sdfp_max_draft_tokens": True}, "sdfp_max_draft_tokens is True"),
        ({"sdfp_copy": False}, "sdfp_copy is not a field of SDFP.*sdfp_copies"),
    ],
)
def test_a_wrong_field_is_refused_by_name(llm, prompts, plain_tokens, wrong, named):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=named) as e:
        asked(llm, prompts[:1], [wrong])
    assert e.value.parameter == next(iter(wrong))
    assert_identical(tokens(llm, prompts[:1]), plain_tokens[:1])


def test_without_sdfp_the_fields_are_nobodys(target, prompts, plain_tokens):
    with engine(target) as plain:
        done = asked(plain, prompts[:2], [{"sdfp_draft": "whatever"}] * 2)
        assert_identical([[list(c.token_ids)] for c in done], plain_tokens[:2])


# ---------------------------------------------------------------- copies, and what is learned of whom
@pytest.fixture(scope="module")
def paced(target, paced_plan):
    with engine(target, {"method": "sdfp", "model": paced_plan}) as llm:
        runner(llm).drafter.pacer.timed = False
        yield llm


def test_copies_are_left_out_where_they_are_not_wanted(paced, prompts):
    """Prompts that say everything twice: with copies they are continued by hardly anything else."""
    twice = [p[:60] + p[:60] + p[:20] for p in prompts[:8]]
    tally = runner(paced).drafter.pacer.tally
    before, model = tally.copied_drafts, tally.model_drafts
    without = asked(paced, twice, [{"sdfp_copies": False}] * 8)
    assert tally.copied_drafts == before and tally.model_drafts > model
    copied = [asked(paced, [p], [{}])[0] for p in twice]
    assert tally.copied_drafts > before
    assert_identical([c.token_ids for c in copied], [c.token_ids for c in without])


def test_requests_with_rules_teach_nothing_about_the_others(paced, prompts, plain_tokens):
    """Half of a batch may use no token that is drafted; the other half is drafted for as if it were alone."""
    from vllm import SamplingParams

    policy = runner(paced).drafter.pacer.policy
    common: dict[str, Any] = dict(temperature=0.0, max_tokens=32, ignore_eos=True)
    rare = [i for i in range(40, 60)]
    rules: list[dict[str, Any]] = [
        {"allowed_token_ids": rare},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 20.0},
        {"structured_outputs": None, "bad_words": [" self", "("], "min_tokens": 20},
    ]
    inputs = [{"prompt_token_ids": list(p)} for p in prompts[:32]]
    before = seen(policy, GREEDY)
    paced.generate(inputs, [SamplingParams(**common, **rules[i % 4]) for i in range(32)], use_tqdm=False)
    assert seen(policy, GREEDY) == before
    first = policy.position[RULED][0]
    assert first < policy.position[GREEDY][0] - 0.1, "rules that reject drafts were learned as such"
    assert_identical(tokens(paced, prompts[:16]), plain_tokens[:16])
    assert seen(policy, GREEDY) != before


def seen(policy: Any, kind: int) -> tuple[Any, ...]:
    """All that is known of requests of one kind."""
    return (
        [policy.position[kind][j] for j in range(8)],
        [policy.confidence[kind][j] for j in range(15)],
        [policy.copying[kind][j] for j in range(16)],
        {size: rate.value for (size, k), rate in policy._rates.items() if k == kind},
    )
