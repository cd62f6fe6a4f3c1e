"""Trains the toy captioner on a CPU, in about a quarter of an hour, and writes it as a checkpoint that vLLM serves.

    python -m benchmarks.captioner FOLDER [--language-steps 160] [--minutes M]

It is a toy: SmolLM2-135M-Instruct with a tower of 0.7 million parameters, which knows pictures of one to five of scikit-learn's
handwritten digits in nine places, and answers questions of four kinds about them. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.captioner.checkpoint import describe, load_tokenizer, save, untrained
from benchmarks.captioner.language import plain_chats, train_language
from benchmarks.captioner.tower import train_tower
from sdfp_vllm.common.provenance import weights_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the checkpoint, which is made")
    parser.add_argument("--language-model", type=Path, help="a folder; default: the demo's SmolLM2")
    parser.add_argument("--tower-steps", type=int, default=2000)
    parser.add_argument("--language-steps", type=int, default=160, help="most")
    parser.add_argument("--minutes", type=float, default=math.inf, help="most, for the language model")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(describe(train(**vars(asked))))


def train(
    folder: Path,
    language_model: Path | None = None,
    *,
    tower_steps: int,
    language_steps: int,
    minutes: float,
    rate: float,
    seed: int,
) -> Path:
    """Both stages, then the checkpoint; returns its folder."""
    from transformers import AutoModelForCausalLM

    from sdfp_vllm.demo.smollm2 import smollm2

    source = language_model or smollm2()
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(source)
    decoder: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = untrained(decoder, tokenizer)
    chats = plain_chats(decoder, tokenizer)
    began = time.monotonic()
    read = train_tower(model, tokenizer, tower_steps, seed)
    print(f"tower: {time.monotonic() - began:.0f} s, {read:.1%} of held-out places read right")
    began = time.monotonic()
    steps = train_language(
        model, tokenizer, chats, steps=language_steps, seed=seed, rate=rate, seconds=60 * minutes
    )
    print(f"language: {steps} steps, {time.monotonic() - began:.0f} s")
    made = (
        f"toy captioner on {weights_of(str(source), source)}: tower and projector trained for {tower_steps} steps, decoder and "
        f"projector for {steps}, seed {seed}, by benchmarks.captioner"
    )
    save(model, tokenizer, folder, made)
    return folder


if __name__ == "__main__":
    main()
