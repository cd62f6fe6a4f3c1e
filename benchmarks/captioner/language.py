"""Second stage of training: the language model answers questions about pictures; cross-entropy on the answers alone.

All of it learns but the embedding, which is its head as well and gave the projector its words; the tower stays as it is. A few rows of
every batch are plain chats with the answers that it gave before, so that it goes on answering those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.captioner.checkpoint import IMAGE, pixels
from benchmarks.captioner.pictures import PLACES, Picture
from benchmarks.captioner.questions import Asked, ask
from sdfp_vllm.demo.questions import OWN
from sdfp_vllm.planner.calibration import read_questions

_ROWS, _CHATS = 8, 1  # of a batch: about pictures, and plain ones
_WARM_UP = 10  # steps
_CHAT_PROMPT, _CHAT_ANSWER = 80, 48  # most tokens of a plain chat


@dataclass(frozen=True)
class Row:
    """A question and its answer: token ids, and the picture in the place of the prompt's IMAGE tokens; None for a plain chat."""

    prompt: list[int]
    answer: list[int]
    picture: Picture | None = None


def messages(asked: Asked) -> list[dict[str, Any]]:
    """A chat with a picture, as the chat template takes it."""
    content = [{"type": "image"}, {"type": "text", "text": asked.question}]
    return [{"role": "user", "content": content}]


def row_of(asked: Asked, tokenizer: Any) -> Row:
    """A question about a picture in tokens; the answer ends as the chat template ends a message."""
    text = tokenizer.apply_chat_template(messages(asked), tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text.replace(IMAGE, IMAGE * PLACES), add_special_tokens=False).input_ids
    answer = tokenizer(asked.answer, add_special_tokens=False).input_ids
    return Row(prompt, [*answer, tokenizer.eos_token_id], asked.picture)


@torch.no_grad()
def plain_chats(model: Any, tokenizer: Any) -> list[Row]:
    """The demo's shorter questions with what the language model answers before it is trained, greedy."""
    prompts = [ids.tolist() for _, ids in read_questions(str(OWN), tokenizer) if len(ids) <= _CHAT_PROMPT]
    if not prompts:  # a tokenizer whose tokens are short
        return []
    longest = max(map(len, prompts))
    end = tokenizer.eos_token_id
    made = model.generate(
        input_ids=torch.tensor([[end] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=_CHAT_ANSWER,
        do_sample=False,
        pad_token_id=end,
    )
    rows = []
    for prompt, ids in zip(prompts, made[:, longest:].tolist(), strict=True):
        rows.append(Row(prompt, ids[: ids.index(end) + 1] if end in ids else ids))
    return rows


def train_language(
    model: Any,
    tokenizer: Any,
    chats: Sequence[Row],
    *,
    steps: int,
    seed: int,
    rate: float,
    seconds: float = math.inf,
    note: Callable[[str], None] = print,
) -> int:
    """Trains decoder and projector in place; returns the steps that were done.

    Args:
        chats: Plain chats, some of which stand in every batch.
        seconds: Where these are over, the learning rate has fallen to nothing and training ends, whatever `steps` says.
    """
    model.requires_grad_(False)
    learned = [
        *model.model.language_model.layers.parameters(),
        *model.model.language_model.norm.parameters(),
        *model.model.multi_modal_projector.parameters(),
    ]
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, done = time.monotonic(), 0
    for batch in _batches(tokenizer, chats, seed):
        gone = max(done / steps, (time.monotonic() - began) / seconds)
        if gone >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (done + 1) / _WARM_UP) * (1 - gone)
        # Products in bfloat16 take 0.6 of float32's time on a CPU that has them; weights and their changes are float32.
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        done += 1
        if done % 10 == 0:
            note(f"language: step {done}, {time.monotonic() - began:.0f} s, loss {loss.item():.4f}")
    return done


def loss_of(model: Any, rows: Sequence[Row]) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    ids = pad_sequence([torch.tensor(r.prompt + r.answer) for r in rows], batch_first=True)
    lengths = torch.tensor([len(r.prompt) + len(r.answer) for r in rows])
    first = torch.tensor([len(r.prompt) for r in rows])
    at = torch.arange(ids.shape[1])
    answers = (at >= first[:, None]) & (at < lengths[:, None])
    shown = [r.picture for r in rows if r.picture is not None]
    out = model.model(
        input_ids=ids,
        pixel_values=pixels(shown) if shown else None,
        attention_mask=(at < lengths[:, None]).long(),
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        use_cache=False,
    )
    # The head is a quarter of the work: it is asked for what counts alone.
    logits = model.lm_head(out.last_hidden_state[:, :-1][answers[:, 1:]])
    return F.cross_entropy(logits, ids[:, 1:][answers[:, 1:]])


def _batches(tokenizer: Any, chats: Sequence[Row], seed: int) -> Iterator[list[Row]]:
    """Batches without end, each of new pictures."""
    draw = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        rows = [row_of(asked, tokenizer) for asked in ask(_ROWS, seed=seed * 1_000_003 + 2 * step)]
        if chats:
            rows += [chats[int(i)] for i in torch.randint(len(chats), (_CHATS,), generator=draw)]
        yield rows
        step += 1
