"""Timing of one op on a GPU against the machine's own copy bandwidth; what every `bench_*.py` here gives."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

from sdfp_vllm.common.source_tree import git_sha


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        moved: Bytes that must be read and written at least once, caches empty.
        providers: Name -> a function that sets up tensors and returns the call to be timed. The first is
            ours; one that cannot be imported is left out by its author.
    """

    op: str
    shape: str
    dtype: str
    moved: int
    providers: dict[str, Callable[[], Callable[[], object]]]


@dataclass(frozen=True)
class Row:
    """A line of the CSV. `share` is bytes per second over those of a large copy on the same GPU."""

    op: str
    shape: str
    dtype: str
    provider: str
    bytes: int
    microseconds: float
    gb_per_s: float
    share: float
    device: str
    torch: str
    triton: str
    git_sha: str


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a 1 GiB device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (_milliseconds(lambda: target.copy_(source)) * 1e-3)


def measure(cases: Sequence[Case]) -> list[Row]:
    """Times every provider of every case, replayed from a CUDA graph as the engine does."""
    import triton

    roof = copy_bandwidth()
    rows = []
    for case in cases:
        for name, make in case.providers.items():
            ms = _milliseconds(make())
            rate = case.moved / (ms * 1e-3)
            rows.append(
                Row(
                    case.op,
                    case.shape,
                    case.dtype,
                    name,
                    case.moved,
                    round(ms * 1e3, 2),
                    round(rate * 1e-9, 1),
                    round(rate / roof, 4),
                    torch.cuda.get_device_name(),
                    torch.__version__,
                    triton.__version__,
                    git_sha() or "",
                )
            )
            print(*astuple(rows[-1])[:8], sep="\t", flush=True)
    return rows


def importable(name: str) -> bool:
    """Whether a rival is here to be timed."""
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as f:
        lines = csv.writer(f)
        lines.writerow(field.name for field in fields(Row))
        lines.writerows(astuple(row) for row in rows)
    os.replace(part, path)


def print_bytes(cases: Sequence[Case]) -> None:
    """What can be said without a GPU."""
    print(f"No CUDA GPU on this machine ({platform.machine()}): nothing was timed. Bytes each op must move:")
    for case in cases:
        print(case.op, case.shape, case.dtype, f"{case.moved:,} bytes", sep="\t")


def _milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=100, return_mode="median"))
