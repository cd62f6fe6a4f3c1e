"""Fields of a request that vLLM itself loses or breaks with drafts: here they give what plain vLLM gives.

Each case is a function from an engine to its answer, asked of plain vLLM first, then, with that engine gone, of
SDFP with a fixed draft length and of SDFP with paced and copied drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.support.engines import assert_identical, engine, pacing_by_hand, spec_counters, write_plan

pytestmark = pytest.mark.engine

# Thinking starts at a token that source code is full of; its end is more than one token, so that it is forced in steps.
SETTINGS: dict[str, Any] = dict(
    enable_prompt_embeds=True,
    max_num_batched_tokens=64,
    max_logprobs=-1,
    reasoning_config={"reasoning_start_str": "(", "reasoning_end_str": ") # done"},
)

Prompts = Sequence[Sequence[int]]
CASES: dict[str, Callable[[Any, Prompts], Any]] = {}


def case(function: Callable[[Any, Prompts], Any]) -> Callable[[Any, Prompts], Any]:
    CASES[function.__name__] = function
    return function


def generate(
    llm: Any, prompts: Sequence[Any], params: Sequence[dict[str, Any]] | None = None, **common: Any
) -> list[Any]:
    """Greedy request outputs, one per prompt; `params` are added per request."""
    from vllm import SamplingParams

    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **common}
    sampling = [SamplingParams(**settings | (params[i] if params else {})) for i in range(len(prompts))]
    inputs = [p if isinstance(p, dict) else {"prompt_token_ids": list(p)} for p in prompts]
    return llm.generate(inputs, sampling, use_tqdm=False)


def ids(done: Sequence[Any]) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in done]


def logprobs(done: Sequence[Any]) -> list[tuple[list[int], list[Any]]]:
    """Token ids, and per token what log probabilities came with it."""
    return [
        (
            list(o.outputs[0].token_ids),
            [{i: lp.logprob for i, lp in row.items()} for row in o.outputs[0].logprobs or []],
        )
        for o in done
    ]


def assert_same(got: Sequence[Any], want: Sequence[Any]) -> None:
    """The same ids or texts; log probabilities, where they are with them, up to what batch sizes change."""
    if isinstance(want[0], tuple):
        for (_, rows), (_, others) in zip(got, want, strict=True):
            for row, other in zip(rows, others, strict=True):
                assert row == pytest.approx(other, abs=1e-4)
        got, want = [answer for answer, _ in got], [answer for answer, _ in want]
    assert_identical(got, want)


# ---------------------------------------------------------------- log probabilities of tokens by name
NAMED = [5, 6, 7]


@case
def named_logprobs(llm, prompts):
    answers = logprobs(generate(llm, prompts[:12], logprob_token_ids=NAMED))
    assert all(len(rows) == 24 and all(set(NAMED) <= set(row) for row in rows) for _, rows in answers)
    return answers


@case
def named_logprobs_and_their_number(llm, prompts):
    return logprobs(generate(llm, prompts[:12], logprob_token_ids=NAMED, logprobs=3))


@case
def named_logprobs_of_each_its_own(llm, prompts):
    asked = [{"logprob_token_ids": [11 * (i + 1) for i in range(1 + j % 5)]} for j in range(12)]
    return logprobs(generate(llm, prompts[:12], asked))


def test_named_logprobs_beside_others(llm, prompts):
    """Asked together, requests get what they get alone: named, the most probable, or none. (Not so in plain vLLM.)"""
    kinds: list[dict[str, Any]] = [{"logprob_token_ids": NAMED}, {"logprobs": 5}, {}, {"logprobs": 0}]
    asked = [kinds[i % 4] for i in range(12)]
    together = logprobs(generate(llm, prompts[:12], asked))
    for i, kind in enumerate(kinds):
        alone = logprobs(generate(llm, prompts[i:12:4], **kind))
        assert_same(together[i::4], alone)


# ---------------------------------------------------------------- prompts of embeddings
@pytest.fixture(scope="module")
def embedding(target) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(target / "model.safetensors")["model.embed_tokens.weight"].float()


def embedded(prompts: Prompts, embedding: torch.Tensor, noise: float) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [embedding[torch.tensor(p)] for p in prompts]
    return [{"prompt_embeds": r + noise * torch.randn(r.shape, generator=generator)} for r in rows]


@case
def embedded_prompts(llm, prompts, embedding):
    """Alone, in batches, prefilled in chunks beside each other, and beside prompts of ids."""
    some = embedded(prompts[:12], embedding, 0.01)
    mixed = [p for pair in zip(some, prompts[12:24], strict=True) for p in pair]
    return ids(generate(llm, some[:1])) + ids(generate(llm, some)) + ids(generate(llm, mixed))


def test_embedded_prompts_are_their_ids(llm, prompts, embedding):
    same = ids(generate(llm, embedded(prompts[:12], embedding, 0.0)))
    assert_identical(same, ids(generate(llm, prompts[:12])))


# ---------------------------------------------------------------- thinking
BUDGETS = [0, 1, 2, 3, 4, 7, 12, None]


@case
def thinking_budgets(llm, prompts):
    """Budgets of every size; many prompts end inside a thought, others start one."""
    answers = [ids(generate(llm, prompts[:8], thinking_token_budget=b, max_tokens=40)) for b in BUDGETS]
    assert (
        sum(a != free for of_budget in answers for a, free in zip(of_budget, answers[-1], strict=True)) > 16
    )
    return answers


def test_thinking_budgets_beside_each_other(llm, prompts, plain):
    """Asked together, requests get what they get alone. (Not so in plain vLLM, which mixes rows up.)"""
    asked = [{"thinking_token_budget": BUDGETS[i % 8]} for i in range(64)]
    together = ids(generate(llm, [prompts[i // 8] for i in range(64)], asked, max_tokens=40))
    alone = plain["thinking_budgets"]
    assert_identical(together, [alone[i % 8][i // 8] for i in range(64)])


@case
def no_thinking_one_at_a_time(llm, prompts):
    return [ids(generate(llm, [p], thinking_token_budget=0)) for p in prompts[:8]]


@case
def min_tokens(llm, prompts):
    """Stops are masked up to the minimum and not a token further, wherever in a round it lies."""
    common = [i for answer in ids(generate(llm, prompts[:16])) for i in answer]
    stops = sorted(set(common), key=common.count)[-4:]
    asked = [{"min_tokens": least} for least in range(1, 13)] * 4
    answers = ids(generate(llm, prompts[:48], asked, stop_token_ids=stops))
    assert sum(len(a) < 24 for a in answers) > 12
    return answers


# ---------------------------------------------------------------- what the answer looks like
@case
def texts_and_endings(llm, prompts):
    """Fields of the text, of stopping and of the flow of outputs."""
    from vllm.sampling_params import RepetitionDetectionParams

    loops = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=1, min_count=3)
    kinds: list[dict[str, Any]] = [
        {"stop": ["self", ":"]},
        {"stop": ["self", ":"], "include_stop_str_in_output": True},
        {"skip_special_tokens": False, "ignore_eos": False},
        {"spaces_between_special_tokens": False, "ignore_eos": False},
        {"detokenize": False},
        {"repetition_detection": loops},
        {"skip_reading_prefix_cache": True},
        {"extra_args": {"note": 1}, "stream_interval": 3},
    ]
    done = [
        o.outputs[0] for o in generate(llm, prompts[:32], [kinds[i % 8] for i in range(32)], max_tokens=48)
    ]
    return [[list(o.token_ids), o.text, o.finish_reason, o.stop_reason] for o in done]


@case
def flat_logprobs(llm, prompts):
    return logprobs(generate(llm, prompts[:8], logprobs=2, flat_logprobs=True))


@case
def all_logprobs(llm, prompts):
    return logprobs(generate(llm, prompts[:2], logprobs=-1, max_tokens=6))


@case
def beam_search(llm, prompts):
    """What `use_beam_search` asks a server for."""
    from vllm.sampling_params import BeamSearchParams

    asked = [{"prompt_token_ids": list(p)} for p in prompts[:4]]
    done = llm.beam_search(asked, BeamSearchParams(beam_width=2, max_tokens=8))
    return [[s.tokens for s in o.sequences] for o in done]


# ---------------------------------------------------------------- the comparison
@pytest.fixture(scope="module")
def plain(target, prompts, embedding) -> dict[str, Any]:
    with engine(target, **SETTINGS) as llm:
        return {name: ask(name, llm, prompts, embedding) for name in CASES}


def ask(name: str, llm: Any, prompts: Prompts, embedding: torch.Tensor) -> Any:
    more = (embedding,) if name == "embedded_prompts" else ()
    return CASES[name](llm, prompts, *more)


@pytest.fixture(scope="module", params=["fixed", "paced"])
def llm(request, target, plan, kept, plain, tmp_path_factory):
    if request.param == "paced":
        plan = write_plan(target, tmp_path_factory.mktemp("paced"), kept, k=3, pacing=pacing_by_hand())
    with engine(target, {"method": "sdfp", "model": plan}, **SETTINGS) as llm:
        yield llm


@pytest.mark.parametrize("name", CASES)
def test_same_answer_as_plain(llm, plain, prompts, embedding, name):
    before = spec_counters(llm)
    assert_same(ask(name, llm, prompts, embedding), plain[name])
    after = spec_counters(llm)
    drafted = after["num_draft_tokens"] - before["num_draft_tokens"]
    if name != "beam_search":  # asks for a token at a time
        assert 0 < after["num_accepted_tokens"] - before["num_accepted_tokens"] < drafted
