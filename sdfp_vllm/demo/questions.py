"""The demo's questions: twenty-four of the project's own writing, of six kinds, or a file in Spec-Bench's format."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from sdfp_vllm.planner.calibration import read_questions

OWN = Path(__file__).parent / "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """What is asked, through the model's chat template where it has one.

    Attributes:
        kind: The row's `category`; "all" where it has none.
        ids: Token ids of the prompt.
    """

    kind: str
    ids: list[int]


def choose(tokenizer: Any, *, file: Path | None = None, per_kind: int, seed: int = 0) -> list[Question]:
    """Draws `per_kind` questions of each kind, the kinds in turn; equal arguments give equal questions.

    Args:
        file: A .jsonl with `turns`, `messages` or `prompt` and perhaps `category`; None for the project's own.

    Raises:
        SdfpError: If the file cannot be read or a row is no question.
    """
    by_kind: dict[str, list[Question]] = {}
    for kind, ids in read_questions(str(file or OWN), tokenizer):
        by_kind.setdefault(kind, []).append(Question(kind, ids.tolist()))
    rng = random.Random(seed)
    drawn = [rng.sample(all_, min(per_kind, len(all_))) for all_ in by_kind.values()]
    return [q for q in chain.from_iterable(zip_longest(*drawn)) if q is not None]
