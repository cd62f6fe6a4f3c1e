"""The file that a run on a GPU leaves."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def write(out: Path, rows: list[dict[str, Any]], packages: Sequence[str], **further: str) -> None:
    """Writes `rows`, and what made them: command, date, device, versions of `packages`, and what is said `further`."""
    import torch

    made = {
        "argv": sys.argv[1:],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {p: _installed(p) for p in packages},
        **further,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
