"""Chats with pictures: what the model's processor makes of them, and what its encoder makes of that.

The first is done before the model is loaded, so that a row at fault costs no minutes. The second needs the whole model, of
which the plan's own work needs the decoder alone: it is done once, while the model is loaded, and kept as `Shown`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfp_vllm.common.checkpoint import load_config, refused
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.chat_rows import Chat, Messages, pictures_in, without_pictures
from sdfp_vllm.planner.chats import render_chat, rendered
from sdfp_vllm.planner.decoder import is_multimodal
from sdfp_vllm.planner.pictures import opened
from sdfp_vllm.planner.shown import Shown

LONGEST = 2048  # tokens of a chat with its pictures
# Families that take images and whose plans are made of text alone, with the reason.
_TEXT_ALONE = {
    "Gemma3ForConditionalGeneration": "the tokens of its images attend to one another both ways, "
    "which drafts are not tried with"
}


@dataclass(frozen=True)
class Pictured:
    """A chat's prompt.

    Attributes:
        where: The row, for errors.
        ids: int64 [P], with placeholders for pictures.
        image: bool [P], where those are.
        inputs: What the whole model is given; empty for a chat without pictures.
        question: int64 [Q], the prompt of the same chat without them.
        pictures: How many there are.
    """

    where: str
    ids: Tensor
    image: Tensor
    question: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)
    pictures: int = 0


class PictureReader:
    """A model's processor and template.

    Args:
        where: The first picture's place, for errors.

    Raises:
        SdfpError: If the model takes no images, is of a family that is planned on text alone, or lacks a processor.
    """

    def __init__(self, model_dir: Path | None, tokenizer: Any, where: str, trust_remote_code: bool = False):
        self.tokenizer = tokenizer
        config = None if model_dir is None else load_config(model_dir, trust_remote_code)
        if config is None or not is_multimodal(config) or not hasattr(config, "vision_config"):
            raise SdfpError(
                where,
                "is an image, and the model takes text alone",
                "Leave images out, or plan a model of docs/use/multimodal.md.",
            )
        architecture = (getattr(config, "architectures", None) or [""])[0]
        if architecture in _TEXT_ALONE:
            raise SdfpError(
                where,
                f"is an image, and {architecture} is planned on text alone: {_TEXT_ALONE[architecture]}",
                "Give chats without images.",
            )
        self._placeholder = config.image_token_id
        self._positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._processor = _processor(model_dir, trust_remote_code)

    def longest(self, new_tokens: int) -> int:
        """Most tokens of a chat that the model can still write so many behind."""
        return LONGEST if self._positions is None else min(LONGEST, self._positions - new_tokens)

    def read(self, chat: Chat) -> Pictured:
        """The chat as the model is to be given it.

        Raises:
            SdfpError: If a picture is damaged, or template or processor refuse the chat.
        """
        question = render_chat(self.tokenizer, without_pictures(chat.messages), chat.where)
        found = pictures_in(chat.messages)
        if not found:
            return Pictured(chat.where, question, torch.zeros(len(question), dtype=torch.bool), question)
        images = [opened(picture) for picture in found]
        text = rendered(self.tokenizer, _for_template(chat.messages), chat.where)
        try:
            # As in a server: only the template adds special tokens.
            made = self._processor(
                text=[text], images=[images], add_special_tokens=False, return_tensors="pt"
            )
        except Exception as e:  # every processor has its own exceptions
            raise SdfpError(
                chat.where,
                f"the model's processor refuses it ({type(e).__name__}: {e})",
                "Give images that the model takes, and a template that says where they go.",
            ) from e
        ids = made["input_ids"][0]
        image = ids == self._placeholder
        if not bool(image.any()):
            raise SdfpError(
                chat.where,
                "its images have no place in what the model's chat template makes of it",
                "Use a model whose template takes parts of type image.",
            )
        return Pictured(chat.where, ids, image, question, dict(made), len(found))


def _processor(model_dir: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
        if not hasattr(processor, "image_processor"):
            raise ValueError("it has none")
        return processor
    except Exception as e:  # every processor has its own exceptions
        raise refused(model_dir, e) or SdfpError(
            f"model {model_dir}",
            f"its processor of images cannot be loaded ({type(e).__name__}: {e})",
            "Install torchvision and pillow, save the processor in the model's folder, or give chats without images.",
        ) from e


def _for_template(messages: Messages) -> Messages:
    """The messages as templates are written for: a picture is a part of type `image`."""
    return [
        {**m, "content": [{k: v for k, v in part.items() if k != "picture"} for part in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]


def read_pictured(
    chats: Sequence[Chat], reader: PictureReader, count: int, seed: int, longest: int
) -> list[Pictured]:
    """Up to `count` of the chats, each drawn once, by the same draw as `read_chats`; those of more than `longest` tokens are left out.

    Raises:
        SdfpError: As `PictureReader.read`, for a chat that is drawn; or if none is left.
    """
    order = list(chats)
    random.Random(seed).shuffle(order)
    found: list[Pictured] = []
    for chat in order:
        if len(found) == count:
            break
        read = reader.read(chat)
        if len(read.ids) <= longest:
            found.append(read)
    if not found:
        raise SdfpError(
            order[0].where.partition(", line")[0],
            f"has no chat of at most {longest} tokens, its images' with them",
            "Give smaller images, or shorter chats.",
        )
    return found


class _Entered(Exception):
    """Ends a forward of the whole model where its decoder is called: what comes after is not wanted."""

    def __init__(self, given: dict[str, Any]):
        self.given = given


@torch.no_grad()
def show(whole: Any, chats: Sequence[Pictured]) -> list[Shown | None]:
    """What the decoder of the whole model is given for each chat; None for text alone.

    Taken from where the model calls its decoder, so that each family's own code puts images, positions and features in
    their places.

    Args:
        whole: transformers' model, encoder and all.

    Raises:
        SdfpError: If the model refuses a chat, or gives its decoder something that drafts were not tried with.
    """

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Entered(kwargs)

    hook = whole.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        return [_shown(whole, chat) if chat.inputs else None for chat in chats]
    finally:
        hook.remove()


def _shown(whole: Any, chat: Pictured) -> Shown:
    inputs = {
        k: v.to(whole.device, whole.dtype if v.is_floating_point() else v.dtype)
        for k, v in chat.inputs.items()
        if isinstance(v, Tensor)
    }
    try:
        whole(**inputs, use_cache=False)
    except _Entered as entered:
        given = entered.given
    except Exception as e:  # every model has its own exceptions
        raise SdfpError(
            chat.where,
            f"the model cannot be shown its images ({type(e).__name__}: {e})",
            "Give other images, or leave the line out.",
        ) from e
    if isinstance(given.get("attention_mask"), dict):
        raise SdfpError(
            chat.where,
            "the model's images attend otherwise than its text, which drafts are not tried with",
            "Give chats without images.",
        )
    positions = given.get("position_ids")
    return Shown(
        chat.image.to(whole.device),
        given["inputs_embeds"][0],
        positions[-3:, 0] if positions is not None and positions.ndim == 3 else None,
        tuple(given.get("deepstack_visual_embeds") or ()),
    )
