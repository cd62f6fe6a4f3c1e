"""A diffusion plan for people: verdict, tables and picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table

from sdfp_vllm.dipgo.plan import DipgoPlan
from sdfp_vllm.errors import SdfpError

_REUSE = {("output", 0): "last output", ("output", 1): "line through the last two outputs",
          ("residual", 0): "last residual", ("residual", 1): "line through the last two residuals"}  # fmt: skip


def verdict(plan: DipgoPlan) -> str:
    """One sentence: what the plan saves, and what it costs in likeness."""
    full, spent = plan.macs.per_image(plan.gates | True), plan.macs.per_image(plan.gates)
    text = (
        f"{plan.compute_share:.1%} of the compute ({tera(spent)} of {tera(full)} per image, {plan.scheduler.name}, "
        f"{plan.scheduler.num_inference_steps} steps), {int((~plan.gates).sum())} of {plan.gates.size} "
        f"{plan.granularity} gates closed, taking "
        + ("a forecast of its own for each" if plan.forecasts else f"the {_REUSE[plan.reuse, plan.order]}")
    )
    if plan.latency:
        text += (
            f"; predicted {plan.latency_share:.2f} of the full run's time "
            f"({plan.latency.seconds(plan.gates):.3g} s of {plan.latency.full:.3g} s "
            f"for {plan.latency.images} at once on {plan.latency.machine})"
        )
    if plan.quality:
        q = plan.quality
        text += f"; against the full run PSNR {q.psnr:.1f} dB, SSIM {q.ssim:.4f} on {q.images} unseen seeds"
        if q.time is not None:
            text += f", which took {q.time:.2f} of its time"
    if plan.native:
        text += f"; {plan.native.steps} native steps reach {plan.native.psnr:.1f} dB on them"
    return text + "." + (f" {nothing_better(plan)}" if plan.beaten else "")


def nothing_better(plan: DipgoPlan) -> str:
    """What to do instead of a plan that fewer steps are as near as."""
    assert plan.native is not None
    return (
        f"NOTHING FOUND IS NEARER THAN FEWER STEPS: within {plan.made.budget:.0%} of the {plan.made.cost}, run the "
        f"pipeline without a plan and with num_inference_steps={plan.native.steps}."
    )


def tera(macs: int) -> str:
    """MACs with a prefix: 16.94 TMAC."""
    for size, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if macs >= size:
            return f"{macs / size:.2f} {prefix}MAC"
    return f"{macs} MAC"


def tables(plan: DipgoPlan) -> Group:
    """What `sdfp dipgo show` prints: a row per unit, a column per call."""
    table = Table("unit", "MACs", "runs", f"calls 0 to {len(plan.executed) - 1}", title="Gates")
    gates = plan.gates
    for i, unit in enumerate(plan.units):
        marks = "".join("█" if g else "·" for g in gates[:, i])
        table.add_row(unit.title, tera(plan.macs.units[i]), f"{gates[:, i].sum()}/{len(gates)}", marks)
    made = plan.made
    return Group(
        f"{plan.pipeline} ({plan.fingerprint.denoiser})",
        verdict(plan),
        table,
        f"Made {made.created} by the {made.method} search (budget {made.budget:g} of {made.cost}, guidance "
        f"{made.guidance_scale:g}, seed {made.seed}) in {made.search_seconds:.0f} s; sdfp {made.sdfp_version}, "
        f"torch {made.torch_version}, diffusers {made.diffusers_version}.",
    )


def pyplot():  # type: ignore[no-untyped-def]
    """matplotlib's pyplot without a screen.

    Raises:
        SdfpError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise SdfpError(
            "--png", "matplotlib is not installed", "Install it: pip install 'sdfp-vllm[plot]'."
        ) from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_png(plan: DipgoPlan, path: Path) -> None:
    """Draws the gates: units over calls, dark where a unit runs.

    Raises:
        SdfpError: If matplotlib is not installed or `path` cannot be written.
    """
    plt = pyplot()
    calls, units = plan.gates.shape
    figure, axes = plt.subplots(
        figsize=(max(4, calls * 0.22), max(2, units * 0.3 + 1.2)), layout="constrained"
    )
    axes.imshow(plan.gates.T, cmap="Blues", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(units), [unit.title for unit in plan.units], fontsize=7)
    axes.set_xlabel("denoiser call")
    axes.set_title(f"{plan.compute_share:.1%} of the compute: dark runs, light is reused", fontsize=9)
    save_figure(figure, path)
    plt.close(figure)


def save_figure(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise SdfpError(
            f"--png {path}", f"cannot be written ({e})", "Give a .png in a folder you own."
        ) from e
