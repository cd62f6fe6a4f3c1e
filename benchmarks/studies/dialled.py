"""Checkpoints of any shape with random weights, whose drafts are accepted as often as one dial says.

Speed depends on shapes alone, so random weights time a model as well as trained ones do; but a draft of a
random model is never right. Here the branches of the layers that a plan drops are scaled: with `scale` 0 they
add nothing, skipping them changes nothing, and every draft is accepted; towards 1 acceptance falls.
A workload made so is synthetic: say so beside every number that comes from one.

    python -m benchmarks.studies.dialled FOLDER --shape qwen3-0.6b --keep 0 9 18 27 --scale 0.1

How the weights are drawn, and why:

* a matrix has entries of variance 1 / fan-in, so that each kept branch is about as large as any other;
* o_proj and down_proj of a dropped layer are multiplied by `scale`;
* the embedding is small beside the branches (0.02), for with a tied head a token would else predict itself;
* the head's row of token t is proportional to (1 + t / 256) ** -`skew`. The greedy token of a random model
  is uniform over its vocabulary, text is not: low ids are common here, as in a byte-pair vocabulary;
* logits have a standard deviation of `LOGIT_STD` for the commonest token, set by the final norm, which
  gives the next token a distribution as peaked as a language model's. Greedy output does not depend on it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.toy.scaled import PACKAGED

# Shapes of public models, as their config.json has them.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        max_position_embeddings=40960, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama-3.2-1b": dict(
        model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
        max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
}  # fmt: skip
EMBEDDING = 0.02
LOGIT_STD = 8.0
_COMMON = 256  # token ids that are about equally common
_MARK = "dialled.json"


def dialled(
    folder: Path,
    shape: str | dict[str, Any],
    keep: Sequence[int],
    scale: float,
    *,
    skew: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: bool = True,
) -> Path:
    """Writes a random checkpoint to `folder`, unless it lies there already, and returns `folder`.

    Args:
        shape: A name in SHAPES, or a config's fields with its `model_type`: any dense causal LM of
            transformers whose layers end their branches in o_proj and down_proj.
        keep: Layers at full strength, those that will draft. All others are scaled.
        scale: 0 (every draft accepted) to 1 (a dropped layer matters as much as a kept one); with 4 of 28 layers
            kept, 0.03 gives an acceptance of some 0.75 for the first draft token, 0.1 some 0.4.
        skew: 0 for a vocabulary of equally common tokens; about 0.07 makes a quarter of the ids some 95 % of
            the greedy output.
        seed: Same arguments, same weights. A tensor's random numbers depend on the seed and its name
            alone, so that models that differ in `keep` or `scale` have the same ones.
        dtype: Of the weights written. They are drawn in float32; memory is that of the weights.
        tokenizer: Adds the demo model's tokenizer, so that prompts can be text; its vocabulary is 2,048
            tokens, all other ids have no text, and its end-of-text token is an ordinary token here:
            generate with `ignore_eos`. Without it vLLM needs `skip_tokenizer_init` and prompts of ids.
    """
    fields = SHAPES[shape] if isinstance(shape, str) else dict(shape)
    made = dict(
        shape=fields, keep=sorted(keep), scale=scale, skew=skew, seed=seed,
        dtype=str(dtype).removeprefix("torch."), tokenizer=tokenizer,
    )  # fmt: skip
    folder = Path(folder)
    if (folder / _MARK).is_file() and json.loads((folder / _MARK).read_text()) == made:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        config = CONFIG_MAPPING[fields["model_type"]](
            **{k: v for k, v in fields.items() if k != "model_type"}
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        config.architectures, config.dtype = [type(model).__name__], dtype
        config.save_pretrained(part)
        weights = {
            name: _draw(name, tuple(p.shape), set(keep), scale, skew, seed).to(dtype)
            for name, p in model.named_parameters()
        }
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        if tokenizer:
            for file in (PACKAGED / "model").glob("tokenizer*"):
                shutil.copy2(file, part)
        (part / _MARK).write_text(json.dumps(made, indent=1) + "\n")
        part.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)  # made with other arguments
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _draw(name: str, shape: tuple[int, ...], keep: set[int], scale: float, skew: float, seed: int) -> Tensor:
    """The float32 tensor of this parameter."""
    if len(shape) == 1:
        sharpen = name.endswith("model.norm.weight")
        value = LOGIT_STD / (EMBEDDING * math.sqrt(shape[0])) if sharpen else 1.0
        return torch.full(shape, value if not name.endswith(".bias") else 0.0)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    drawn = torch.randn(shape, generator=generator)
    if "embed_tokens" in name or "lm_head" in name:
        commonness = (1 + torch.arange(shape[0]) / _COMMON) ** -skew
        return drawn.mul_(EMBEDDING * commonness[:, None])
    drawn.mul_(shape[1] ** -0.5)
    if name.endswith(("o_proj.weight", "down_proj.weight")) and _layer(name) not in keep:
        drawn.mul_(scale)
    return drawn


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--keep", type=int, nargs="+", required=True)
    parser.add_argument("--scale", type=float, required=True)
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    asked = parser.parse_args()
    dialled(
        asked.folder, asked.shape, asked.keep, asked.scale,
        skew=asked.skew, seed=asked.seed, dtype=getattr(torch, asked.dtype),
    )  # fmt: skip


if __name__ == "__main__":
    main()
