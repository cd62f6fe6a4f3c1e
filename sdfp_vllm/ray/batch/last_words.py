"""What of an exception a user can act on: its last line."""

from __future__ import annotations

from sdfp_vllm.errors import SdfpError

_LINK = "For further information visit"  # pydantic's last line, of vLLM's settings


def last_words(error: BaseException) -> str:
    """The error's kind and the last line of its text; our own errors, which are one line, as they are."""
    if isinstance(error, SdfpError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_LINK)]
    return f"{type(error).__name__}: {said[-1]}" if said else type(error).__name__
