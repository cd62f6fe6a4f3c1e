"""Which model families SDFP has been tried with, and how a draft runs their layers in the engine.

One list for both sides: `sdfp plan` refuses what is not on it before any weight is loaded, and the engine asks it how
to reach a target's layers. `docs/use/compatibility.md` is this table for users, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "layers": one by one, as layer(positions, hidden, residual) -> (hidden, residual), which bridges and single branches need.
# "forward": by the decoder's own forward over fewer layers, whatever it does around and between them.
Call = Literal["layers", "forward"]


@dataclass(frozen=True)
class Family:
    """What is known of an architecture.

    Attributes:
        name: As its authors call it.
        call: How a draft runs its layers.
        branches: Whether one residual branch of a layer can run without the other: `input_layernorm` feeds attention,
            `post_attention_layernorm` the MLP, and nothing else touches the residual stream.
    """

    name: str
    call: Call = "layers"
    branches: bool = False


# By the name in `architectures` of a checkpoint's config.json.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("Llama", branches=True),
    "MistralForCausalLM": Family("Mistral", branches=True),
    "MixtralForCausalLM": Family("Mixtral", branches=True),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", branches=True),
    "Qwen3ForCausalLM": Family("Qwen3", branches=True),
    "Qwen3MoeForCausalLM": Family("Qwen3 MoE", branches=True),
    "Ernie4_5ForCausalLM": Family("ERNIE 4.5"),
    "GemmaForCausalLM": Family("Gemma"),
    "Gemma2ForCausalLM": Family("Gemma 2"),
    "Gemma3ForCausalLM": Family("Gemma 3 (text)"),
    "NemotronForCausalLM": Family("Nemotron"),
    "OlmoeForCausalLM": Family("OLMoE"),
    "Phi3ForCausalLM": Family("Phi-3, Phi-4"),
    "Qwen2MoeForCausalLM": Family("Qwen2 MoE"),
    "ArceeForCausalLM": Family("Arcee", "forward"),
    "GlmForCausalLM": Family("GLM-4", "forward"),
    "GptOssForCausalLM": Family("gpt-oss", "forward"),
    "GraniteForCausalLM": Family("Granite", "forward"),
    "HunYuanDenseV1ForCausalLM": Family("HunYuan dense", "forward"),
    "SeedOssForCausalLM": Family("Seed-OSS", "forward"),
    "SmolLM3ForCausalLM": Family("SmolLM3", "forward"),
    "StableLmForCausalLM": Family("StableLM", "forward"),
    "Starcoder2ForCausalLM": Family("StarCoder2", "forward"),
}

# Models that take images as well: a text decoder behind an encoder. Drafts run the decoder, on text alone.
# `docs/use/multimodal.md` is this table for users.
MULTIMODAL: dict[str, Family] = {
    "Qwen2VLForConditionalGeneration": Family("Qwen2-VL", branches=True),
    "Qwen2_5_VLForConditionalGeneration": Family("Qwen2.5-VL", branches=True),
    "Qwen3VLForConditionalGeneration": Family("Qwen3-VL", branches=True),
    "LlavaForConditionalGeneration": Family("LLaVA 1.5", branches=True),
    "Idefics3ForConditionalGeneration": Family("Idefics3", branches=True),
    "SmolVLMForConditionalGeneration": Family("SmolVLM", branches=True),
    "Gemma3ForConditionalGeneration": Family("Gemma 3"),
    "InternVLForConditionalGeneration": Family("InternVL", branches=True),
}

SUBLAYER_ARCHITECTURES = frozenset(
    name for name, family in (FAMILIES | MULTIMODAL).items() if family.branches
)


def family_of(architecture: str) -> Family | None:
    """What is known of an architecture, of either list; None where it was not tried."""
    return FAMILIES.get(architecture) or MULTIMODAL.get(architecture)
