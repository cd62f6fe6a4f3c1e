"""What stands in a prompt beside tokens: pictures, as the decoder gets them.

An encoder turns a picture into embeddings in the places of placeholder tokens. Its tokens may have positions of their own
(M-RoPE: three numbers each), and features that are added behind the first layers as well (DeepStack). All of that belongs
to the prompt: a token that is written has an embedding of its own and one position, so drafts need no more of it than where
text goes on. `entering` is the one place where tokens and pictures come together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

_IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Shown:
    """A prompt of P tokens with pictures.

    Attributes:
        image: bool [P], the places of pictures' tokens, I of them.
        embeddings: [P, H], of text and pictures.
        positions: int64 [3, P], rotary positions; None where they are the tokens' own, 0 to P - 1.
        features: [I, H] each, added to pictures' tokens behind the first layers.
    """

    image: Tensor
    embeddings: Tensor
    positions: Tensor | None = None
    features: tuple[Tensor, ...] = ()

    @cached_property
    def delta(self) -> int:
        """What a token behind the prompt has as its position, less its index."""
        return 0 if self.positions is None else int(self.positions.max()) + 1 - len(self.image)


@dataclass(frozen=True)
class Window:
    """A text that Fisher traces are taken on: int64 ids [T], and what is shown at its start."""

    ids: Tensor
    shown: Shown | None = None

    def targets(self) -> Tensor:
        """The token after each but the last, int64 [T - 1]; those of pictures, which nothing predicts, are marked to be left out."""
        targets = self.ids[1:].clone()
        if self.shown is not None:
            targets[: len(self.shown.image) - 1][self.shown.image[1:].to(targets.device)] = _IGNORED
        return targets


# Text alone: windows of one length, int64 [N, T].
Windows = Tensor | Sequence[Window]


def predicted(targets: Tensor) -> int:
    """How many of a window's targets count."""
    return int((targets != _IGNORED).sum())


def tokens_of(windows: Windows) -> int:
    """Tokens in all of them."""
    return windows.numel() if isinstance(windows, Tensor) else sum(len(w.ids) for w in windows)


def digest(windows: Sequence[Window]) -> str:
    """Of what is shown in windows; empty where that is nothing."""
    if not any(w.shown for w in windows):
        return ""
    sha = hashlib.sha256()
    for window in windows:
        sha.update(str(len(window.ids)).encode())
        if (shown := window.shown) is not None:
            for part in (shown.embeddings, shown.positions, *shown.features):
                if part is not None:
                    sha.update(part.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def places(ids: Tensor, begins: Tensor, shown: Sequence[Shown | None]) -> Tensor:
    """Rotary positions, int64 [3, N, T], of left-padded texts [N, T]; [N, T] where all are the tokens' own columns.

    A text's first token has its column for a position, so that all that come after count from there.
    """
    column = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    if all(s is None or s.positions is None for s in shown):
        return column
    rows = column.expand(3, -1, -1).clone()
    for n, (begin, s) in enumerate(zip(begins.tolist(), shown, strict=True)):
        if s is not None and s.positions is not None:
            end = begin + len(s.image)
            rows[:, n, begin:end] = begin + s.positions.to(ids.device)
            rows[:, n, end:] += s.delta
    return rows


def entering(embed: nn.Module, ids: Tensor, begins: Tensor, shown: Sequence[Shown | None]) -> dict[str, Any]:
    """Keywords of the decoder's forward for whole texts with pictures at their starts.

    Args:
        embed: The decoder's embedding.
        ids: int64 [N, T], padded on the left.
        begins: int64 [N], the column of each text's first token.
        shown: What each text shows, or None.
    """
    with torch.no_grad():
        embeddings = embed(ids).clone()
        seen = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        for n, (begin, s) in enumerate(zip(begins.tolist(), shown, strict=True)):
            if s is not None:
                here = slice(begin, begin + len(s.image))
                embeddings[n, here] = s.embeddings.to(embeddings)
                seen[n, here] = s.image.to(ids.device)
    given = {"inputs_embeds": embeddings, "position_ids": places(ids, begins, shown)}
    features = [s.features for s in shown if s is not None and s.features]
    if features:  # one after the other, as a mask over the whole batch finds their places
        given["visual_pos_masks"] = seen
        given["deepstack_visual_embeds"] = [
            torch.cat(layer).to(embeddings) for layer in zip(*features, strict=True)
        ]
    return given
