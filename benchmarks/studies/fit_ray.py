"""FIT's time on Ray workers against model size and workers: the cost model of docs/use/scaling.md, and its check.

    T = start + load + ceil(N / W) * c * P * L

with N windows of L tokens on W workers, P parameters, and c the seconds per parameter and token. c and
`start + load` are taken from the smaller model on one worker; the larger model on one and on two
workers are the two points the model is checked on. Workers have one thread each, and T is the CPU time
of the busiest: what the job takes where every worker has a core to itself, and little disturbed by other
load. The wall time is given beside it. Random Llamas, float32. Prints a table and writes
benchmarks/results/fit_ray.json.

    python -m benchmarks.studies.fit_ray [--windows 8] [--length 128]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.published import RESULTS
from benchmarks.studies.fit_memory import SIZES
from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.planner.ray_fisher import FisherJob, ray_fisher_sums
from sdfp_vllm.ray.cluster import RayOptions, ray_cluster

RESULT = RESULTS / "fit_ray.json"
VOCABULARY = 2048


def save_model(size: str, folder: Path) -> int:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SIZES[size]))
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def worker_seconds() -> list[float]:
    """CPU seconds so far of every Fisher worker below this process."""
    seconds = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::FisherWorker"):
                times = process.cpu_times()
                seconds.append(times.user + times.system)
        except psutil.Error:
            continue
    return seconds


def measure(folder: Path, parameters: int, workers: int, windows: int, length: int) -> dict[str, Any]:
    """One job: the busiest worker's CPU seconds, those of a window, and the wall seconds of all."""
    ids = torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(0))
    job = FisherJob(str(folder), fingerprint(folder), ids, None, "benchmark")
    began, readings = time.perf_counter(), []

    def advance(count: int, title: str | None = None) -> None:
        if count:
            readings.append(worker_seconds())

    with tempfile.TemporaryDirectory() as out:
        sums = ray_fisher_sums(
            job, RayOptions(workers=workers), checkpoint=Path(out) / "sums", advance=advance
        )
    # From the first window's end to the last's, by when every worker has been at work throughout.
    spent = sum(readings[-1]) - sum(readings[workers - 1])
    return {
        "parameters": parameters,
        "workers": workers,
        "windows": windows,
        "length": length,
        "busiest_worker_seconds": max(readings[-1]),
        "seconds_per_window": spent / (windows - workers),
        "wall_seconds": time.perf_counter() - began,
        "sums": sums.sums.sum().item(),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    points = []
    with tempfile.TemporaryDirectory() as root, ray_cluster("local", where="benchmark", cpus=2):
        for size, workers in (("small", 1), ("large", 1), ("large", 2)):
            folder = Path(root) / size
            parameters = points[-1]["parameters"] if folder.exists() else save_model(size, folder)
            points.append(measure(folder, parameters, workers, options.windows, options.length))
    base = points[0]
    c = base["seconds_per_window"] / base["parameters"] / options.length
    start = base["busiest_worker_seconds"] - options.windows * base["seconds_per_window"]
    for p in points:
        rounds = math.ceil(options.windows / p["workers"])
        p["predicted_seconds"] = start + rounds * c * p["parameters"] * options.length
        p["error"] = p["predicted_seconds"] / p["busiest_worker_seconds"] - 1
        print(
            f"{p['parameters'] / 1e6:6.1f}M, {p['workers']} workers: {p['busiest_worker_seconds']:6.1f} s, "
            f"predicted {p['predicted_seconds']:6.1f} s ({p['error']:+.0%}), "
            f"wall {p['wall_seconds']:.0f} s at load {p['load_average']:.1f}"
        )
    result = {"made": provenance(), "c": c, "start": start, "points": points}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"c = {c:.3g} s per parameter and token, start {start:.1f} s; wrote {RESULT}")


if __name__ == "__main__":
    main()
