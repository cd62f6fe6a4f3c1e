"""Whatever the scheduler's settings and the mix of requests, greedy output is plain vLLM's.

Hypothesis draws an engine (token budget, seats, cache size, block size, prefix caching, draft
length, keep set) and, for each engine, a few mixes of requests that join, end and are aborted at
drawn steps. Plain vLLM answers every prompt once; a greedy answer of n tokens is the start of a
longer one, so those answers serve every mix.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tests.support.engines import assert_identical, engine, write_plan
from tests.support.stepping import Arrival, play, scheduler

pytestmark = [pytest.mark.engine, pytest.mark.more]

MAX_MODEL_LEN = 256
MAX_TOKENS = 48
PROMPTS = 24


@dataclass(frozen=True)
class Engine:
    k: int
    kept: tuple[float, ...]  # places in the stack, 0 the first layer and 1 the last
    seats: int
    budget: int
    block_size: int
    spare_blocks: int | None  # beyond what one longest request needs; None for plenty
    prefix_caching: bool


@dataclass(frozen=True)
class Request:
    prompt: int
    step: int
    max_tokens: int
    abort_after: int | None


@st.composite
def engines(draw) -> Engine:
    k = draw(st.integers(1, 6))
    seats = draw(st.integers(1, 8))
    return Engine(
        k=k,
        kept=tuple(draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))),
        seats=seats,
        budget=draw(st.integers(max(16, seats * (k + 1)), 300)),
        block_size=draw(st.sampled_from([32, 64, 128])),
        spare_blocks=draw(st.none() | st.integers(1, 6)),
        prefix_caching=draw(st.booleans()),
    )


requests = st.builds(
    Request,
    prompt=st.integers(0, PROMPTS - 1),
    step=st.integers(0, 30),
    max_tokens=st.integers(1, MAX_TOKENS),
    abort_after=st.none() | st.integers(1, 30),
)
mixes = st.lists(st.lists(requests, min_size=1, max_size=16), min_size=1, max_size=3)

# A cramped engine, whatever the draw brings: small budget, requests thrown out, shared prefixes.
CRAMPED = Engine(3, (0.0, 0.4, 1.0), 6, 30, 32, 2, True)
BUSY = [[Request(i % PROMPTS, i // 2, MAX_TOKENS, 9 if i % 5 == 4 else None) for i in range(20)]]


@pytest.fixture(scope="module")
def check(target, prompts, tmp_path_factory):
    """check(engine, mixes): plays the mixes on such an engine and compares every finished answer."""
    pool = [list(p) for p in prompts[:PROMPTS]]
    for i in range(0, PROMPTS, 4):  # some share what comes first
        pool[i + 1] = (prompts[0] + prompts[1])[: 40 + 7 * i] + pool[i + 1][:20]
    with engine(target, max_model_len=MAX_MODEL_LEN) as llm:
        arrivals = [Arrival(str(i), p, 0, None, {"max_tokens": MAX_TOKENS}) for i, p in enumerate(pool)]
        want = play(llm, arrivals)

    def run(drawn: Engine, mixes: list[list[Request]]) -> None:
        from sdfp_vllm.plan.fingerprint import fingerprint

        last = fingerprint(target).num_layers - 1
        kept = sorted({round(place * last) for place in drawn.kept})
        plan = write_plan(target, tmp_path_factory.mktemp("plan"), kept, drawn.k)
        blocks = {}
        if drawn.spare_blocks is not None:
            longest = MAX_MODEL_LEN // drawn.block_size + 1  # one more is vLLM's null block
            blocks = {"num_gpu_blocks_override": longest + drawn.spare_blocks}
        with engine(
            target,
            {"method": "sdfp", "model": plan},
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=drawn.seats,
            max_num_batched_tokens=drawn.budget,
            block_size=drawn.block_size,
            enable_prefix_caching=drawn.prefix_caching,
            **blocks,
        ) as llm:
            for mix in mixes:
                got = play(
                    llm,
                    [
                        Arrival(str(i), pool[r.prompt], r.step, r.abort_after, {"max_tokens": r.max_tokens})
                        for i, r in enumerate(mix)
                    ],
                )
                ours = [got.get(str(i), []) for i in range(len(mix))]
                theirs = [want[str(r.prompt)][: r.max_tokens] for r in mix]
                # Of an aborted request, what it had by then.
                cut = [
                    a if r.abort_after is None else a[: len(b)]
                    for r, a, b in zip(mix, theirs, ours, strict=True)
                ]
                assert_identical(ours, cut)
                assert not scheduler(llm).running and not scheduler(llm).waiting
                assert scheduler(llm).kv_cache_manager.usage == 0.0

    return run


_COMMON = dict(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)  # an example starts an engine


@settings(max_examples=3, derandomize=True, phases=[Phase.explicit, Phase.generate], **_COMMON)
@example(drawn=CRAMPED, mixes=BUSY)
@given(drawn=engines(), mixes=mixes)
def test_a_few_engines(check, drawn, mixes):
    check(drawn, mixes)


@pytest.mark.slow
@settings(max_examples=30, **_COMMON)
@given(drawn=engines(), mixes=mixes)
def test_many_engines(check, drawn, mixes):
    check(drawn, mixes)
