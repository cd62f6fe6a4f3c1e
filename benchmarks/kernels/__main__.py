"""Benchmarks of the kernels in `kernels/`: time, bytes, and the share of the GPU's copy bandwidth, as one CSV.

    python -m benchmarks.kernels [--out benchmarks/results/kernels.csv] [--only OP]

Without a GPU it prints the bytes each op must move and times nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.kernels import (
    bench_draft_begin,
    bench_draft_step,
    bench_embed_rms_norm,
    bench_skip_residual_rms_norm,
    bench_skip_residual_rms_norm_rounded,
)
from benchmarks.kernels.measure import measure, print_bytes, write_csv

OPS = (
    bench_skip_residual_rms_norm,
    bench_skip_residual_rms_norm_rounded,
    bench_embed_rms_norm,
    bench_draft_begin,
    bench_draft_step,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.csv"))
    parser.add_argument("--only", help="an op's name")
    asked = parser.parse_args()
    cases = [c for op in OPS for c in op.cases() if asked.only in (None, c.op)]
    if not cases:
        parser.error(f"--only {asked.only}: the ops are {', '.join(op.cases()[0].op for op in OPS)}")
    if not torch.cuda.is_available():
        print_bytes(cases)
        return
    write_csv(measure(cases), asked.out)
    print(f"Wrote {asked.out}")


if __name__ == "__main__":
    main()
