"""Pictures with a few of scikit-learn's handwritten digits, each in one of nine places."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = len(ROWS) * len(COLUMNS)
PLACE = 16  # pixels along a side of a place
SIDE = 3 * PLACE  # of a picture
MOST = 5  # digits in a picture
_DIGIT = 13  # pixels along a side of a digit; what is left of a place is for moving it about
_NOISE = 6.0  # standard deviation of the background, of 255
_HELD_OUT = 5  # every fifth digit is kept from training


@dataclass(frozen=True)
class Picture:
    """A picture and what is in it.

    Attributes:
        pixels: uint8 [SIDE, SIDE], white on black.
        digits: The digit in each of the nine places, row by row; None where a place is empty. No digit is there twice.
    """

    pixels: NDArray[np.uint8]
    digits: tuple[int | None, ...]

    @property
    def present(self) -> list[tuple[int, int]]:
        """(place, digit), row by row."""
        return [(place, digit) for place, digit in enumerate(self.digits) if digit is not None]

    @property
    def image(self) -> Any:
        """As a PIL image in RGB, which is what an image processor takes."""
        from PIL import Image

        return Image.fromarray(self.pixels).convert("RGB")


def draw(count: int, seed: int, held_out: bool = False) -> list[Picture]:
    """Draws pictures with one to MOST digits; of those handwritten digits that training never sees, or of the others."""
    rng = np.random.default_rng(seed)
    return [_picture(rng, held_out) for _ in range(count)]


def _picture(rng: np.random.Generator, held_out: bool) -> Picture:
    hands = _hands(held_out)
    pixels = np.abs(rng.normal(0, _NOISE, (SIDE, SIDE)))
    digits: list[int | None] = [None] * PLACES
    count = int(rng.integers(1, MOST + 1))
    places, shown = rng.permutation(PLACES)[:count], rng.permutation(10)[:count]
    for place, digit in zip(places.tolist(), shown.tolist(), strict=True):
        hand = hands[digit][int(rng.integers(len(hands[digit])))]
        row, column = (int(a) * PLACE + int(rng.integers(PLACE - _DIGIT + 1)) for a in divmod(place, 3))
        pixels[row : row + _DIGIT, column : column + _DIGIT] += hand
        digits[place] = digit
    return Picture(pixels.clip(0, 255).astype(np.uint8), tuple(digits))


@functools.cache
def _hands(held_out: bool) -> dict[int, list[NDArray[np.float64]]]:
    """Handwritten digits by class, _DIGIT pixels along a side, 0 to 255."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    hands: dict[int, list[NDArray[np.float64]]] = {digit: [] for digit in range(10)}
    for i, (image, digit) in enumerate(zip(data.images, data.target.tolist(), strict=True)):
        if (i % _HELD_OUT == 0) == held_out:
            small = Image.fromarray((image * 255 / 16).astype(np.uint8))
            large = small.resize((_DIGIT, _DIGIT), Image.Resampling.BICUBIC)
            hands[digit].append(np.asarray(large, dtype=np.float64))
    return hands
