"""`sdfp dipgo`: search and show plans for diffusion pipelines. Everything heavy is imported inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

dipgo_app = typer.Typer(no_args_is_help=True, help="Skip the work a diffusion model hardly needs (DiP-GO).")

_Out = Annotated[Path, typer.Option("-o", "--out", help="Plan file (.json) or folder for it.")]

_Cost = Annotated[
    str, typer.Option(help="What a budget is a share of: macs, or latency as measured on this machine.")
]


@dipgo_app.command("search")
def search_command(
    pipeline: Annotated[Path, typer.Argument(help="Folder of a diffusers pipeline.")],
    steps: Annotated[int, typer.Option(help="num_inference_steps the plan is for.")] = 50,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the full run to spend, in --cost (default: 0.5); several: a plan for each, in a folder."
        ),
    ] = None,
    cost: _Cost = "macs",
    latency_images: Annotated[
        int, typer.Option(help="Images generated at once when latency is measured.")
    ] = 1,
    method: Annotated[
        str, typer.Option(help="fisher (recorded sensitivities, refined) or learned (the paper's pruner).")
    ] = "fisher",
    granularity: Annotated[
        str | None,
        typer.Option(
            help="branch (attention and MLP), block, step or guidance (steps, and the half of the batch without the condition); "
            "default: fisher tries all there are, learned takes block."
        ),
    ] = None,
    reuse: Annotated[
        str | None, typer.Option(help="output, or residual: what a block adds (transformers only).")
    ] = None,
    order: Annotated[
        int | None,
        typer.Option(help="0 reuses the last value, 1 the straight line through two (default: tried)."),
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="Of the pipeline's call.")] = 4.0,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt per line.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    images: Annotated[int, typer.Option(help="Images a recording runs at once.")] = 8,
    projections: Annotated[int, typer.Option(help="Backward passes of a recording.")] = 4,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most that a recording may hold in memory beside the model: 8GiB, or 30% of what is free (default: 50%). "
            "What is beyond it goes to temporary files."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of refinement on real generations.")] = 4,
    test_images: Annotated[int, typer.Option(help="Images the plan's quality is stated on.")] = 16,
    iterations: Annotated[int, typer.Option(help="Of the learned search.")] = 200,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the learned search (default: the paper's 0.1, transformers 10).")
    ] = None,
    consistency: Annotated[str, typer.Option(help="Loss of the learned search: ssim or latents.")] = "ssim",
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a learned search.")] = False,
    arguments: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, an argument of the pipeline's call: --set height=512."),
    ] = None,
    layout: Annotated[
        Path | None, typer.Option(help="JSON description of blocks, for a class that DiP-GO cannot read.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write the plan even if native fewer steps are as near.")
    ] = False,
    out: _Out = Path("."),
) -> None:
    """Find which blocks of PIPELINE need not run in which steps, and write the plan.

    No plan is written if the pipeline itself, with fewer steps, is as near to the full run for the same cost: the report says
    so, and with how many. A learned search is always written, for its scores serve other budgets.
    """
    from rich.console import Console

    from sdfp_vllm.common.amount import bytes_of
    from sdfp_vllm.common.terminal import console
    from sdfp_vllm.dipgo.job import SearchOptions, search_each
    from sdfp_vllm.dipgo.plan import plan_path
    from sdfp_vllm.dipgo.report import verdict
    from sdfp_vllm.dipgo.room import free_memory
    from sdfp_vllm.errors import SdfpError

    options = SearchOptions(
        steps=steps,
        cost=cost,  # type: ignore[arg-type]
        latency_images=latency_images,
        method=method,  # type: ignore[arg-type]  # search() refuses what it does not know
        granularity=granularity,  # type: ignore[arg-type]
        reuse=reuse,  # type: ignore[arg-type]
        order=order,
        guidance_scale=guidance_scale,
        prompts=prompts,
        dtype=dtype,
        images=images,
        projections=projections,
        memory=None if memory is None else bytes_of("--memory", memory, free_memory()),
        rounds=rounds,
        test_images=test_images,
        iterations=iterations,
        learning_rate=learning_rate,
        consistency=consistency,  # type: ignore[arg-type]
        seed=seed,
        resume=resume,
        layout=layout,
        arguments=tuple(_argument(text) for text in arguments or ()),
    )
    budgets = budget or [options.budget]
    each = len(budgets) > 1
    if each and out.suffix == ".json":
        raise SdfpError(
            f"--out {out}", "is one file, and several budgets make several plans", "Give a folder."
        )
    for plan in search_each(pipeline, options, budgets, plan_path(out), Console(stderr=True)):
        if plan.beaten and plan.scores is None and not keep:
            console().print(
                f"{verdict(plan)}\nNo plan written; --keep writes it all the same.", soft_wrap=True
            )
            continue
        path = plan.save(out / f"{plan.made.budget:g}" if each else out)
        console().print(f"{verdict(plan)}\nPlan: {path}", soft_wrap=True)


def _argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE, with VALUE as JSON where it is that, else as text."""
    from sdfp_vllm.errors import SdfpError

    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise SdfpError(f"--set {text}", "is not NAME=VALUE", "Write --set height=512.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@dipgo_app.command("show")
def show_command(
    plan: Annotated[Path, typer.Argument(help="Plan file or its folder.")],
    png: Annotated[Path | None, typer.Option(help="Draw the gates into this file.")] = None,
) -> None:
    """Show a plan: which units run in which call, what that costs, how close the images are."""
    from sdfp_vllm.common.terminal import console
    from sdfp_vllm.dipgo.plan import load_plan
    from sdfp_vllm.dipgo.report import draw_png, tables

    loaded = load_plan(plan)
    console().print(tables(loaded))
    if png:
        draw_png(loaded, png)
        typer.echo(f"Wrote {png}")


@dipgo_app.command("budget")
def budget_command(
    plan: Annotated[Path, typer.Argument(help="Plan of a learned search.")],
    budget: Annotated[float, typer.Argument(help="Share of the full run to spend, in --cost.")],
    out: _Out,
    cost: _Cost = "macs",
) -> None:
    """Make a plan for another budget from a learned search, without searching again."""
    from sdfp_vllm.common.terminal import console
    from sdfp_vllm.dipgo.budget import rebudget
    from sdfp_vllm.dipgo.plan import load_plan
    from sdfp_vllm.dipgo.report import verdict

    made = rebudget(load_plan(plan), budget, cost)  # type: ignore[arg-type]  # refuses what it does not know
    path = made.save(out)
    console().print(f"{verdict(made)}\nPlan: {path}", soft_wrap=True)
