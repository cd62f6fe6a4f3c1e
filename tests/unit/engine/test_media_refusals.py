"""Models that take images: families that were tried are let through, all else is refused at start-up by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdfp_vllm.engine import refusals
from sdfp_vllm.engine.refusals import refuse_unsupported
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.families import MULTIMODAL

PARALLEL = SimpleNamespace(pipeline_parallel_size=1)


def model(architecture: str, prunes: bool = False, **fields: Any) -> SimpleNamespace:
    config = SimpleNamespace(is_multimodal_pruning_enabled=lambda: prunes)
    known = dict(
        model="a folder",
        is_multimodal_model=True,
        uses_mrope=False,
        architecture=architecture,
        multimodal_config=config,
    )
    return SimpleNamespace(**(known | fields))


def refused(served: SimpleNamespace, **args: Any) -> SdfpError:
    with pytest.raises(SdfpError) as caught:
        refuse_unsupported(SimpleNamespace(**args), served, PARALLEL)
    return caught.value


@pytest.mark.parametrize("architecture", MULTIMODAL)
def test_a_family_that_was_tried_is_taken(architecture):
    refuse_unsupported(SimpleNamespace(), model(architecture), PARALLEL)


@pytest.mark.parametrize(
    "served",
    [
        model("PaliGemmaForConditionalGeneration"),
        model("TransformersMultiModalForCausalLM"),  # --model-impl transformers, of any family
        model("Qwen2AudioForConditionalGeneration"),
        model("LlamaForCausalLM", is_multimodal_model=False, uses_mrope=True),
    ],
    ids=lambda served: served.architecture,
)
def test_another_family_is_refused(served):
    error = refused(served)
    assert error.where == "model" and "docs/use/multimodal.md" in error.what
    assert error.way_out == "Serve it without SDFP."


def test_an_encoder_decoder_is_refused_as_one():
    error = refused(model("WhisperForConditionalGeneration", is_encoder_decoder=True))
    assert "encoder-decoder" in error.what


def test_what_was_not_tried_with_images_is_refused(monkeypatch):
    taken = next(iter(MULTIMODAL))
    assert refused(model(taken, prunes=True)).where == "--video-pruning-rate"
    assert refused(model(taken), enable_lora=True).where == "--enable-lora"
    monkeypatch.setattr(refusals, "minor", lambda: (0, 31))
    assert "since vLLM 0.32" in refused(model(taken)).what
