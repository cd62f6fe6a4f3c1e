"""Reading and writing a plan's JSON file: atomic out, strict in, one clear error."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sdfp_vllm.errors import PlanError

MAX_PLAN_BYTES = 64 << 20
_Plan = TypeVar("_Plan", bound=BaseModel)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path`, making its folder: a reader sees the old file or the new one.

    Raises:
        PlanError: If it cannot be written; what was there stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=".plan-", delete=False) as f:
            temporary = f.name
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise PlanError(
            str(path),
            f"cannot be written ({e.strerror or e})",
            "Free space or choose another folder with -o.",
        ) from e


def write_plan(plan: BaseModel, path: Path) -> None:
    """Writes `plan` as JSON, atomically.

    Raises:
        PlanError: If it cannot be written.
    """
    write_atomically(path, (plan.model_dump_json(indent=1) + "\n").encode())


def read_plan(path: Path, kind: type[_Plan], version: int, make: str) -> _Plan:
    """Reads and validates a plan of class `kind`.

    Args:
        version: The `schema_version` this release reads.
        make: The command that makes such a plan, for the messages.

    Raises:
        PlanError: Naming the file, the field and the way out. No other exception leaves here.
    """
    again = f"Make the plan again with `{make}`."
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise PlanError(str(path), f"is larger than {MAX_PLAN_BYTES >> 20} MiB", again)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise PlanError(str(path), "no such plan", f"Make it with `{make}`, or correct the path.") from e
    except (OSError, UnicodeDecodeError, ValueError) as e:
        if isinstance(e, PlanError):
            raise
        raise PlanError(str(path), f"cannot be read ({e})", again) from e
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise PlanError(str(path), f"is not JSON ({e})", again) from e
    if not isinstance(raw, dict):
        raise PlanError(str(path), "is not a JSON object", again)
    if raw.get("schema_version") != version:
        raise PlanError(
            f"{path}: field schema_version",
            f"is {raw.get('schema_version')!r}, this release reads {version}",
            f"Upgrade sdfp-vllm, or make the plan again with `{make}`.",
        )
    try:
        return kind.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(str(p) for p in first["loc"]) or "of several"
        raise PlanError(f"{path}: field {field}", first["msg"], again) from e
    except RecursionError as e:
        raise PlanError(str(path), "is nested too deeply", again) from e
