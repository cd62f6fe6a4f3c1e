"""First stage of training: the tower reads each place, and the projector says it in the language model's own words.

The language model is not run. A place's target is the mean of the embeddings of three words, scaled to one word's length: what is
there ("3", "empty"), and its row and column ("top", "left"). What the language model is then given reads much like text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.captioner.checkpoint import pixels
from benchmarks.captioner.pictures import COLUMNS, PLACES, ROWS, Picture, draw

_EMPTY = 10  # its class, behind the ten digits
_BATCH, _RATE = 64, 1e-3


def targets(embedding: Tensor, tokenizer: Any) -> Tensor:
    """What the projector shall say of a place: float32 [PLACES, 11, D], by place and what is there (a digit, or nothing)."""
    word = lambda text: embedding[tokenizer(text, add_special_tokens=False).input_ids].mean(0)  # noqa: E731
    # A digit without the space before it is one token, and the one that an answer has.
    what = torch.stack([word(str(digit)) for digit in range(10)] + [word(" empty")])
    where = torch.stack([word(f" {row}") + word(f" {column}") for row in ROWS for column in COLUMNS])
    return (what[None] + where[:, None]) / 3**0.5


def train_tower(
    model: Any, tokenizer: Any, steps: int, seed: int, note: Callable[[str], None] = print
) -> float:
    """Trains the tower and the projector in place; returns the share of places that are read right in held-out pictures."""
    said = targets(model.get_input_embeddings().weight.detach(), tokenizer)
    scale = said.square().mean()
    trained = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(steps):
        pictures = draw(_BATCH, seed=seed * 1_000_003 + step)
        features, classes = features_of(model, pictures), _classes(pictures)
        wanted = said.expand(len(pictures), -1, -1, -1).gather(
            2, classes[..., None, None].expand(-1, -1, 1, said.shape[-1])
        )
        # Told apart from what else could be said there, and said in these words.
        apart = F.cross_entropy(_scores(features, said).flatten(0, 1), classes.flatten())
        loss = apart + (features - wanted[:, :, 0]).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            note(f"tower: step {step + 1}, loss {loss.item():.3f}")
    return read_right(model, said, draw(256, seed=seed, held_out=True))


@torch.no_grad()
def read_right(model: Any, said: Tensor, pictures: list[Picture]) -> float:
    """The share of places in `pictures` for which the right words are nearest to what the projector says."""
    found = _scores(features_of(model, pictures), said).argmax(-1)
    return (found == _classes(pictures)).float().mean().item()


def features_of(model: Any, pictures: list[Picture]) -> Tensor:
    """What the language model is given for pictures, float32 [B, PLACES, D]."""
    config = model.config
    out = model.get_image_features(
        pixels(pictures),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    return torch.stack(list(out.pooler_output))


def _scores(features: Tensor, said: Tensor) -> Tensor:
    """Logits [B, PLACES, 11]: minus the squared distance from what could be said of a place, in units of that between two."""
    apart = (said[:, 0] - said[:, 1]).square().sum(-1).mean()
    return -4 * (features[:, :, None] - said).square().sum(-1) / apart


def _classes(pictures: list[Picture]) -> Tensor:
    """What is in each place, int64 [B, PLACES]."""
    rows = [[_EMPTY if digit is None else digit for digit in p.digits] for p in pictures]
    classes = torch.tensor(rows)
    assert classes.shape[1] == PLACES
    return classes
