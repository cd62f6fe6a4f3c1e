"""What users combine with greedy decoding gives plain vLLM's answers, in float32.

Each case is a function from an engine to its answer. It is asked of plain vLLM first, then,
with that engine gone, of SDFP; the answers must be the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.support.engines import assert_identical, engine, metric, spec_counters, tokens
from tests.support.stepping import Arrival, play, scheduler

pytestmark = pytest.mark.engine

SETTINGS: dict[str, Any] = dict(enable_prefix_caching=True, max_num_batched_tokens=128)

Prompts = Sequence[Sequence[int]]
CASES: dict[str, Callable[[Any, Prompts], Any]] = {}


def case(function: Callable[[Any, Prompts], Any]) -> Callable[[Any, Prompts], Any]:
    CASES[function.__name__] = function
    return function


def outputs(llm: Any, prompts: Prompts, **params: Any) -> list[Any]:
    """Greedy request outputs that may end early, for cases that look at more than token ids."""
    from vllm import SamplingParams

    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 32, **params}
    return llm.generate(
        [{"prompt_token_ids": list(p)} for p in prompts], SamplingParams(**settings), use_tqdm=False
    )


def endings(llm: Any, prompts: Prompts, **params: Any) -> list[tuple[list[int], Any, Any]]:
    """(token ids, finish reason, stop reason) of each request."""
    done = [o.outputs[0] for o in outputs(llm, prompts, **params)]
    return [(list(o.token_ids), o.finish_reason, o.stop_reason) for o in done]


# ---------------------------------------------------------------- length and stopping
@case
def one_token(llm, prompts):
    return tokens(llm, prompts[:16], max_tokens=1)


@case
def two_tokens(llm, prompts):
    return tokens(llm, prompts[:16], max_tokens=2)


@case
def n_answers(llm, prompts):
    """vLLM takes n > 1 only for sampling requests; with top_k = 1 sampling has one outcome, the greedy one."""
    answers = tokens(llm, prompts[:6], n=3, temperature=1.0, top_k=1)
    assert answers == [[greedy[0]] * 3 for greedy in tokens(llm, prompts[:6])]
    return answers


@case
def stop_token_ids(llm, prompts):
    common = [i for answer in tokens(llm, prompts[:16]) for i in answer[0]]
    stops = sorted(set(common), key=common.count)[-4:]  # the commonest: almost every answer ends early
    answers = endings(llm, prompts[:16], max_tokens=48, stop_token_ids=stops, ignore_eos=True)
    assert sum(reason == "stop" for _, reason, _ in answers) > 4
    return answers


@case
def end_of_sequence(llm, prompts):
    return endings(llm, prompts[:16], max_tokens=64)


# ---------------------------------------------------------------- what changes the logits
@case
def bad_words(llm, prompts):
    plain = tokens(llm, prompts[:12])
    tokenizer = llm.get_tokenizer()
    words = [tokenizer.decode([i]) for answer in plain for i in answer[0][3:6]]
    banned = [*sorted({w.strip() for w in words if w.strip()})[:20], tokenizer.decode(plain[0][0][4:7])]
    answers = tokens(llm, prompts[:12], bad_words=banned)
    assert answers != plain
    return answers


@case
def allowed_token_ids(llm, prompts):
    return tokens(llm, prompts[:12], allowed_token_ids=list(range(200, 900)))


@case
def repetition_penalty(llm, prompts):
    return tokens(llm, prompts[:12], repetition_penalty=1.3)


@case
def presence_and_frequency_penalty(llm, prompts):
    return tokens(llm, prompts[:12], presence_penalty=0.8, frequency_penalty=0.6)


@case
def penalties_beside_none(llm, prompts):
    """Requests with and without penalties, bad words and token limits in one batch."""
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.9},
        {"allowed_token_ids": list(range(100, 1500))},
        {"min_tokens": 5, "stop_token_ids": [10, 11, 12, 13]},
    ]
    return play(llm, [Arrival(f"r{i}", p, i // 3, None, kinds[i % 5]) for i, p in enumerate(prompts[:15])])


# ---------------------------------------------------------------- structured outputs
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["class", "def", "import"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}


def structured(llm: Any, prompts: Prompts, **constraint: Any) -> list[str]:
    from vllm.sampling_params import StructuredOutputsParams

    done = outputs(llm, prompts, max_tokens=80, structured_outputs=StructuredOutputsParams(**constraint))
    return [o.outputs[0].text for o in done]


@case
def json_schema(llm, prompts):
    texts = structured(llm, prompts[:8], json=_SCHEMA)
    complete = [json.loads(t) for t in texts if t.rstrip().endswith("}")]
    assert complete and all(set(value) == {"name", "count", "kind"} for value in complete)
    return texts


@case
def regex(llm, prompts):
    return structured(llm, prompts[:8], regex=r"[a-z]{3,8}(_[a-z]{2,5})*\(\d{1,3}\)")


@case
def choice(llm, prompts):
    return structured(llm, prompts[:8], choice=["return value", "return None", "raise ValueError"])


@case
def grammar_beside_free_text(llm, prompts):
    from vllm.sampling_params import StructuredOutputsParams

    bound = {"structured_outputs": StructuredOutputsParams(regex=r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}")}
    params = [{"ignore_eos": False, **bound}, {}, {"max_tokens": 9}]
    return play(
        llm, [Arrival(f"r{i}", p, 2 * (i // 4), None, params[i % 3]) for i, p in enumerate(prompts[:12])]
    )


# ---------------------------------------------------------------- comings and goings
@case
def joining_at_random_steps(llm, prompts):
    rng = random.Random(1)
    return play(
        llm,
        [
            Arrival(f"r{i}", p, rng.randrange(40), None, {"max_tokens": rng.randint(1, 40)})
            for i, p in enumerate(prompts[:20])
        ],
    )


@case
def aborts(llm, prompts):
    """Every third request is aborted after a few tokens; the others must not notice."""
    arrivals = [
        Arrival(f"r{i}", p, i // 4, 1 + i % 9 if i % 3 == 0 else None) for i, p in enumerate(prompts[:24])
    ]
    answers = play(llm, arrivals)
    return {a.name: answers[a.name] for a in arrivals if a.abort_after is None}


@case
def asked_again_after_an_abort(llm, prompts):
    """Blocks that an aborted request left in the prefix cache serve the same prompt, and one that goes on."""
    llm.reset_prefix_cache()
    long = [list(p) for p in prompts if len(p) > 140][:6]
    play(llm, [Arrival(f"first{i}", p, 0, 20, {"max_tokens": 64}) for i, p in enumerate(long)])
    before = metric(llm, "prefix_cache_hits")
    again = play(llm, [Arrival(f"again{i}", p, i, None, {"max_tokens": 64}) for i, p in enumerate(long)])
    onward = [p + again[f"again{i}"][:30] for i, p in enumerate(long)]
    more = play(llm, [Arrival(f"onward{i}", p, i, None, {"max_tokens": 64}) for i, p in enumerate(onward)])
    assert metric(llm, "prefix_cache_hits") > before
    return again | more


# ---------------------------------------------------------------- the comparison
@pytest.fixture(scope="module")
def plain(target, prompts) -> dict[str, Any]:
    with engine(target, **SETTINGS) as llm:
        answers = {name: function(llm, prompts) for name, function in CASES.items()}
        answers["logprobs"] = logprobs(llm, prompts)
        return answers


@pytest.fixture(scope="module")
def llm(target, plan, plain):
    with engine(target, {"method": "sdfp", "model": plan}, **SETTINGS) as llm:
        yield llm


@pytest.mark.parametrize("name", CASES)
def test_same_answer_as_plain(llm, plain, prompts, name):
    before = spec_counters(llm)["num_drafts"]
    got, want = CASES[name](llm, prompts), plain[name]
    if isinstance(want, dict):  # by request name
        assert got.keys() == want.keys()
        got, want = [got[request] for request in want], list(want.values())
    assert_identical(got, want)
    assert name in ("one_token",) or spec_counters(llm)["num_drafts"] > before
    assert not scheduler(llm).running and not scheduler(llm).waiting


def logprobs(llm: Any, prompts: Prompts) -> list[tuple[list[int], list[dict[int, float]], list[Any]]]:
    def values(rows: Any) -> list[Any]:
        return [None if row is None else {i: lp.logprob for i, lp in row.items()} for row in rows or []]

    done = outputs(llm, prompts[:12], logprobs=5, prompt_logprobs=3, ignore_eos=True)
    return [
        (list(o.outputs[0].token_ids), values(o.outputs[0].logprobs), values(o.prompt_logprobs)) for o in done
    ]


def test_logprobs_and_prompt_logprobs(llm, plain, prompts):
    got = logprobs(llm, prompts)
    assert [ids for ids, _, _ in got] == [ids for ids, _, _ in plain["logprobs"]]
    for (ids, sampled, prompt), (_, want_sampled, want_prompt) in zip(got, plain["logprobs"], strict=True):
        assert len(sampled) == len(ids)
        for row, want in zip(sampled + prompt, want_sampled + want_prompt, strict=True):
            assert row == (want if want is None else pytest.approx(want, abs=1e-4))


def test_logit_bias_and_min_p_are_refused_by_vllm_per_request(llm, prompts):
    """Upstream's limit with any speculation; the engine goes on serving the others."""
    from vllm.exceptions import VLLMValidationError

    for params in ({"logit_bias": {5: 4.0}}, {"min_p": 0.2, "temperature": 1.0}):
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
            tokens(llm, prompts[:1], **params)
    assert len(tokens(llm, prompts[:1])[0][0]) == 32


