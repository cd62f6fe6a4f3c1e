"""The `sdfp` command. Everything heavy is imported inside the commands, so that help is instant."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sdfp_vllm.cli.batch import batch_command
from sdfp_vllm.cli.demo import demo_command
from sdfp_vllm.cli.dipgo import dipgo_app
from sdfp_vllm.cli.doctor import doctor_command
from sdfp_vllm.cli.generate import generate_command
from sdfp_vllm.cli.plan import plan_command
from sdfp_vllm.cli.show import show_command
from sdfp_vllm.errors import SdfpError

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
    epilog="Exit codes: 0 done, 1 `doctor` found something to mend, 2 refused (the message says what to change), 130 interrupted.",
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


for _name, _command, _example in (
    ("plan", plan_command, "HuggingFaceTB/SmolLM2-135M-Instruct --dtype float32"),
    ("show", show_command, "HuggingFaceTB/SmolLM2-135M-Instruct --html plan.html"),
    ("generate", generate_command, 'HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Why is the sky blue?"'),
    ("batch", batch_command, "prompts.jsonl answers.jsonl HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("demo", demo_command, "--model HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("doctor", doctor_command, "http://127.0.0.1:8000 --seconds 30"),
):
    app.command(_name, epilog=f"Example: sdfp {_name} {_example}")(_command)
app.add_typer(dipgo_app, name="dipgo")


def main() -> None:
    """Entry point of the `sdfp` command."""
    app()


if __name__ == "__main__":
    main()
