"""Drafts of models that take images: tiny random checkpoints on the real engine, greedy text against plain vLLM's.

Drafts are fed text alone, so a position that is wrong behind an image costs no exactness and much acceptance: a draft with
every layer at full precision must be accepted always, and one test breaks the positions to see that this would show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sdfp_vllm.engine.draft.rounded_linear import refusal
from sdfp_vllm.engine.draft.twins import copies_of
from sdfp_vllm.engine.v1 import pacer as pacer_module
from sdfp_vllm.engine.v1.positions import RotaryPositions
from sdfp_vllm.pacing.ngram import NO_TEXT
from sdfp_vllm.plan.families import MULTIMODAL
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import BRANCHES, DraftView
from tests.support import vision
from tests.support.engines import (
    assert_identical,
    engine,
    metric,
    pacing_by_hand,
    runner,
    spec_counters,
    write_plan,
)
from tests.support.media_requests import many_requests, video_requests
from tests.support.tiny_multimodal import (
    TINY,
    mixed_requests,
    pictures,
    repeated,
    saver,
    token_id,
)

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not vision.usable(), reason="no torchvision; `make` installs packaging/vision.txt"),
]

LENGTH = 24
SETTINGS: dict[str, Any] = dict(
    block_size=32,
    max_model_len=384,
    limit_mm_per_prompt={"image": 4, "video": 0},
    skip_mm_profiling=True,  # with the largest image that a processor takes
)
LAYERS = 4
FILMED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def kinds(every: tuple[str, ...], more: tuple[str, ...] = (), of: tuple[str, ...] = tuple(TINY)) -> list[Any]:
    """Parameters: the kinds that every run of the tests starts engines for, those of `make test-more`, and the others."""
    return [
        pytest.param(k, marks=[] if k in every else pytest.mark.more if k in more else pytest.mark.slow)
        for k in of
    ]


def answers(
    llm: Any, requests: list[dict[str, Any]], batch: int | None = None, **params: Any
) -> list[list[int]]:
    """Greedy answers, token ids of each, `batch` requests at a time."""
    from vllm import SamplingParams

    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": LENGTH, "ignore_eos": True, **params})
    out: list[list[int]] = []
    for i in range(0, len(requests), batch or len(requests)):
        chunk: Any = requests[i : i + (batch or len(requests))]
        out += [list(r.outputs[0].token_ids) for r in llm.generate(chunk, sampling, use_tqdm=False)]
    return out


def accepted(llm: Any) -> float:
    """The share of draft tokens that were accepted."""
    counters = spec_counters(llm)
    return counters["num_accepted_tokens"] / counters["num_draft_tokens"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Any:
    return saver(tmp_path_factory.mktemp)


# One with M-RoPE and features beside the embedding, one whose decoder is reached another way.
@pytest.mark.parametrize(
    "kind", kinds(("qwen3_vl", "idefics3"), more=("qwen2_vl", "llava", "gemma3", "internvl"))
)
def test_same_tokens_and_full_acceptance(kind, models, tmp_path):
    """Requests with and without images in one batch, alone, and again over a prefix cache that holds their images."""
    model, requests = models(kind), mixed_requests(kind)
    assert fingerprint(model).architecture in MULTIMODAL
    long = repeated(requests, "What follows was asked before, word for word. ")
    with engine(model, **SETTINGS) as llm:
        want, want_long = answers(llm, requests), answers(llm, long)
    assert len({tuple(w) for w in want}) == len(want), "images that do not matter show nothing"
    # Some of the branches alone where the family allows it, and some of them rounded where the machine does.
    family, rounded = (
        MULTIMODAL[fingerprint(model).architecture],
        refusal("int8", torch.float32, 64, 64) is None,
    )
    kept = KeepSet(layers=(0, 3), attention=(1,), mlp=(2,)) if family.branches else KeepSet((0, 3))
    view = DraftView.at(kept, {(b, 3): "int8" for b in BRANCHES}) if rounded else kept
    some = write_plan(model, tmp_path / "some", view, k=3)
    with engine(model, {"method": "sdfp", "model": some}, **SETTINGS) as llm:
        assert_identical(answers(llm, requests), want)
        assert 0 < spec_counters(llm)["num_accepted_tokens"] < spec_counters(llm)["num_draft_tokens"]
        assert (copies_of(runner(llm).drafter.model) > 0) == rounded
    everything = write_plan(model, tmp_path / "all", range(LAYERS), k=3)
    with engine(model, {"method": "sdfp", "model": everything}, **SETTINGS) as llm:
        assert_identical(answers(llm, requests), want)
        assert_identical(answers(llm, requests, batch=1), want)
        assert_identical(answers(llm, long) + answers(llm, long), want_long * 2)
        assert metric(llm, "prefix_cache_hits") > 0
        assert accepted(llm) >= 0.97


@pytest.mark.parametrize("kind", kinds(("qwen3_vl",), more=("gemma3",)))
def test_in_chunks_that_cut_images_and_with_a_cache_too_small(kind, models, tmp_path):
    """Prefill in chunks smaller than an image; requests are thrown out in mid-answer and computed again."""
    model, requests = models(kind), mixed_requests(kind)
    everything = write_plan(model, tmp_path / "all", range(LAYERS), k=3)
    with engine(model, **SETTINGS) as llm:
        want = answers(llm, requests, max_tokens=60)
    # A request of the longest length takes 8 blocks, and another is vLLM's own; Gemma 3's two kinds of layers take twice that.
    blocks = 18 if kind == "gemma3" else 10
    tight = SETTINGS | dict(
        max_num_batched_tokens=16, max_num_seqs=4, max_model_len=256, num_gpu_blocks_override=blocks
    )
    with engine(model, {"method": "sdfp", "model": everything}, **tight) as llm:
        assert_identical(answers(llm, requests, max_tokens=60), want)
        assert metric(llm, "num_preemptions") > 0
        assert accepted(llm) >= 0.97


@pytest.mark.parametrize(
    "kind", kinds(("qwen3_vl",), more=("qwen2_vl",), of=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
)
def test_a_wrong_delta_would_show(kind, models, tmp_path, monkeypatch):
    """The power of the tests above: positions without the request's delta are as exact, and accepted less."""
    model, requests = models(kind), mixed_requests(kind)
    requests = [r for r in requests if "multi_modal_data" in r]
    everything = write_plan(model, tmp_path / "all", range(LAYERS), k=3)
    monkeypatch.setattr(RotaryPositions, "begin", lambda self, requests, names: None)
    with engine(model, {"method": "sdfp", "model": everything}, **SETTINGS) as llm:
        wrong = answers(llm, requests)
        share = accepted(llm)
        monkeypatch.undo()
        assert_identical(answers(llm, requests), wrong)
    assert share < 0.9


