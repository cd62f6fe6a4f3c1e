"""The `sdfp batch` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sdfp_vllm.errors import SdfpError


def batch_command(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help='Lines of {"id": 1, "prompt": "..."}, or "messages".')
    ],
    output: Annotated[Path, typer.Argument(help="Answers, in the order of the input.")],
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the target.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id (default: the hub's).")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan folder; default: the one made for this model.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="For rows that do not say.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="For rows that do not say; 0 is greedy.")] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the first row; counted up by row (default: none; seeded rows are not paced)."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer (default: the model's limit).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows handed to an engine at a time.")] = 64,
    engine: Annotated[
        str, typer.Option(help="""Further arguments of vLLM's LLM() in JSON, {"dtype": "float32"}.""")
    ] = "{}",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Engines (default: as many as the GPUs allow; else one per node)."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the Ray cluster, or auto (default: RAY_ADDRESS, or here)."),
    ] = None,
) -> None:
    """Answer a file of prompts on a Ray cluster, each engine drafting with its own layers."""
    from rich.console import Console

    from sdfp_vllm.ray.batch.job import BatchOptions, run_batch
    from sdfp_vllm.ray.cluster import RayOptions, require_ray

    require_ray("sdfp batch")
    arguments = _json(engine) | ({"trust_remote_code": True} if trust_remote_code else {})
    if revision and "revision" in arguments:
        raise SdfpError("--revision", "is also given in --engine", "Give it once.")
    arguments |= {"revision": revision} if revision else {}
    answers = run_batch(
        source,
        output,
        model,
        BatchOptions(
            plan=plan,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            max_model_len=max_model_len,
            batch_size=batch_size,
            resume=resume,
            ray=RayOptions(address, workers, arguments.get("tensor_parallel_size", 1)),
            engine=arguments,
        ),
        Console(stderr=True),
    )
    failed = f", {len(answers.failed)} of them errors" if answers.failed else ""
    typer.echo(f"Wrote {len(answers.finished)} answers to {output}{failed}")


def _json(engine: str) -> dict[str, Any]:
    try:
        parsed = json.loads(engine)
    except ValueError as e:
        raise SdfpError("--engine", f"is not JSON ({e})", """Example: '{"dtype": "float32"}'.""") from e
    if not isinstance(parsed, dict):
        raise SdfpError("--engine", "is not a JSON object", """Example: '{"dtype": "float32"}'.""")
    return parsed
