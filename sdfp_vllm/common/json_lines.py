"""Reading .jsonl and .ndjson files: one set of rules for every command that takes one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdfp_vllm.errors import SdfpError


def json_rows(path: Path, name: str) -> Iterator[tuple[int, str, Any]]:
    """Yields each row of a file of JSON lines: its line's number from 1, its place for errors, and what it holds.

    Lines end at "\\n" alone: JSON allows U+2028, U+2029 and U+0085 inside strings. Blank lines are no rows, and a
    byte order mark at the start is skipped.

    Args:
        name: The file, for errors.

    Raises:
        SdfpError: If the file cannot be read, or a line is not UTF-8 or not JSON.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{name}, line {number}"
                if row := _decoded(line, where, first=number == 1):
                    yield number, where, _parsed(row, where)
    except OSError as e:
        raise SdfpError(name, f"cannot be read ({e.strerror or e})", "Give a readable file.") from e


def _decoded(line: bytes, where: str, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8").strip(" \t\r\n")
    except UnicodeDecodeError as e:
        raise SdfpError(where, f"is not UTF-8 text ({e})", "Save the file as UTF-8.") from e


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise SdfpError(where, f"is not JSON ({e})", "Mend or remove the line.") from e
