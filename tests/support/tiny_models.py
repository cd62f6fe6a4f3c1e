"""Tiny random targets of every supported architecture, float32, milliseconds to run."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 61
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Windows shorter than the test sequences, and layer types that alternate, so that a mask or a
# rotary embedding taken from the wrong layer index changes the logits.
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 3}
_OWN: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": _MIXED | {"use_sliding_window": True},
    "qwen3": _MIXED | {"use_sliding_window": True},
    "gemma3_text": _MIXED | {"query_pre_attn_scalar": 4, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "decoder_sparse_step": 2,
    },
    # Multipliers far enough from 1 that a draft which leaves one out is another model.
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False},
    "gpt_oss": _MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ARCHITECTURES = sorted(_OWN)
# gpt-oss's MLP returns its router's scores as well; it drafts with whole layers only.
LONE_BRANCHES = [a for a in ARCHITECTURES if a != "gpt_oss"]
# Those that every run of the tests starts engines for; the others have theirs in `make test-all`.
IN_ENGINE = [a for a in ARCHITECTURES if a != "gpt_oss"]
# With these they are all of `plan/families.py`.
_OWN |= {
    "arcee": {},
    "ernie4_5": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": _MIXED | {"query_pre_attn_scalar": 4, "tie_word_embeddings": True},
    "glm": {"partial_rotary_factor": 0.5},
    "hunyuan_v1_dense": {},
    "nemotron": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": None},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "decoder_sparse_step": 1,
    },
    "seed_oss": {},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": None},
}
ALL_ARCHITECTURES = sorted(_OWN)


def tiny_config(architecture: str, **changes) -> PretrainedConfig:
    return CONFIG_MAPPING[architecture](**(_SHAPE | _OWN[architecture] | changes))


def tiny_model(architecture: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random model in eval mode; weights are large enough that every layer matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tiny_ids(sequences: int = 3, length: int = 10, seed: int = 1) -> torch.Tensor:
    """Random token ids [sequences, length], int64."""
    return torch.randint(3, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))
