"""The `sdfp demo` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo_command(
    prompts: Annotated[int, typer.Option(help="Number of held-out prompts.")] = 6,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated per prompt.")] = 64,
    draft_model_tokens: Annotated[
        int, typer.Option(help="Draft tokens a round for vLLM's draft_model; 2 suits the demo draft best.")
    ] = 2,
    methods: Annotated[str, typer.Option(help="Comma-separated subset.")] = "plain,sdfp,ngram,draft_model",
    eager: Annotated[
        bool, typer.Option("--eager/--compile", help="All engines without compilation start minutes sooner.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Picks the prompts.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.json and demo.png.")] = Path(
        "out"
    ),
) -> None:
    """Compare plain decoding, SDFP, ngram and draft_model on the embedded demo target."""
    from sdfp_vllm.demo.run import DemoSettings, run_demo
    from sdfp_vllm.terminal import console

    settings = DemoSettings(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        draft_model_tokens=draft_model_tokens,
        methods=tuple(m.strip() for m in methods.split(",")),
        seed=seed,
        eager=eager,
        out=out,
    )
    run_demo(settings, console())
