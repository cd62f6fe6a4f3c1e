"""Fields of a request that the V1 runner had to be mended for, on the V2 runner: plain vLLM's answers, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import engine, spec_counters

pytestmark = pytest.mark.engine

SETTINGS: dict[str, Any] = dict(
    enable_prompt_embeds=True, reasoning_config={"reasoning_start_str": "(", "reasoning_end_str": ") # done"}
)


def answers(llm: Any, prompts: list[Any], stops: list[int]) -> list[list[int]]:
    """One request with each field, and one without, all in one batch; the last prompt is of embeddings."""
    from vllm import SamplingParams

    fields: list[dict[str, Any]] = [{"thinking_token_budget": budget} for budget in (0, 2, 5)]
    fields += [{"min_tokens": least, "stop_token_ids": stops} for least in (3, 6)]
    fields += [{}, {}]
    sampling = [SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, **f) for f in fields]
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)]


def test_same_answers_or_a_refusal(target: Path, plan: str, prompts: list[list[int]]):
    from safetensors.torch import load_file
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"].float()
    asked: list[Any] = [{"prompt_token_ids": p[:40]} for p in prompts[:6]]
    asked.append({"prompt_embeds": embedding[torch.tensor(prompts[6][:40])]})
    stops = list(range(5, 100))
    with engine(target, **SETTINGS) as llm:
        expected = answers(llm, asked, stops)
    with engine(target, {"method": "sdfp", "model": plan}, **SETTINGS) as llm:
        assert answers(llm, asked, stops) == expected
        assert spec_counters(llm)["num_accepted_tokens"] > 4
        for more in ({}, {"logprobs": 3}):
            with pytest.raises(
                VLLMValidationError, match="logprob_token_ids cannot be used with SDFP on vLLM's V2"
            ):
                llm.generate(asked[:1], SamplingParams(logprob_token_ids=[5, 6, 7], **more), use_tqdm=False)
        assert answers(llm, asked, stops) == expected
