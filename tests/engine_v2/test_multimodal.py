"""Models that take images on the V2 runner: greedy text is plain vLLM's on the same runner, and drafts know their positions."""

from __future__ import annotations

from typing import Any

import pytest

from sdfp_vllm.engine.v2.positions import RotaryPositions
from tests.support import vision
from tests.support.engines import assert_identical, engine, metric, runner, spec_counters, write_plan
from tests.support.media_requests import video_requests
from tests.support.tiny_multimodal import TINY, mixed_requests, saver

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not vision.usable(), reason="no torchvision; `make` installs packaging/vision.txt"),
]

LENGTH = 12  # tokens an answer: the interpreter decodes about 40 tokens a second
LAYERS = 4
SETTINGS: dict[str, Any] = dict(
    block_size=32,
    max_model_len=384,
    limit_mm_per_prompt={"image": 4, "video": 0},
    skip_mm_profiling=True,  # with the largest image that a processor takes
)
KINDS = [pytest.param(kind, marks=[] if kind == "qwen2_vl" else pytest.mark.slow) for kind in TINY]


def answers(llm: Any, requests: list[dict[str, Any]]) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    chunk: Any = requests
    return [list(r.outputs[0].token_ids) for r in llm.generate(chunk, sampling, use_tqdm=False)]


def accepted(llm: Any) -> float:
    counters = spec_counters(llm)
    return counters["num_accepted_tokens"] / counters["num_draft_tokens"]


@pytest.fixture(scope="module", name="saved")
def _saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens_and_full_acceptance(kind, saved, tmp_path, monkeypatch):
    """One engine that drafts with all layers: in one batch, in chunks that cut images, over a prefix cache."""
    model, requests = saved(kind), mixed_requests(kind)[:6]
    everything = write_plan(model, tmp_path / "all", range(LAYERS), k=3)
    with engine(model, **SETTINGS) as llm:
        assert type(runner(llm)).__module__ == "vllm.v1.worker.cpu.model_runner"
        want = answers(llm, requests)
    with engine(
        model, {"method": "sdfp", "model": everything}, **SETTINGS, max_num_batched_tokens=16, max_num_seqs=4
    ) as llm:
        assert type(runner(llm).speculator).__name__ == "SdfpSpeculator"
        assert_identical(answers(llm, requests), want)
        assert_identical(answers(llm, requests), want)
        assert metric(llm, "prefix_cache_hits") > 0
        assert accepted(llm) >= 0.97


@pytest.mark.slow
def test_some_layers_and_a_cache_too_small(saved, tmp_path):
    model, requests = saved("qwen2_vl"), mixed_requests("qwen2_vl")
    some = write_plan(model, tmp_path / "some", [0, 3], k=3)
    with engine(model, **SETTINGS) as llm:
        want = answers(llm, requests)
    tight = SETTINGS | dict(num_gpu_blocks_override=9, max_model_len=224, max_num_seqs=4)
    with engine(model, {"method": "sdfp", "model": some}, **tight) as llm:
        assert_identical(answers(llm, requests), want)
        assert 0 < spec_counters(llm)["num_accepted_tokens"] < spec_counters(llm)["num_draft_tokens"]
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.slow
def test_a_wrong_delta_would_show(saved, tmp_path, monkeypatch):
    model = saved("qwen2_vl")
    requests = [r for r in mixed_requests("qwen2_vl") if "multi_modal_data" in r]
    everything = write_plan(model, tmp_path / "all", range(LAYERS), k=3)
    monkeypatch.setattr(RotaryPositions, "begin", lambda self, rope_state, idx_mapping: None)
    with engine(model, {"method": "sdfp", "model": everything}, **SETTINGS) as llm:
        answers(llm, requests)
        assert accepted(llm) < 0.9


@pytest.mark.slow
def test_videos(saved, tmp_path):
    """Videos beside an image and text, in chunks that cut them, and over a prefix cache."""
    model, requests = saved("qwen2_vl"), video_requests("qwen2_vl")[:6]
    everything = write_plan(model, tmp_path / "all", range(LAYERS), k=3)
    filmed = SETTINGS | dict(limit_mm_per_prompt={"image": 1, "video": 2})
    with engine(model, **filmed) as llm:
        want = answers(llm, requests)
    tight = filmed | dict(max_num_batched_tokens=16, max_num_seqs=4)
    with engine(model, {"method": "sdfp", "model": everything}, **tight) as llm:
        assert_identical(answers(llm, requests) + answers(llm, requests), want * 2)
        assert metric(llm, "prefix_cache_hits") > 0
        assert accepted(llm) >= 0.97
