"""The engines that are compared on a real model, and what each is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sdfp_vllm.demo.methods import OWN_DTYPE, SDFP, speculative
from sdfp_vllm.measure.spec import EngineSpec, Turn
from sdfp_vllm.planner.engine_setup import stored_dtype

TEMPERATURE = 0.7


@dataclass(frozen=True)
class Asked:
    """Prompts are token ids. None is asked twice: a method that remembers answers would find its own.

    Attributes:
        each: Prompts for each batch size, as many batches as they fill.
        sampled: Prompts asked at TEMPERATURE, one at a time.
    """

    model: Path
    prompts: list[list[int]]
    tokens: int
    batches: list[int]
    each: int
    sampled: int
    dtype: str
    eager: bool

    def turns(self) -> list[Turn]:
        """A turn for each group of prompts that are asked at once."""
        turns, left = [], iter(self.prompts)
        take = lambda n: list(islice(left, n))  # noqa: E731
        for batch in self.batches:
            for _ in range(max(1, self.each // batch)):
                turns.append(Turn(prompts=take(batch), batch=batch, max_tokens=self.tokens))
        for _ in range(self.sampled):
            turns.append(Turn(prompts=take(1), max_tokens=self.tokens, temperature=TEMPERATURE))
        return turns

    @staticmethod
    def needed(batches: list[int], each: int, sampled: int) -> int:
        """Prompts that these turns take."""
        return sum(batch * max(1, each // batch) for batch in batches) + sampled


def engine_specs(
    methods: Sequence[str], asked: Asked, plans: Mapping[str, Path], draft: str | None
) -> dict[str, EngineSpec]:
    """One engine for each method. SDFP is asked each turn twice: without copies, then with."""
    turns = asked.turns()
    twice = [t.model_copy(update={"copies": copies}) for t in turns for copies in (False, True)]
    longest = max(map(len, asked.prompts)) + asked.tokens
    return {
        method: EngineSpec(
            model=str(asked.model),
            turns=twice if method == SDFP else turns,
            warm_up=asked.prompts[0],
            speculative=speculative(method, plans, draft),
            seed=None,  # a seed would fix the draft lengths
            dtype=stored_dtype(asked.model) if method == OWN_DTYPE else asked.dtype,
            engine={
                "max_model_len": longest + 32,
                "max_num_seqs": max(asked.batches),
                "enforce_eager": asked.eager,
                "enable_prefix_caching": False,
            },
            environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        for method in methods
    }