@pytest.mark.parametrize("kind", kinds(("idefics3",), of=("qwen2_vl", "llava", "idefics3")))
def test_copies_take_no_token_of_an_image(kind, models, tmp_path, monkeypatch):
    """Pictures that a prompt shows twice: what stands between their tokens is text, they are not."""
    model, image = models(kind), TINY[kind].image
    # Every request brings its text twice, with an image behind both.
    requests = [
        {"prompt": f"{text} {image} {text} {image}x", "multi_modal_data": {"image": [a, b]}}
        for text, a, b in zip(("one two three", "abcabcabc"), pictures(2), pictures(2, seed=1), strict=True)
    ]
    paced = write_plan(model, tmp_path / "paced", [0, 3], k=3, pacing=pacing_by_hand())
    with engine(model, **SETTINGS) as llm:
        want = answers(llm, requests, max_tokens=48)
    seen: list[np.ndarray] = []
    found = 0
    find = pacer_module.latest_longest_match

    def watched(context: np.ndarray, most: int, *args: Any) -> Any:
        nonlocal found
        seen.append(context)
        match = find(context, most, *args)
        found += match is not None
        assert match is None or NO_TEXT not in match.tokens
        return match

    monkeypatch.setattr(pacer_module, "latest_longest_match", watched)
    with engine(model, {"method": "sdfp", "model": paced}, **SETTINGS) as llm:
        assert_identical(answers(llm, requests, max_tokens=48), want)
        assert found and runner(llm).drafter.pacer.tally.model_drafts > 0
    assert seen and all((context == NO_TEXT).any() for context in seen)
    assert all(token_id(TINY[kind].embedded) not in context[:-48] for context in seen)


