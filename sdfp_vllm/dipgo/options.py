"""What can be asked of a search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sdfp_vllm.dipgo.budget import check_cost
from sdfp_vllm.dipgo.cost import CostName
from sdfp_vllm.dipgo.layout import Granularity
from sdfp_vllm.dipgo.objective import Consistency
from sdfp_vllm.errors import SdfpError

Method = Literal["fisher", "learned"]


@dataclass(frozen=True)
class SearchOptions:
    """What the user can ask of the search.

    Attributes:
        method: "fisher" (surrogate and refinement; ours) or "learned" (the paper's pruner network).
        granularity, reuse, order: None: for "fisher", what does best of all; for "learned", the paper's.
        budget: Share of the full run's cost that may be spent.
        cost: What the budget is a share of: MACs, or latency measured here.
        latency_images: Images that are generated at once when latency is measured.
        images: Images that a recording runs at once. Three times as many are recorded, others compared and judged on (`curve.py`).
        projections: Backward passes of a recording.
        memory: Bytes that a recording may hold in memory beside the model (None: half of what is free); more goes to files.
        rounds: Of refinement.
        test_images: That the plan's quality is stated on.
        iterations, learning_rate, consistency: Of the paper's search (None: its rate).
        resume: Go on with a search that was interrupted.
        layout: File with a description of the denoiser's blocks (`signature.save_layout`), for a class that cannot be read.
        arguments: Further arguments of the pipeline's call, as ("height", 512).
    """

    steps: int = 50
    budget: float = 0.5
    cost: CostName = "macs"
    latency_images: int = 1
    method: Method = "fisher"
    granularity: Granularity | None = None
    reuse: Literal["output", "residual"] | None = None
    order: int | None = None
    guidance_scale: float = 4.0
    prompts: Path | None = None
    dtype: str = "float32"
    images: int = 8
    projections: int = 4
    memory: int | None = None
    rounds: int = 4
    test_images: int = 16
    iterations: int = 200
    learning_rate: float | None = None
    consistency: Consistency = "ssim"
    seed: int = 0
    resume: bool = False
    layout: Path | None = None
    arguments: tuple[tuple[str, Any], ...] = ()


def check(options: SearchOptions) -> None:
    """Refuses options that no pipeline can meet."""
    for flag, value, low in (
        ("--steps", options.steps, 2),
        ("--images", options.images, 1),
        ("--projections", options.projections, 1),
        ("--rounds", options.rounds, 0),
        ("--test-images", options.test_images, 1),
        ("--iterations", options.iterations, 1),
        ("--latency-images", options.latency_images, 1),
    ):
        if value < low:
            raise SdfpError(flag, f"is {value}", f"Give at least {low}.")
    if options.memory is not None and options.memory < 1:
        raise SdfpError("--memory", f"is {options.memory}", "Give an amount such as 8GiB.")
    if not 0 < options.budget <= 1:
        raise SdfpError(
            "--budget", f"is {options.budget:g}", "Give the share of the full run to spend, in (0, 1]."
        )
    check_cost(options.cost)
    for flag, text, known in (
        ("--method", options.method, ("fisher", "learned")),
        ("--granularity", options.granularity, (None, *get_args(Granularity))),
        ("--reuse", options.reuse, (None, "output", "residual")),
        ("--order", options.order, (None, 0, 1)),
        ("--consistency", options.consistency, ("ssim", "latents")),
    ):
        if text not in known:
            choices = ", ".join(str(k) for k in known if k is not None)
            raise SdfpError(flag, f"{text} is unknown", f"Choose from {choices}.")
    if options.method == "learned" and options.order == 1:
        raise SdfpError("--order 1", "the learned search reuses the last value only", "Use --method fisher.")
    if options.method == "learned" and options.granularity == "guidance":
        raise SdfpError("--granularity guidance", "is not for the learned search", "Use --method fisher.")
    if options.granularity == "guidance" and options.reuse == "residual":
        raise SdfpError(
            "--reuse residual", "is for blocks, and guidance reuses outputs", "Use --reuse output."
        )
    if options.method == "learned" and options.memory is not None:
        raise SdfpError("--memory", "is for recordings, and the learned search makes none", "Leave it out.")
    if options.resume and options.method != "learned":
        raise SdfpError(
            "--resume", "only the learned search keeps a state", "Leave it out; this search takes minutes."
        )
