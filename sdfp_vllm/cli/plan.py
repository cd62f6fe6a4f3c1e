"""The `sdfp plan` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sdfp_vllm.errors import SdfpError

# What --refresh-costs takes beside a plan: all else belongs to a search.
_REFRESHED = {"model", "refresh_costs", "revision", "dtype", "eager", "check", "trust_remote_code", "out"}


def plan_command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a model, or its Hugging Face id.", show_default="with --refresh-costs the plan's"
        ),
    ] = None,
    refresh_costs: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN",
            help="Measure only the costs of this plan's folder, as on a machine of another kind; the result goes to -o, the plan stays.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id (default: the hub's).")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, .jsonl of chats (which may show images) or texts, or dataset; without it, chats that the model makes up, or for a "
            "model without a chat template the Python standard library's sources."
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Text field of a .jsonl file or dataset.")] = "text",
    sequences: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 8,
    length: Annotated[int, typer.Option(min=16, help="Tokens in each window.")] = 256,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Keep this many layers (default: searched).")
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(min=1, help="Draft this many tokens a round (default: searched).")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the checkpoint's.")
    ] = "auto",
    selector: Annotated[
        Literal["auto", "fit", "gradient"],
        typer.Option(
            help="auto: FIT's choice, improved by a local search; fit: the paper's; gradient: learned gates."
        ),
    ] = "auto",
    score_form: Annotated[
        Literal["trace", "diagonal"], typer.Option(help="Form of the FIT score.")
    ] = "trace",
    bridge: Annotated[
        Literal["none", "bias", "affine", "low-rank", "auto"],
        typer.Option(help="Map over skipped layers; auto: whichever is fastest."),
    ] = "none",
    head: Annotated[
        str,
        typer.Option(
            help="Tokens a draft can propose: full, their number, or auto (fewer where that is faster)."
        ),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "full", "int8", "fp8", "int4", "mxfp4"],
        typer.Option(help="What drafts may run at; auto: whatever this machine has kernels for."),
    ] = "auto",
    extra_memory: Annotated[
        str | None,
        typer.Option(help="Most that rounded copies of weights may take: 500MB, or 30% of the model's."),
    ] = None,
    window: Annotated[
        str,
        typer.Option(
            help="Last tokens of a long context that drafts attend to; none: all of it; auto: what the check measures to be fastest."
        ),
    ] = "auto",
    score_text: Annotated[
        Literal["own", "corpus"], typer.Option(help="Text for the Fisher traces; own: what the model writes.")
    ] = "own",
    eager: Annotated[
        bool, typer.Option("--eager", help="Plan for an engine that runs with --enforce-eager.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="End with plain decoding and the plan on the engine; with --refresh-costs: ask an engine what it adds.",
        ),
    ] = True,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway",
            help="Go on where costs alone say that drafts cannot pay, and with an untried model family.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the choice of calibration text.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with Fisher scores that were interrupted.")
    ] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Score the layers on a Ray cluster.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers (default: one per GPU, without GPUs one per node).")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the Ray cluster, or auto (default: RAY_ADDRESS, or here)."),
    ] = None,
    gpus_per_worker: Annotated[
        int | None, typer.Option(min=1, help="Split the model over this many GPUs of each Ray worker.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Output folder (default: where the engine looks by itself)."),
    ] = None,
) -> None:
    """Find which view of MODEL drafts best on this machine, and write the plan."""
    from rich.console import Console

    from sdfp_vllm.common.terminal import console
    from sdfp_vllm.plan.parcel import PLAN_FILE
    from sdfp_vllm.plan.show import summary
    from sdfp_vllm.plan.store import default_plan_dir
    from sdfp_vllm.planner.job import make_plan
    from sdfp_vllm.ray.cluster import RayOptions

    if refresh_costs is not None:
        _refuse_others(context)
        _refresh(refresh_costs, model, revision, dtype, eager, check, trust_remote_code, out)
        return
    if model is None:
        raise SdfpError("MODEL", "is missing", "Give the folder of a model, or its Hugging Face id.")
    made = make_plan(
        model,
        out=out,
        console=Console(stderr=True),
        revision=revision,
        calibration=calibration,
        field=field,
        sequences=sequences,
        length=length,
        layers=layers,
        draft_tokens=draft_tokens,
        dtype=dtype,
        selector=selector,
        score_form=score_form,
        bridge=bridge,
        head=head,
        precision=precision,
        extra_memory=extra_memory,
        window=window,
        score_text=score_text,
        eager=eager,
        run_check=check,
        anyway=anyway,
        trust_remote_code=trust_remote_code,
        seed=seed,
        resume=resume,
        ray=RayOptions.from_flags(ray, workers=workers, address=address, gpus_per_worker=gpus_per_worker),
    )
    # soft_wrap: a path or a command broken over lines cannot be copied.
    console().print(summary(made, (out or default_plan_dir(made.fingerprint)) / PLAN_FILE), soft_wrap=True)


def _refuse_others(context: typer.Context) -> None:
    """Raises SdfpError for an option that was given and that --refresh-costs has no use for."""
    for name in context.params:
        source = context.get_parameter_source(name)  # by name: typer may carry a click of its own
        if source is not None and source.name != "DEFAULT" and name not in _REFRESHED:
            raise SdfpError(
                f"--{name.replace('_', '-')}",
                "means nothing with --refresh-costs, which keeps the plan's view and measures costs alone",
                "Leave it out, or leave out --refresh-costs for a new search.",
            )


def _refresh(
    plan: Path,
    model: str | None,
    revision: str | None,
    dtype: str,
    eager: bool,
    check: bool,
    trust_remote_code: bool,
    out: Path | None,
) -> None:
    """`sdfp plan --refresh-costs PLAN`."""
    from rich.console import Console

    from sdfp_vllm.common.terminal import console
    from sdfp_vllm.plan.parcel import PLAN_FILE
    from sdfp_vllm.plan.show import parts, summary
    from sdfp_vllm.planner.options import PlanOptions
    from sdfp_vllm.planner.refresh import refresh_costs

    done = refresh_costs(
        plan,
        model,
        out=out,
        options=PlanOptions(
            revision=revision, dtype=dtype, eager=eager, run_check=check, trust_remote_code=trust_remote_code
        ),
        console=Console(stderr=True),
    )
    console().print(summary(done.plan, done.folder / PLAN_FILE), soft_wrap=True)
    if done.other is not None:
        console().print(
            f"Of the views that were tried, {parts(done.other)} layers would be faster here ({done.other_speedup:.2f}x "
            f"predicted): `sdfp plan {done.plan.model_argument}` searches anew.",
            soft_wrap=True,
        )