@pytest.mark.parametrize("kind", ["qwen2_vl", "idefics3"])
def test_two_hundred_mixed_requests(kind, models, tmp_path):
    """One call of 200 requests, no two alike: batches of 32 that are never the same, prompts cut anywhere."""
    model, requests = models(kind), many_requests(kind, 200)
    counts = [len(r.get("multi_modal_data", {}).get("image", [])) for r in requests]
    assert {0, 1, 2, 3} == set(counts)
    wide = SETTINGS | dict(max_num_seqs=32, max_num_batched_tokens=512)
    with engine(model, **wide) as llm:
        want = answers(llm, requests, max_tokens=8)
    assert len({tuple(w) for w in want}) > 150, "answers that are alike show little"
    some = write_plan(model, tmp_path / "some", KeepSet(layers=(0, 3), attention=(1,), mlp=(2,)), k=3)
    with engine(model, {"method": "sdfp", "model": some}, **wide) as llm:
        assert_identical(answers(llm, requests, max_tokens=8), want)
        assert 0 < spec_counters(llm)["num_accepted_tokens"] < spec_counters(llm)["num_draft_tokens"]


@pytest.mark.parametrize("kind", kinds(("qwen2_vl",), more=("qwen2_5_vl", "qwen3_vl"), of=FILMED))
def test_videos(kind, models, tmp_path, monkeypatch):
    """Videos beside images and text: their tokens have times for positions, and drafts go on behind them."""
    model, requests = models(kind), video_requests(kind)
    filmed = SETTINGS | dict(limit_mm_per_prompt={"image": 1, "video": 2})
    with engine(model, **filmed) as llm:
        want = answers(llm, requests)
    assert len({tuple(w) for w in want}) == len(want), "videos that do not matter show nothing"
    everything = write_plan(model, tmp_path / "all", range(LAYERS), k=3)
    chunked = filmed | dict(max_num_batched_tokens=16, max_num_seqs=4)
    with engine(model, {"method": "sdfp", "model": everything}, **chunked) as llm:
        assert_identical(answers(llm, requests) + answers(llm, requests), want * 2)
        assert metric(llm, "prefix_cache_hits") > 0
        assert accepted(llm) >= 0.97
    monkeypatch.setattr(RotaryPositions, "begin", lambda self, requests, names: None)
    with engine(model, {"method": "sdfp", "model": everything}, **filmed) as llm:
        assert_identical(answers(llm, requests), want)
        assert accepted(llm) < 0.9, "positions without the request's delta would show"


@pytest.mark.slow
def test_compiled(models, tmp_path):
    """The draft's graph takes rows of positions, of any number of tokens."""
    model, requests = models("qwen2_vl"), mixed_requests("qwen2_vl")
    everything = write_plan(model, tmp_path / "all", range(LAYERS), k=3)
    with engine(model, **SETTINGS) as llm:
        want = answers(llm, requests)
    with engine(model, {"method": "sdfp", "model": everything}, enforce_eager=False, **SETTINGS) as llm:
        assert_identical(answers(llm, requests) + answers(llm, requests, batch=2), want * 2)
        assert accepted(llm) >= 0.97
        assert not runner(llm).drafter.model.do_not_compile
