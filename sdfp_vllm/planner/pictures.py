"""Pictures of calibration rows: in the row itself (`data:`) or in a file (`file:`), never from the network.

How a picture becomes red, green and blue is as in vLLM's server, so that a model is shown here what it is shown there.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from sdfp_vllm.errors import SdfpError

_WAY_OUT = "Put the picture into the row as data:image/png;base64,..., or save it and give file:///its/path."
# vLLM opens more: among them are some that start programs to be read.
_LARGEST = 64 << 20  # bytes of a file
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Picture:
    """A picture that is not opened yet.

    Attributes:
        where: File, row and field, for errors.
        held: Its bytes, or the file that has them.
    """

    where: str
    held: bytes | Path


def picture_of(value: Any, where: str, beside: Path) -> Picture:
    """The picture that an `image_url` names: an object with `url`, or the URL itself. It is not opened.

    Args:
        beside: The folder that a `file:` URL with a relative path starts from.

    Raises:
        SdfpError: If it is no URL, its scheme is another than `data:` and `file:`, or it leads to nothing.
    """
    if isinstance(value, dict):
        value, where = value.get("url"), f"{where}.url"
    if not isinstance(value, str) or not value.strip():
        raise SdfpError(where, "is no URL", _WAY_OUT)
    url = value.strip()
    scheme = url.partition(":")[0].lower() if ":" in url else ""
    if scheme == "data":
        return Picture(where, _inline(url, where))
    if scheme == "file":
        return Picture(where, _file(url, where, beside))
    short = url if len(url) <= 80 else url[:77] + "..."
    if "://" in url:
        raise SdfpError(where, f"{short} would be fetched from the network, which is not done", _WAY_OUT)
    raise SdfpError(where, f"{short!r} is no URL that starts with data: or file:", _WAY_OUT)


def _inline(url: str, where: str) -> bytes:
    kind, comma, data = url.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise SdfpError(where, "is a data: URL that is not in base64", _WAY_OUT)
    try:
        return base64.b64decode(unquote(data), validate=True)
    except (binascii.Error, ValueError) as e:
        raise SdfpError(where, f"is not base64 ({e})", "Mend or remove the line.") from e


def _file(url: str, where: str, beside: Path) -> Path:
    try:
        split = urlsplit(url)
    except ValueError as e:
        raise SdfpError(where, f"is no URL ({e})", _WAY_OUT) from e
    if split.netloc not in ("", "localhost"):
        raise SdfpError(
            where,
            f"names a file on another machine ({split.netloc})",
            "Give file: and three slashes before a path from the root.",
        )
    path = beside / url2pathname(split.path + (f"#{split.fragment}" if split.fragment else ""))
    try:
        size = path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError) as e:  # a name too long, a folder that may not be read
        raise SdfpError(
            where,
            f"{_short(path)} cannot be had ({type(e).__name__})",
            "Correct the path, or remove the line.",
        ) from e
    if size < 0:
        raise SdfpError(where, f"{_short(path)} is no file", "Correct the path, or remove the line.")
    if size > _LARGEST:
        raise SdfpError(where, f"{path} has {size:,} bytes, more than {_LARGEST:,}", "Give a smaller image.")
    return path


def _short(path: Path) -> str:
    text = str(path).replace("\0", "%00")
    return text if len(text) <= 160 else f"{text[:80]}...{text[-77:]}"


def opened(picture: Picture) -> Any:
    """The picture as PIL's, in RGB, all of it read.

    Raises:
        SdfpError: If it cannot be read, or holds no image that can be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        held = picture.held if isinstance(picture.held, bytes) else picture.held.read_bytes()
        image: Any = Image.open(BytesIO(held), formats=_FORMATS)
        image.load()
        with contextlib.suppress(Exception):  # as in a server, a camera's faulty notes spoil no picture
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            opaque = Image.new("RGB", image.size, (255, 255, 255))
            opaque.paste(image, mask=image.split()[3])
            return opaque
        return image.convert("RGB")
    except Exception as e:  # every format has its own exceptions
        file = "" if isinstance(picture.held, bytes) else f"{picture.held} "
        # Where it knows no format, PIL names an object of Python's.
        unknown = isinstance(e, UnidentifiedImageError)
        why = "its format is not known" if unknown else f"{type(e).__name__}: {e}"
        raise SdfpError(
            picture.where,
            f"{file}cannot be read as an image ({why})",
            f"Give an undamaged one ({', '.join(_FORMATS)}), or remove the line.",
        ) from e
