"""The `sdfp demo` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hugging Face id (default: SmolLM2-135M-Instruct, fetched)."),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Your questions: a .jsonl with turns, messages or prompt.")
    ] = None,
    per_kind: Annotated[int, typer.Option(help="Questions of each kind (the rows' `category`).")] = 2,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each question.")] = 48,
    methods: Annotated[
        str, typer.Option(help="Subset, separated by semicolons.")
    ] = "plain;plain, own dtype;sdfp;ngram;suffix;draft_model",
    dtype: Annotated[
        str | None, typer.Option(help="Of the target (default: float32 on a CPU, the checkpoint's on a GPU).")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="A smaller model, for vLLM's draft_model.")] = None,
    eager: Annotated[
        bool, typer.Option("--eager/--compile", help="Engines without compilation start minutes sooner.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Picks the questions.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.json and demo.png.")] = Path(
        "out"
    ),
) -> None:
    """Compare plain vLLM, SDFP and vLLM's own methods on a model of yours, or on SmolLM2-135M-Instruct."""
    from sdfp_vllm.common.terminal import console
    from sdfp_vllm.demo.run import DemoSettings, run_demo

    settings = DemoSettings(
        model=model,
        questions=questions,
        per_kind=per_kind,
        new_tokens=new_tokens,
        methods=tuple(m.strip() for m in methods.split(";")),
        dtype=dtype,
        draft=draft,
        seed=seed,
        eager=eager,
        out=out,
    )
    run_demo(settings, console())
