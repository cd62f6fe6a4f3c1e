"""Questions about a picture, and their right answers: what it shows, how many digits, which, and where one of them is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.captioner.pictures import COLUMNS, PLACES, ROWS, Picture, draw

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Asked:
    """A question about a picture, of one of the KINDS, with its right answer."""

    picture: Picture
    kind: str
    question: str
    answer: str


def place_name(place: int) -> str:
    """A place in words: "at the top left", "in the center"."""
    row, column = ROWS[place // 3], COLUMNS[place % 3]
    return "in the center" if place == PLACES // 2 else f"at the {row} {column}"


def _describe(picture: Picture, rng: np.random.Generator) -> tuple[str, str]:
    question = ("Describe the picture.", "What does the picture show?")[int(rng.integers(2))]
    where = _listed([f"a {digit} {place_name(place)}" for place, digit in picture.present])
    return question, f"The picture shows {_digits(picture)}: {where}."


def _how_many(picture: Picture, rng: np.random.Generator) -> tuple[str, str]:
    question = ("How many digits are in the picture?", "Count the digits.")[int(rng.integers(2))]
    count = len(picture.present)
    verb, empty = "is" if count == 1 else "are", _NUMBERS[PLACES - count]
    return (
        question,
        f"There {verb} {_digits(picture)} in the picture, and the other {empty} places are empty.",
    )


def _which(picture: Picture, rng: np.random.Generator) -> tuple[str, str]:
    question = ("Which digits are in the picture?", "Which digits do you see?")[int(rng.integers(2))]
    shown = [digit for _, digit in picture.present]
    verb = "is" if len(shown) == 1 else "are"
    return (
        question,
        f"There {verb} {_digits(picture)} in the picture: {_listed(shown)}. The largest is {max(shown)}.",
    )


def _where(picture: Picture, rng: np.random.Generator) -> tuple[str, str]:
    place, digit = picture.present[int(rng.integers(len(picture.present)))]
    question = (f"Where is the {digit}?", f"In which place is the digit {digit}?")[int(rng.integers(2))]
    others = [other for _, other in picture.present if other != digit]
    rest = f"The picture also has {_listed(others)}." if others else "The picture has no other digit."
    return question, f"The digit {digit} is {place_name(place)} of the picture. {rest}"


KINDS: dict[str, Callable[[Picture, np.random.Generator], tuple[str, str]]] = {
    "describe": _describe,
    "how many": _how_many,
    "which": _which,
    "where": _where,
}


def ask(count: int, seed: int, kind: str | None = None, held_out: bool = False) -> list[Asked]:
    """Makes `count` questions, each about a picture of its own; of one kind, or of all in turn."""
    rng, kinds = np.random.default_rng(seed + 1), [kind] if kind else list(KINDS)
    asked = []
    for i, picture in enumerate(draw(count, seed, held_out)):
        of = kinds[i % len(kinds)]
        asked.append(Asked(picture, of, *KINDS[of](picture, rng)))
    return asked


def _digits(picture: Picture) -> str:
    count = len(picture.present)
    return f"{_NUMBERS[count]} digit{'s' if count > 1 else ''}"


def _listed(items: list[str] | list[int]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
