"""What an engine shall generate, and what is measured of it: the two records that cross its process's border."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Turn(BaseModel):
    """Requests that an engine answers in one go, while the other engines wait. Prompts are text, or token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: list[list[int] | str] = Field(min_length=1)
    batch: int = Field(default=1, ge=1)  # so many at a time
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    window: int | Literal["none"] | None = None  # last tokens that SDFP drafts see; None: as it is set up
    copies: bool | None = None  # whether a paced SDFP engine may copy from the context; None: as it is set up
    # So many a round with the model, whatever pacing says; None: paced.
    drafts: int | None = Field(default=None, ge=0)
    streamed: bool = False  # the text of its one prompt is told while it is produced

    @model_validator(mode="after")
    def _one_text_at_a_time(self) -> Turn:
        if self.streamed and len(self.prompts) > 1:
            raise ValueError("a streamed turn has one prompt: the pieces of several texts would mix")
        return self


class EngineSpec(BaseModel):
    """One engine and what it shall generate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    turns: Sequence[Turn | None] = Field(min_length=1)  # None: it waits while other engines have one
    warm_up: list[int] | str
    speculative: dict[str, Any] | None = None  # vLLM's speculative_config
    ignore_eos: bool = False
    seed: int | None = (
        None  # of the engine and of every request; None for requests without, which alone are paced
    )
    dtype: str = "auto"
    engine: dict[str, Any] = {}  # further arguments of LLM()
    environment: dict[str, str] = {}

    @property
    def own_turns(self) -> list[Turn]:
        """The turns that it takes."""
        return [t for t in self.turns if t is not None]


class TurnMeasurement(BaseModel):
    """What one turn gave.

    Attributes:
        seconds: The whole requests'.
        decode_seconds: From the first token to the last, which is what drafting changes.
        draft_seconds: Spent in the drafter.
        rounds, draft_tokens, accepted_tokens, accepted_per_position: vLLM's own metrics;
            `accepted_per_position[j]` counts the rounds in which draft token j was accepted.
        paced: (batch size, rows verified, draft steps that followed) of rounds, and their count; empty where not paced.
    """

    token_ids: list[list[int]]
    texts: list[str]
    seconds: float
    decode_seconds: float
    draft_seconds: float = 0.0
    rounds: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    paced: list[tuple[int, int, int, int]] = []

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens per verification round that had a draft: accepted ones and the target's own (as in vLLM)."""
        return 1 + self.accepted_tokens / self.rounds if self.rounds else None


class Measurement(BaseModel):
    """What one engine gave, by turn, warm-up excluded. Times are in seconds."""

    turns: list[TurnMeasurement]
    start_seconds: float
    kv_bytes_per_token: float | None
    vllm_version: str

    @property
    def whole(self) -> TurnMeasurement:
        """All turns as one."""
        positions = itertools.zip_longest(*(t.accepted_per_position for t in self.turns), fillvalue=0)
        paced: Counter[tuple[int, ...]] = Counter()
        for *key, count in itertools.chain.from_iterable(t.paced for t in self.turns):
            paced[tuple(key)] += count
        return TurnMeasurement(
            token_ids=[ids for t in self.turns for ids in t.token_ids],
            texts=[text for t in self.turns for text in t.texts],
            accepted_per_position=[sum(counts) for counts in positions],
            paced=[(*key, count) for key, count in sorted(paced.items())],  # type: ignore[misc]
            **{
                name: sum(getattr(t, name) for t in self.turns)
                for name in (
                    "seconds", "decode_seconds", "draft_seconds", "rounds", "draft_tokens", "accepted_tokens",
                )
            },
        )  # fmt: skip

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over request time, prefill included."""
        whole = self.whole
        return sum(map(len, whole.token_ids)) / whole.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after each request's first, over the time they took. 0 where all have one token."""
        whole = self.whole
        later = sum(len(ids) - 1 for ids in whole.token_ids)
        return later / whole.decode_seconds if whole.decode_seconds else 0.0


def one_by_one(prompts: Sequence[list[int] | str], max_tokens: int, temperature: float = 0.0) -> list[Turn]:
    """A turn for each prompt."""
    return [Turn(prompts=[p], max_tokens=max_tokens, temperature=temperature) for p in prompts]
