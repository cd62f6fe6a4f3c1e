"""The engines that are compared on a real model, and what each is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdfp_vllm.fit.engine_check import stored_dtype
from sdfp_vllm.measure import EngineSpec, Turn

TEMPERATURE = 0.7
DRAFT_MODEL_TOKENS = 3


@dataclass(frozen=True)
class Asked:
    """Prompts are token ids; `sampled` of them are also asked at TEMPERATURE."""

    model: Path
    prompts: list[list[int]]
    tokens: int
    batches: list[int]
    sampled: int
    dtype: str
    eager: bool

    def turns(self) -> list[Turn]:
        """A turn for each group of prompts that are asked at once."""
        turns = []
        for batch in self.batches:
            groups = [self.prompts[i : i + batch] for i in range(0, len(self.prompts), batch)]
            turns += [Turn(prompts=g, batch=batch, max_tokens=self.tokens) for g in groups if len(g) == batch]
        turns += [
            Turn(prompts=[p], max_tokens=self.tokens, temperature=TEMPERATURE)
            for p in self.prompts[: self.sampled]
        ]
        return turns


def methods_at_hand(draft: bool) -> list[str]:
    """Those that can run here; suffix decoding where the package that vLLM needs for it is installed."""
    methods = ["plain", "sdfp", "plain, own dtype", "ngram", "paper"]
    if draft:
        methods.append("draft_model")
    if find_spec("arctic_inference"):
        methods.append("suffix")
    return methods


def engine_specs(
    methods: Sequence[str], asked: Asked, plans: Mapping[str, Path], draft: str | None, k: int
) -> dict[str, EngineSpec]:
    """One engine for each method, plain first."""
    turns = asked.turns()
    speculative: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "plain, own dtype": None,
        "sdfp": {"method": "sdfp", "model": str(plans["sdfp"])},
        "paper": {"method": "sdfp", "model": str(plans["paper"]), "ngram": False},
        "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
        "draft_model": {"method": "draft_model", "model": draft, "num_speculative_tokens": DRAFT_MODEL_TOKENS},
        "suffix": {"method": "suffix", "num_speculative_tokens": 16},
    }  # fmt: skip
    longest = max(map(len, asked.prompts)) + asked.tokens
    specs = {}
    for method in methods:
        own = turns
        if method == "sdfp":  # each turn twice: without copies, then with
            own = [t.model_copy(update={"copies": copies}) for t in turns for copies in (False, True)]
        specs[method] = EngineSpec(
            model=str(asked.model),
            turns=own,
            warm_up=asked.prompts[0],
            speculative=speculative[method],
            seed=None,  # a seed would fix the draft lengths
            dtype=stored_dtype(asked.model) if method == "plain, own dtype" else asked.dtype,
            engine={
                "max_model_len": longest + 32,
                "max_num_seqs": max(asked.batches),
                "enforce_eager": asked.eager,
                "enable_prefix_caching": False,
            },
            environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
        )
    return specs
