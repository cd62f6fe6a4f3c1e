"""Peak memory of one iteration of the learned DiP-GO search, with and without gradient checkpointing.

    python -m benchmarks.studies.dipgo_memory --out benchmarks/results/dipgo_memory.json

Each case is a process of its own; the figure is the growth of its peak resident memory over that
after one plain generation of the same images.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from sdfp_vllm.common.provenance import provenance


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def case(checkpointed: bool, images: int, steps: int) -> dict[str, float]:
    import torch

    from sdfp_vllm.dipgo.families import layout_of
    from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
    from sdfp_vllm.dipgo.supernet import SuperNet
    from tests.toy.digits.pipelines import digits_folder, digits_pipeline

    torch.set_num_threads(1)
    pipe = digits_pipeline("dit")
    sampler = Sampler(pipe, load_conditions(pipe, digits_folder("dit")), steps, 2.0)
    layout = layout_of(sampler.denoiser, "block")
    seeds = list(range(images))
    sampler.latents(seeds)
    before = peak_mib()
    gates = torch.ones(sampler.calls, len(layout.units), requires_grad=True)
    began = time.process_time()
    with SuperNet(sampler, layout, "residual", checkpointed) as net:
        net.latents(seeds, gates).square().sum().backward()
    return {"growth_mib": peak_mib() - before, "cpu_seconds": time.process_time() - began}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path)
    p.add_argument("--images", type=int, default=8)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--case", choices=["on", "off"], help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.case:
        print(json.dumps(case(a.case == "on", a.images, a.steps)))
        return
    results = {}
    for name in ("on", "off"):
        command = [
            sys.executable,
            __file__,
            "--case",
            name,
            "--images",
            str(a.images),
            "--steps",
            str(a.steps),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"checkpointing {name}: {results[name]}")
    if a.out:
        content = {"images": a.images, "steps": a.steps, "checkpointing": results, "provenance": provenance()}
        a.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
