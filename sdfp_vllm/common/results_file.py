"""What a demo or a benchmark found out, as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def save_results(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path`, making its folder: whoever reads it sees the results of before or the new ones, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(new, path)
