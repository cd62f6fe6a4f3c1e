"""Requests with images and videos for the checkpoints of `tiny_multimodal.py`: many of them, and films."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.support.tiny_multimodal import TINY, pictures


def many_requests(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests drawn at random: a quarter without an image, the others with up to three behind its first words, at the very end too."""
    tiny, rng = TINY[kind], np.random.default_rng(seed)
    shapes = ((168, 112), (56, 112), (112, 112), (112, 56))
    shown = [pictures(8, seed + i, *shape) for i, shape in enumerate(shapes)]
    requests: list[dict[str, Any]] = []
    for i in range(count):
        images = [shown[rng.integers(4)][rng.integers(8)] for _ in range(rng.integers(4))]
        words = ["".join(chr(97 + c) for c in rng.integers(26, size=rng.integers(1, 24))) for _ in images]
        prompt = f"{i} " + "".join(f"{word} {tiny.image}" for word in words)
        if not images or rng.integers(2):
            prompt += " and then?"
        elif tiny.bare:
            prompt = prompt.removesuffix(tiny.image) + tiny.bare
        data = {"multi_modal_data": {"image": images}} if images else {}
        requests.append({"prompt": prompt, **data})
    return requests


def video(frames: int, seed: int = 0, width: int = 112, height: int = 112) -> np.ndarray:
    """Random frames, uint8 [frames, height, width, 3]."""
    return np.stack([np.asarray(p) for p in pictures(frames, seed, width, height)])


def video_requests(kind: str) -> list[dict[str, Any]]:
    """Requests for one batch: text alone, a video in front, in the middle, at the very end, two of them, one beside an image."""
    clip = "<|vision_start|><|video_pad|><|vision_end|>"
    (still,) = pictures(1)

    def film(frames: int, seed: int, **size: int) -> Any:
        shot = video(frames, seed, **size)
        if kind == "qwen2_vl":
            return shot
        # The later ones make positions of its frames' times, or write them between the frames: they have to be told them.
        return shot, {
            "fps": 2.0,
            "duration": frames / 2,
            "total_num_frames": frames,
            "frames_indices": list(range(frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }

    def ask(prompt: str, videos: Sequence[Any] = (), images: Sequence[Any] = ()) -> dict[str, Any]:
        data = {k: list(v) for k, v in (("video", videos), ("image", images)) if v}
        return {"prompt": prompt, **({"multi_modal_data": data} if data else {})}

    return [
        ask("Which of these words rhyme, and why do they?"),
        ask(f"{clip}What happens in it?", [film(4, 1)]),
        ask(f"Before it {clip} and after it.", [film(6, 2, width=56)]),
        ask(f"The last thing is a film: {clip}", [film(4, 3)]),
        ask(f"{clip}One, {clip}two. Compare.", [film(4, 4), film(4, 5)]),
        ask(f"{TINY[kind].image}Is the picture in {clip}?", [film(4, 6)], [still]),
        ask(f"{clip}What happens in it?", [film(4, 7)]),
    ]
