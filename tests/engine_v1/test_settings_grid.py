"""1,024 different prompts over a grid of engine settings in which every pair of choices meets.

Seven settings with two values each, in the eight rows of the orthogonal array L8(2^7): each row
is an engine, and any two values of any two settings are together in two of them.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.support.engines import assert_identical, engine, metric, spec_counters, write_plan
from tests.support.fixtures import source_prompts

pytestmark = [pytest.mark.engine, pytest.mark.more]

PER_ENGINE = 128
MAX_MODEL_LEN = 200
MAX_TOKENS = 16
FACTORS: dict[str, tuple[Any, Any]] = {
    "prefix caching": (False, True),
    "token budget": (1024, 40),
    "cache": ("ample", "tight"),
    "seats": (16, 5),
    "draft tokens": (1, 4),
    "kept layers": ([0, 15], [0, 1, 4, 7, 9, 12, 14, 15]),
    "block size": (128, 32),
}
# Column i of the array is the parity of the bits of i + 1 that a row's number has.
ROWS = [
    {name: values[(row & (i + 1)).bit_count() % 2] for i, (name, values) in enumerate(FACTORS.items())}
    for row in range(8)
]


def test_every_pair_of_choices_meets():
    names = list(FACTORS)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert len({(str(row[a]), str(row[b])) for row in ROWS}) == 4


@pytest.fixture(scope="module")
def many(target) -> list[list[int]]:
    """Different prompts in drawn order; of every four, three begin alike, some for more than the largest block."""
    drawn = iter(source_prompts(target, 3000, 40, seed=1))
    beginnings = iter(source_prompts(target, 400, 160, seed=2))
    prompts: dict[tuple[int, ...], None] = {}
    while len(prompts) < PER_ENGINE * len(ROWS):
        shared = next(beginnings)
        shared = shared[:140] if len(shared) > 140 else shared[:33]
        for i in range(4):
            prompts[tuple((shared if i < 3 else []) + next(drawn))] = None
    ordered = [list(p) for p in prompts][: PER_ENGINE * len(ROWS)]
    random.Random(0).shuffle(ordered)
    return ordered


def lengths(row: int) -> list[int]:
    return [1 + (7 * i + row) % MAX_TOKENS for i in range(PER_ENGINE)]


def generate(llm, prompts, lengths) -> list[list[int]]:
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in out]


@pytest.fixture(scope="module")
def plain(target, many) -> list[list[int]]:
    assert len(many) == 1024
    with engine(target, max_model_len=MAX_MODEL_LEN, max_num_seqs=32) as llm:
        return generate(llm, many, [n for row in range(len(ROWS)) for n in lengths(row)])


@pytest.mark.parametrize("row", range(len(ROWS)), ids=lambda i: ", ".join(map(str, ROWS[i].values())))
def test_row(target, many, plain, tmp_path, row):
    chosen = ROWS[row]
    plan = write_plan(target, tmp_path, chosen["kept layers"], chosen["draft tokens"])
    longest = -(-MAX_MODEL_LEN // chosen["block size"])
    blocks = {"num_gpu_blocks_override": longest + 4} if chosen["cache"] == "tight" else {}
    mine = slice(row * PER_ENGINE, (row + 1) * PER_ENGINE)
    with engine(
        target,
        {"method": "sdfp", "model": plan},
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=chosen["prefix caching"],
        max_num_batched_tokens=chosen["token budget"],
        max_num_seqs=chosen["seats"],
        block_size=chosen["block size"],
        **blocks,
    ) as llm:
        assert_identical(generate(llm, many[mine], lengths(row)), plain[mine])
        counters = spec_counters(llm)
        assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]
        if chosen["cache"] == "ample":
            assert (metric(llm, "prefix_cache_hits") > 0) == chosen["prefix caching"]
        elif chosen["block size"] == 32:
            assert metric(llm, "num_preemptions") > 0
