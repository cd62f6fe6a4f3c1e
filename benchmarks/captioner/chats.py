"""Chats with pictures, as rows of a `--calibration` file: OpenAI messages, each picture a `data:` URL."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.captioner.pictures import Picture
from benchmarks.captioner.questions import Asked


def write_chats(file: Path, asked: Sequence[Asked]) -> Path:
    """Writes a chat for each question, without its answer: the target gives its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lines:
        for one in asked:
            image = {"type": "image_url", "image_url": {"url": data_url(one.picture)}}
            content = [image, {"type": "text", "text": one.question}]
            lines.write(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    return file


def data_url(picture: Picture) -> str:
    """A picture as PNG in a `data:` URL."""
    png = io.BytesIO()
    picture.image.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
