"""Rows that are chats, in the forms that data come in: read into messages, or refused by name.

A row is a chat by one of its fields: `messages` (as in OpenAI's API), `turns` (Spec-Bench's) or `prompt` (a user's text).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.pictures import Picture

# Fields that make a row a chat, the first that is there: OpenAI's, Spec-Bench's, and a user's text.
CHAT_FIELDS = ("messages", "turns", "prompt")
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_ANSWERED = {"user", "tool"}  # roles that the assistant answers
_IMAGE = "image_url"
# For messages of nothing but pictures: roles have to go on taking turns.
_UNNAMED = "What is in the picture?"

# Role and content of each: a text, or parts of which at least one is a picture, {"type": "image", "picture": Picture}.
Messages = list[dict[str, Any]]
# Makes a picture of an `image_url`'s value, or refuses it; second comes its place, for errors.
TakePicture = Callable[[Any, str], Picture]


@dataclass(frozen=True)
class Chat:
    """A chat of a file: its row's place, for errors, and its messages."""

    where: str
    messages: Messages


def is_text(value: Any) -> bool:
    """Whether it is a string of characters; JSON's escapes can also spell half of one (a lone surrogate)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def chat_of(row: Any, where: str, take_picture: TakePicture | None = None) -> tuple[str, Messages]:
    """The field that makes a row a chat, and its messages, up to the first that the model is to answer.

    Args:
        where: The row's place, for errors.
        take_picture: Where messages may hold pictures; None refuses them, so that all contents are text.

    Raises:
        SdfpError: If the row is no chat, or none that the model could answer.
    """
    field = next((f for f in CHAT_FIELDS if isinstance(row, dict) and f in row), None)
    if field is None:
        raise SdfpError(
            where,
            f"is no chat: it has none of the fields {', '.join(CHAT_FIELDS)}",
            "Mend or remove the line, or give a file of which every row is a chat.",
        )
    value = row[field]
    if field == "prompt":
        return field, [{"role": "user", "content": _content(value, f"{where}, field prompt")}]
    if not isinstance(value, list) or not value:
        what = "is empty" if value == [] else "is not a list"
        raise SdfpError(
            f"{where}, field {field}", what, "Give a list with at least one item, or remove the line."
        )
    if field == "turns":
        return field, [{"role": "user", "content": _content(value[0], f"{where}, field turns[0]")}]
    messages = [_message(m, f"{where}, field messages[{i}]", take_picture) for i, m in enumerate(value)]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] not in _ANSWERED:
        raise SdfpError(
            f"{where}, field messages",
            "has nothing for the model to answer",
            "Add a message of the user at the end, or remove the line.",
        )
    return field, messages


def pictures_in(messages: Messages) -> list[Picture]:
    """The pictures of a chat, in their order."""
    return [
        part["picture"]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]


def without_pictures(messages: Messages) -> Messages:
    """The same chat in text alone; in the place of nothing but pictures stands a question about them."""
    plain = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content if part["type"] == "text")
        plain.append({**message, "content": content or _UNNAMED})
    return plain


def _message(message: Any, where: str, take_picture: TakePicture | None) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise SdfpError(where, "is not an object", "Give it a role and a content.")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise SdfpError(f"{where}.role", f"{role!r} is not known", f"Use one of {', '.join(sorted(_ROLES))}.")
    content, where = message.get("content"), f"{where}.content"
    if isinstance(content, list) and content:  # parts, as in OpenAI's API
        parts = [_part(part, f"{where}[{i}]", take_picture) for i, part in enumerate(content)]
        if any(part["type"] == "image" for part in parts):
            return {"role": role, "content": parts}
        content = "\n".join(part["text"] for part in parts)
    return {"role": role, "content": _content(content, where)}


def _content(value: Any, where: str) -> str:
    if not is_text(value):
        raise SdfpError(where, "is not text", "Give a string, or remove the line.")
    if not value.strip():
        raise SdfpError(where, "is empty", "Give it some text, or remove the line.")
    return value


def _part(part: Any, where: str, take_picture: TakePicture | None) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == _IMAGE and take_picture:
        return {"type": "image", "picture": take_picture(part.get(_IMAGE), f"{where}.{_IMAGE}")}
    if kind != "text":
        known = "text and image_url are" if take_picture else "text alone is"
        raise SdfpError(
            where, f"is a part of type {kind!r}, and {known} read", "Leave the part out, or the line."
        )
    return {"type": "text", "text": _content(part.get("text"), f"{where}.text")}