# ---------------------------------------------------------------- settings of the engine
@pytest.mark.parametrize(
    "table",
    [[[1, 2, 3], [3, 5, 1], [6, 8, 0]], [[1, 1, 0], [2, 8, 2]]],
    ids=["none when full", "none when alone"],
)
def test_draft_length_by_batch_size(target, plan, prompts, plain_tokens, table):
    """vLLM's own table of draft lengths, with an entry of 0: drafting stops and starts again."""
    speculative = {
        "method": "sdfp",
        "model": plan,
        "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": table,
    }
    drafted = {}
    with engine(target, speculative) as llm:
        for batch in (1, 4, 8, 16):
            before = spec_counters(llm)["num_draft_tokens"]
            assert_identical(tokens(llm, prompts[:16], batch=batch), plain_tokens[:16])
            drafted[batch] = spec_counters(llm)["num_draft_tokens"] - before
    if table[-1][2] == 0:  # eight requests at a time are never drafted for
        assert drafted[8] < drafted[1] / 4
    else:
        assert drafted[1] == 0 < drafted[8]
    assert drafted[4] > 0


def test_asynchronous_scheduling_asked_for(target, plan, prompts, plain_tokens):
    """The CPU platform always schedules synchronously; asking for the other is answered the same."""
    with engine(target, {"method": "sdfp", "model": plan}, async_scheduling=True) as llm:
        assert_identical(tokens(llm, prompts[:16]), plain_tokens[:16])
