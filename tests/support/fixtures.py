"""Fixtures of the tests that start engines: the target, a plan for it, prompts and plain vLLM's answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import toy
from tests.support.engines import engine, tokens, write_plan

DEMO_MODEL = toy.MODEL


@pytest.fixture(scope="session")
def target() -> Path:
    """The toy target as trained: 16 layers, not cost-scaled."""
    return DEMO_MODEL


@pytest.fixture(scope="session")
def kept(target: Path) -> list[int]:
    """A keep set whose drafts are often right and often wrong: both paths get used."""
    from sdfp_vllm.plan.fingerprint import fingerprint

    last = fingerprint(target).num_layers - 1
    return [0, last // 3, last]


@pytest.fixture(scope="session")
def plan(target: Path, kept: list[int], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_plan(target, tmp_path_factory.mktemp("plan"), kept, k=3)


def source_prompts(target: Path, count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of 1 to `longest` tokens of Python source."""
    import inspect

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer.encode("".join(inspect.getsource(m) for m in (random, inspect)))
    rng = random.Random(seed)
    return [
        ids[start : start + length]
        for start, length in (
            (rng.randrange(len(ids) - longest), rng.randint(1, longest)) for _ in range(count)
        )
    ]


@pytest.fixture(scope="session")
def prompts(target: Path) -> list[list[int]]:
    return source_prompts(target, 64, 200)


@pytest.fixture(scope="session")
def plain_tokens(target: Path, prompts: list[list[int]]) -> list[list[list[int]]]:
    """Plain vLLM's greedy answers to `prompts`: 32 tokens each."""
    with engine(target) as llm:
        return tokens(llm, prompts)
