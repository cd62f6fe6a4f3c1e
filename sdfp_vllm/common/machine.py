"""What a measurement was taken on, by name."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name and the instructions that torch uses on it: in the cloud names say little."""
    return f"{_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
