"""LoRA adapters for tests: random ones in peft's file layout, and requests that use them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8


def write_adapter(
    model: Path,
    folder: Path,
    seed: int,
    strength: float = 0.3,
    modules: Iterable[str] = LINEARS,
    head: float = 0.0,
    embedding: float = 0.0,
    rank: int = RANK,
) -> str:
    """Writes a random adapter of a checkpoint in one safetensors file; returns its folder.

    Args:
        strength: Size of each linear's change, B A, as a part of its weight's (Frobenius norms).
        modules: Linears that are changed, in every layer.
        head, embedding: The same for the two; 0 leaves one out.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def change(name: str, weight: torch.Tensor, size: float) -> None:
        n, k = weight.shape
        a, b = torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)
        b *= size * weight.float().norm() / (b @ a).norm()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b

    with safe_open(model / "model.safetensors", "pt") as weights:
        for name in sorted(weights.keys()):
            if name.split(".")[-2] in modules and name.endswith(".weight"):
                change(name.removesuffix(".weight"), weights.get_tensor(name), strength)
        table = weights.get_tensor("model.embed_tokens.weight")
    if head:
        change("lm_head", table, head)
    if embedding:  # here A is looked up, [rank, vocabulary], and B maps to hidden states
        change("model.embed_tokens", table.t(), embedding)
        for old, new in (("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")):
            name = "base_model.model.model.embed_tokens."
            tensors[name + new] = tensors.pop(name + old)
    folder.mkdir(parents=True, exist_ok=True)
    changed = [*modules, *(["lm_head"] if head else []), *(["embed_tokens"] if embedding else [])]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": changed, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return str(folder)


def adapter(name: str, number: int, folder: str, **more: Any) -> Any:
    """What a request names its adapter with."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, folder, **more)


def plain_answers(
    llm: Any, prompts: Sequence[Sequence[int]], adapters: Sequence[Any], **common: Any
) -> list[list[int]]:
    """Plain vLLM's answers to prompt i with adapter i (None: the base model) in turn, each adapter's in batches of its own.

    The base model's come first: while adapters are loaded, plain vLLM 0.32.0 on a CPU may run its requests with one
    (`sdfp_vllm/engine/draft/adapter_rows.py`).
    """
    count = len(adapters)
    out: list[list[int]] = [[] for _ in prompts]
    for at in sorted(range(count), key=lambda i: adapters[i] is not None):
        out[at::count] = adapted_tokens(llm, prompts[at::count], [adapters[at]], **common)
    return out


def adapted_tokens(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Any],
    batch: int | None = None,
    params: Sequence[dict[str, Any]] = ({},),
    **common: Any,
) -> list[list[int]]:
    """Greedy answers, 16 tokens each unless told otherwise, to prompt i with adapter i (None: the base model) in turn.

    Args:
        batch: Prompts at a time.
        params: Sampling parameters of prompt i, in turn.
    """
    from vllm import SamplingParams

    settings: dict[str, Any] = dict(temperature=0.0, max_tokens=16, ignore_eos=True) | common
    out: list[list[int]] = []
    step = batch or len(prompts)
    for start in range(0, len(prompts), step):
        numbers = range(start, min(start + step, len(prompts)))
        done = llm.generate(
            [{"prompt_token_ids": list(prompts[i])} for i in numbers],
            [SamplingParams(**{**settings, **params[i % len(params)]}) for i in numbers],
            lora_request=[adapters[i % len(adapters)] for i in numbers],
            use_tqdm=False,
        )
        out += [list(o.outputs[0].token_ids) for o in done]
    return out
