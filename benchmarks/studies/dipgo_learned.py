"""The paper's learned search on a digits model with as many iterations as the paper gives it, for `dipgo.py` to compare with.

    python -m benchmarks.studies.dipgo_learned dit --out benchmarks/results/dipgo_learned_dit.json

One search serves every budget, so what is written are the gates' scores. An interrupted run goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from sdfp_vllm.common.progress import stages
from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.dipgo.learn import LearnSettings, learn_scores
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.dipgo.task import Task, task_of
from sdfp_vllm.errors import SdfpError
from tests.toy.digits.pipelines import digits_folder, digits_pipeline

STEPS, GUIDANCE = 20, 4.0


@dataclass(frozen=True)
class LearnedRun:
    """Scores (steps, units) of the gates, and what they took; CPU seconds of a resumed run are those of its last part."""

    scores: NDArray[np.float64]
    iterations: int
    cpu_seconds: float


def learned_task(sampler: Sampler) -> Task:
    """What the paper searches over: blocks, whose last outputs are reused."""
    return task_of(sampler, "block", "output", 0, 1.0)


def load_run(path: Path, model: str, guidance: float) -> LearnedRun:
    """A run that this study wrote for `model`.

    Raises:
        SdfpError: If it is of another model or guidance.
    """
    held = json.loads(path.read_text())
    if (held["model"], held["guidance"]) != (model, guidance):
        raise SdfpError(
            f"--learned {path}",
            f"is of {held['model']} at guidance {held['guidance']:g}, not of {model} at {guidance:g}",
            "Give that model's file.",
        )
    return LearnedRun(np.array(held["scores"]), held["settings"]["iterations"], held["cpu_seconds"])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=["dit", "unet", "flow"])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--iterations", type=int, default=1000)
    p.add_argument("--guidance", type=float, default=GUIDANCE)
    p.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    a = p.parse_args()
    torch.set_num_threads(1)
    pipe = digits_pipeline(a.model)
    sampler = Sampler(pipe, load_conditions(pipe, digits_folder(a.model)), STEPS, a.guidance)
    task = learned_task(sampler)
    # The paper's rates for DiT and for U-Nets.
    settings = LearnSettings(
        iterations=a.iterations, learning_rate=10.0 if task.layout.residual else 0.1, width=256
    )
    began = time.process_time()
    with stages(Console(width=130)) as progress, progress.step("DiP-GO", a.iterations) as advance:
        scores = learn_scores(
            sampler, task.layout, task.macs, task.reuse, settings, a.out.with_suffix(".state"), a.resume, advance
        )  # fmt: skip
    content = {
        "model": a.model,
        "guidance": a.guidance,
        "settings": asdict(settings),
        "cpu_seconds": time.process_time() - began,
        "resumed": a.resume,
        "provenance": provenance(),
        "scores": scores.round(6).tolist(),
    }
    save_results(a.out, content)


if __name__ == "__main__":
    sys.exit(main())
