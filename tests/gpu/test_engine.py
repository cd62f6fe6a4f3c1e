"""SDFP in the V2 runner on a GPU: greedy text is plain vLLM's, eagerly and through CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.engines import engine, runner, spec_counters, tokens
from tests.support.fixtures import kept, plan, prompts, target  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_greedy_text_is_plain_vllms(target: Path, plan: str, prompts: list[list[int]], eager: bool):  # noqa: F811
    with engine(target, enforce_eager=eager) as llm:
        expected = tokens(llm, prompts)
    with engine(target, {"method": "sdfp", "model": plan}, enforce_eager=eager) as llm:
        speculator = runner(llm).speculator
        assert type(speculator).__name__ == "SdfpSpeculator"
        assert eager or speculator.decode_cudagraph_manager.graphs
        for batch in (1, 8):
            assert tokens(llm, prompts, batch=batch) == expected
        assert spec_counters(llm)["num_accepted_tokens"] > len(prompts)
