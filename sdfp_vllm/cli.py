"""The `sdfp` command. Everything heavy is imported inside the commands, so that help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sdfp_vllm.batch.command import batch_command
from sdfp_vllm.demo.command import demo_command
from sdfp_vllm.dipgo.command import dipgo_app
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.generate import generate_command

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


class _Commands(TyperGroup):
    """Turns a refusal into one red line and exit code 2, and Ctrl-C into 130; no traceback for either."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SdfpError as e:
            typer.secho(f"Error: {e}", fg="red", err=True)
            raise typer.Exit(2) from e
        except KeyboardInterrupt as e:
            hint = " `--resume` goes on from here." if ctx.invoked_subcommand in ("plan", "batch") else ""
            typer.secho(f"Interrupted.{hint}", fg="red", err=True)
            raise typer.Exit(INTERRUPTED) from e


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Faster decoding in vLLM from the model you already serve.",
)


def _say_version(asked: bool) -> None:
    if asked:
        from sdfp_vllm import __version__

        typer.echo(f"sdfp-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and end.")
    ] = False,
) -> None:
    """Keeps `sdfp COMMAND` the form of every call."""


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its Hugging Face id.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id (default: the hub's).")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, .jsonl of chats or texts, or dataset; without it, chats that the model makes up, or for a "
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
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    selector: Annotated[
        str,
        typer.Option(
            help="auto (FIT's choice, improved by a local search), fit (the paper's), or gradient (learned gates)."
        ),
    ] = "auto",
    score_form: Annotated[str, typer.Option(help="FIT score: trace or diagonal.")] = "trace",
    bridge: Annotated[
        str,
        typer.Option(
            help="Map over skipped layers: none, bias, affine, low-rank, or auto (whichever is fastest)."
        ),
    ] = "none",
    head: Annotated[
        str,
        typer.Option(
            help="Tokens a draft can propose: full, their number, or auto (fewer where that is faster)."
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="What drafts may run at: auto (whatever this machine has kernels for), full, int8, fp8, int4 or mxfp4."
        ),
    ] = "auto",
    extra_memory: Annotated[
        str | None,
        typer.Option(help="Most that rounded copies of weights may take: 500MB, or 30% of the model's."),
    ] = None,
    window: Annotated[
        str,
        typer.Option(
            help="Last tokens of a long context that drafts attend to; none: all of it; auto: what is measured to be fastest."
        ),
    ] = "none",
    score_text: Annotated[
        str, typer.Option(help="Text for the Fisher traces: own (what the model writes) or corpus.")
    ] = "own",
    eager: Annotated[
        bool, typer.Option("--eager", help="Plan for an engine that runs with --enforce-eager.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="End with plain decoding and the plan on the engine.")
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
    """Finds which view of MODEL drafts best on this machine, and writes the plan."""
    from rich.console import Console

    from sdfp_vllm.fit.job import make_plan
    from sdfp_vllm.plan.parcel import PLAN_FILE
    from sdfp_vllm.plan.store import default_plan_dir
    from sdfp_vllm.ray_cluster import RayOptions
    from sdfp_vllm.report import summary
    from sdfp_vllm.terminal import console

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


@app.command()
def show(
    plan: Annotated[
        str, typer.Argument(help="Plan folder, plan.json, or a model with a plan in the default place.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Of a model: branch, tag or commit of its Hugging Face id.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw scores and search into this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page to this file.")] = None,
) -> None:
    """Shows a plan: the layers' scores, the search, and how it was made."""
    from sdfp_vllm.plan.store import load_plan
    from sdfp_vllm.report import draw_png, tables
    from sdfp_vllm.report_html import draw_html
    from sdfp_vllm.terminal import console

    loaded = load_plan(_plan_path(plan, revision))
    console().print(tables(loaded))
    for path, draw in ((png, draw_png), (html, draw_html)):
        if path:
            draw(loaded, path)
            typer.echo(f"Wrote {path}")


def _plan_path(plan: str, revision: str | None) -> Path:
    """A plan's own path; or, given a model, its plan in the default place."""
    from os.path import isdir, isfile

    from sdfp_vllm.plan.fingerprint import fingerprint, resolve_model_dir
    from sdfp_vllm.plan.parcel import PLAN_FILE
    from sdfp_vllm.plan.store import default_plan_dir

    path = Path(plan)
    if isfile(path) or isfile(
        path / PLAN_FILE
    ):  # Path's own raises in a folder into which the user may not look
        return path
    if isdir(path) and not isfile(path / "config.json"):
        return path  # neither: load_plan names the missing file
    try:
        # The cache alone: a plan that lies here was made from what is in there.
        target = fingerprint(resolve_model_dir(plan, revision, fetch=False))
    except SdfpError as e:
        raise SdfpError(
            plan, "neither a plan nor a model", "Give a plan folder, a plan.json, or a model's folder or id."
        ) from e
    return default_plan_dir(target)


app.command("generate")(generate_command)
app.command("demo")(demo_command)
app.add_typer(dipgo_app, name="dipgo")
app.command("batch")(batch_command)


def main() -> None:
    """Entry point of the `sdfp` command."""
    app()


if __name__ == "__main__":
    main()
