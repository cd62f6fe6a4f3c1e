"""The `sdfp show` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdfp_vllm.errors import SdfpError


def show_command(
    plan: Annotated[
        str, typer.Argument(help="Plan folder, plan.json, or a model with a plan in the default place.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Of a model: branch, tag or commit of its Hugging Face id.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw scores and search into this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page to this file.")] = None,
) -> None:
    """Show a plan: the layers' scores, the search, and how it was made."""
    from sdfp_vllm.common.terminal import console
    from sdfp_vllm.plan.page import draw_html
    from sdfp_vllm.plan.show import draw_png, tables
    from sdfp_vllm.plan.store import load_plan

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
