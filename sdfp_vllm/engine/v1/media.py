"""Media in a request's context: the places of their embeddings hold ids that stand for no text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from sdfp_vllm.pacing.ngram import NO_TEXT


def without_media(context: np.ndarray, features: Iterable[Any] | None, begin: int = 0) -> np.ndarray:
    """`context` with NO_TEXT wherever an image, a video or a sound is.

    Ids between the parts of an image (rows, tiles) belong to it too.

    Args:
        context: int [T] token ids; written to.
        features: vLLM's `mm_features` of the request, with `mm_position.offset` and `.length` in its prompt.
        begin: Where in the request the context begins.
    """
    for feature in features or ():
        first = feature.mm_position.offset - begin
        context[max(0, first) : max(0, first + feature.mm_position.length)] = NO_TEXT
    return context
