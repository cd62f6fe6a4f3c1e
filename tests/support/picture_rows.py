"""Files of chats that show images, as `sdfp plan --calibration` takes them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from tests.support.tiny_multimodal import pictures


def png(image: Any, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


def inline(image: Any) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def rows(path: Path, *contents: Any) -> str:
    """A file of chats, one of each content."""
    lines = [json.dumps({"messages": [{"role": "user", "content": c}]}) for c in contents]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def mixed(folder: Path, count: int) -> str:
    """Chats with an image in the row, one in a file, two of which one comes last, and none."""
    contents: list[Any] = []
    for i, shown in enumerate(pictures(count)):
        (folder / f"{i}.png").write_bytes(png(shown))
        (again,) = pictures(1, seed=100 + i, width=56, height=112)
        contents.append(
            [
                [image(inline(shown)), text(f"What is in picture {i}?")],
                [text("Look:"), image((folder / f"{i}.png").as_uri()), text(f"and describe it {i} times.")],
                [text(f"First {i}"), image(inline(shown)), text("and then"), image(f"file:{i}.png")],
                f"Which of these {i} words rhyme?",
                [{"type": "image_url", "image_url": inline(again)}, text(f"Tall {i}")],
            ][i % 5]
        )
    return rows(folder / "chats.jsonl", *contents)
