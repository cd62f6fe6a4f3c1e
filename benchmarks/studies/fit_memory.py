"""Time and peak memory of the streamed FIT job against plain autograd, at two model sizes.

Plain: backward() leaves the gradients of all layers, which are then reduced. Streamed:
sdfp_vllm.planner.fisher reduces and frees each gradient as it appears. Both score the same
parameters on the same windows. Every measurement is a fresh process, so that its resident-set
high-water mark is its own; time is CPU time, the median window's, so that other load on the
machine counts little. Prints a table and writes benchmarks/results/fit_memory.json.

    python -m benchmarks.studies.fit_memory [--windows 3] [--length 128]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common.published import RESULTS

RESULT = RESULTS / "fit_memory.json"
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
    },
    "large": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 17,
        "num_attention_heads": 12,
    },
}
METHODS = ("plain", "streamed")


def measure(size: str, method: str, windows: int, length: int) -> dict[str, float]:
    """Runs in a process of its own: scores random windows on a random Llama, float32."""
    import statistics
    import time

    import psutil
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from sdfp_vllm.planner.fisher import fisher_sums
    from sdfp_vllm.planner.stack import DecoderStack

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, tie_word_embeddings=True, **SIZES[size])).eval()
    stack = DecoderStack(model)
    ids = torch.randint(0, 2048, (windows, length))
    loaded = psutil.Process().memory_info().rss
    ends = [time.process_time()]
    if method == "streamed":
        trace = fisher_sums(stack, ids, advance=lambda _: ends.append(time.process_time())).sums[..., 0].sum()
    else:
        model.requires_grad_(False)
        parameters = [p for i in range(stack.num_layers) for _, p in stack.layer_parameters(i)]
        trace = torch.zeros((), dtype=torch.float64)
        for p in parameters:
            p.requires_grad_(True)
        for window in ids:
            loss = F.cross_entropy(stack.logits(window[None])[0, :-1], window[1:], reduction="sum")
            loss.backward()
            for p in parameters:
                assert p.grad is not None
                trace += p.grad.square().sum()
                (p.grad * p.detach()).square().sum()
                p.grad = None
            ends.append(time.process_time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
        "peak_rss_mib": peak / 2**20,
        "over_loaded_mib": (peak - loaded) / 2**20,
        "cpu_seconds_per_window": statistics.median(b - a for a, b in pairwise(ends)),
        "fisher_trace": trace.item() / windows,
    }


def provenance(argv: list[str]) -> dict[str, object]:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()

    cpus = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "command": " ".join(["python", "-m", "benchmarks.studies.fit_memory", *argv]),
        "git_sha": git("rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": os.cpu_count(),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "load_average_before": os.getloadavg()[0],
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--windows", type=int, default=3, help="calibration windows scored (median CPU time is reported)"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens a window")
    parser.add_argument("--measure", nargs=2, metavar=("SIZE", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        size, method = args.measure
        print(json.dumps(measure(size, method, args.windows, args.length)))
        return

    # The parent stays small: a child's high-water mark starts at its parent's.
    from rich.console import Console
    from rich.table import Table

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    made = provenance(sys.argv[1:])
    results: dict[str, dict[str, dict[str, float]]] = {}
    for size in SIZES:
        for method in METHODS:
            command = [sys.executable, __file__, "--windows", str(args.windows), "--length", str(args.length)]
            out = subprocess.run(
                [*command, "--measure", size, method], stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            results.setdefault(size, {})[method] = json.loads(out.splitlines()[-1])
        traces = [results[size][m]["fisher_trace"] for m in METHODS]
        assert abs(traces[0] / traces[1] - 1) < 1e-4, f"methods disagree at {size}: {traces}"

    table = Table(title=f"FIT over {args.windows} windows of {args.length} tokens, float32")
    for column in ("model", "weights", "method", "peak RSS", "over the loaded model", "CPU s / window"):
        table.add_column(column, justify="left" if column in ("model", "method") else "right")
    for by_method in results.values():
        for method, r in by_method.items():
            table.add_row(
                f"{r['parameters'] / 1e6:.0f}M",
                f"{r['weights_mib']:.0f} MiB",
                method,
                f"{r['peak_rss_mib']:.0f} MiB",
                f"{r['over_loaded_mib']:.0f} MiB",
                f"{r['cpu_seconds_per_window']:.2f}",
            )
    small, large = results["small"], results["large"]
    fields = ("parameters", "peak_rss_mib", "over_loaded_mib", "cpu_seconds_per_window")
    growth = {m: {f: large[m][f] / small[m][f] for f in fields} for m in METHODS}
    for method, g in growth.items():
        table.add_row(
            "growth",
            f"{g['parameters']:.2f}x",
            method,
            f"{g['peak_rss_mib']:.2f}x",
            f"{g['over_loaded_mib']:.2f}x",
            f"{g['cpu_seconds_per_window']:.2f}x",
            style="bold",
        )
    Console().print(table)
    print(made["command"])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"made": made, "results": results, "growth": growth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
