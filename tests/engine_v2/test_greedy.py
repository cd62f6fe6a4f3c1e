"""Greedy text on the V2 runner is plain vLLM's on the same runner, token for token, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, runner, spec_counters, tokens
from tests.support.stepping import Arrival, play

pytestmark = pytest.mark.engine

LENGTH = 20  # tokens a prompt: the interpreter decodes about 40 tokens a second


@pytest.fixture(scope="module")
def some(prompts: list[list[int]]) -> list[list[int]]:
    return [p[:70] for p in prompts[:8]]


@pytest.fixture(scope="module")
def expected(target: Path, some: list[list[int]]) -> list[list[list[int]]]:
    with engine(target) as llm:
        assert type(runner(llm)).__module__ == "vllm.v1.worker.cpu.model_runner"
        return tokens(llm, some, max_tokens=LENGTH)


def test_same_text_at_every_batch_size_and_as_requests_come_and_go(
    target: Path, plan: str, some: list[list[int]], expected: list[list[list[int]]]
):
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        assert type(runner(llm).speculator).__name__ == "SdfpSpeculator"
        for batch in (1, 3, 8):
            assert tokens(llm, some, batch=batch, max_tokens=LENGTH) == expected
        counters = spec_counters(llm)
        assert counters["num_accepted_tokens"] > 3 * len(some), "drafts hardly ever accepted: a wrong draft"
        assert counters["num_accepted_tokens"] < counters["num_draft_tokens"], "nothing was ever rejected"
        arrivals = [
            Arrival(
                str(i), prompt, step=2 * i, abort_after=5 if i == 3 else None, params={"max_tokens": LENGTH}
            )
            for i, prompt in enumerate(some)
        ]
        answers = play(llm, arrivals)
    for i, want in enumerate(expected):
        assert answers[str(i)] == want[0][: len(answers[str(i)])]
        assert i == 3 or len(answers[str(i)]) == LENGTH


# Longest prompt, and settings.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    # Chunks smaller than most prompts: requests that sample nothing in a step are not drafted for.
    "chunked prefill": (70, dict(max_num_batched_tokens=16)),
    # 6 requests begin with a block of 32 tokens each and grow into a second; there are 7.
    "preemption": (26, dict(num_gpu_blocks_override=8, block_size=32, max_model_len=96)),
    "no prefix caching": (40, dict(enable_prefix_caching=False)),
    # Drafts up to the last position there is, and past it.
    "up to max_model_len": (70, dict(max_model_len=80)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_text_under(target: Path, plan: str, some: list[list[int]], name: str):
    longest, settings = SETTINGS[name]

    def run(speculative: dict[str, Any] | None) -> list[list[list[int]]]:
        with engine(target, speculative, **settings) as llm:
            out = tokens(llm, [p[:longest] for p in some[:6]], max_tokens=LENGTH)
            preempted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
            assert bool(preempted) == (name == "preemption")
            return out

    assert run({"method": "sdfp", "model": plan}) == run(None)


def test_draft_length_by_batch_size_down_to_none(
    target: Path, plan: str, some: list[list[int]], expected: list[list[list[int]]]
):
    table = [[1, 1, 3], [2, 3, 1], [4, 8, 0]]
    settings = {"method": "sdfp", "model": plan, "num_speculative_tokens_per_batch_size": table}
    with engine(target, settings) as llm:
        for batch, k in ((1, 3), (3, 1), (8, 0)):
            asked: list[int] = []
            speculator = runner(llm).speculator
            propose = speculator.propose

            def spy(*args: Any, asked: list[int] = asked, propose: Any = propose, **kwargs: Any) -> Any:
                asked.append(kwargs["num_speculative_tokens"])
                return propose(*args, **kwargs)

            speculator.propose = spy
            assert tokens(llm, some[:batch], max_tokens=LENGTH) == expected[:batch]
            speculator.propose = propose
            assert k in asked
