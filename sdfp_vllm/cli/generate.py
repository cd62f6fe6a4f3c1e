"""The `sdfp generate` command: text from the model, and what drafting did for its speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdfp_vllm.errors import SdfpError

if TYPE_CHECKING:
    from rich.console import Console

    from sdfp_vllm.measure.spec import EngineSpec, Measurement


def generate_command(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the target.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id (default: the hub's).")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the model is asked.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with what the model is asked.")] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the text as it is, without the model's chat template."),
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    plan: Annotated[
        Path | None, typer.Option(help="Plan folder; default: the one made for this model.")
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(min=1, help="Draft tokens a round; default: the plan's.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16, float16; default: what the plan was made for."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the request (default: none; a seeded request is not paced).")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.")
    ] = False,
    eager: Annotated[
        bool | None,
        typer.Option(
            "--eager/--compile", help="Without compilation; default on a CPU, where it takes minutes."
        ),
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Also run without drafting.")
    ] = True,
) -> None:
    """Generate text with SDFP, shown as it comes; then the acceptance, and tokens/s with and without drafting."""
    from rich.console import Console

    from sdfp_vllm.common.checkpoint import refuse_untrusted
    from sdfp_vllm.engine.sampling_params import check_sampling
    from sdfp_vllm.measure.engines import run_engine
    from sdfp_vllm.measure.spec import EngineSpec, Turn
    from sdfp_vllm.plan.fingerprint import resolve_model_dir
    from sdfp_vllm.plan.store import find_plan

    text = _prompt_text(prompt, prompt_file)
    if temperature:
        check_sampling("--temperature", {"temperature": temperature})
    if seed is not None:
        check_sampling("--seed", {"seed": seed})
    folder = resolve_model_dir(model, revision)
    refuse_untrusted(folder, trust_remote_code)
    parcel = find_plan(model, plan, revision)  # a bad plan is refused before an engine starts
    plan_dir = parcel.source
    if dtype is None:
        dtype = parcel.plan.costs.dtype if parcel.plan.costs else "auto"
    asked = text if raw else as_chat(text, folder, trust_remote_code)

    speculative: dict[str, Any] = {"method": "sdfp", "model": str(plan_dir)}
    if draft_tokens:
        speculative["num_speculative_tokens"] = draft_tokens
    if eager is None:
        import torch

        eager = not torch.cuda.is_available()
    spec = EngineSpec(
        model=str(folder),
        turns=[Turn(prompts=[asked], max_tokens=max_tokens, temperature=temperature, streamed=True)],
        warm_up="The",
        speculative=speculative,
        seed=seed,
        dtype=dtype,
        engine={
            "max_model_len": -1,
            "enforce_eager": eager,
            "trust_remote_code": trust_remote_code,
        },  # -1: as long as its K/V fits
    )
    console = Console(stderr=True)  # standard output holds the text alone
    drafted = _shown(spec, console)
    ours = drafted.turns[0]
    rate, length = ours.acceptance_rate, ours.mean_accepted_length
    console.print(
        f"[bold]SDFP[/] {drafted.decode_tokens_per_second:.2f} tokens/s, {len(ours.token_ids[0])} tokens"
    )
    if rate is None:
        console.print("Nothing was drafted.")
    else:
        console.print(
            f"acceptance {rate:.3f} ({ours.accepted_tokens} of {ours.draft_tokens} draft tokens), "
            f"{length:.2f} tokens per verification round"
        )
    if not baseline:
        return
    # Streamed too, and heard by nobody: both runs do the same work.
    with console.status("Generating without drafting"):
        plain = run_engine(spec.model_copy(update={"speculative": None}))
    console.print(
        f"[bold]plain[/] {plain.decode_tokens_per_second:.2f} tokens/s, "
        f"{len(plain.turns[0].token_ids[0])} tokens"
    )
    if plain.decode_tokens_per_second:
        console.print(f"ratio {drafted.decode_tokens_per_second / plain.decode_tokens_per_second:.2f}x")
    if temperature == 0:
        same = plain.turns[0].token_ids == ours.token_ids
        console.print("text identical: " + ("yes" if same else "no (expected only below float32)"))


def as_chat(text: str, folder: Path, trust_remote_code: bool = False) -> list[int] | str:
    """Renders a text as a chat's one user turn; leaves it as it is where the model has no chat template.

    Raises:
        SdfpError: If there is no tokenizer that can be loaded, or the template refuses the text.
    """
    from sdfp_vllm.common.checkpoint import load_tokenizer
    from sdfp_vllm.planner.chats import has_chat_template, render_chat

    tokenizer = load_tokenizer(folder, trust_remote_code)
    if not has_chat_template(tokenizer):
        return text
    return render_chat(tokenizer, [{"role": "user", "content": text}], "--prompt").tolist()


def _shown(spec: EngineSpec, console: Console) -> Measurement:
    """Runs `spec`, and prints its text as it comes."""
    from sdfp_vllm.measure.engines import run_engine

    try:
        with console.status("Generating with SDFP") as waiting:

            def show(piece: str) -> None:
                waiting.stop()  # it would be drawn over the text
                print(piece, end="", flush=True)

            return run_engine(spec, show)
    finally:
        print()  # ends the text's line, of an interrupted text too


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise SdfpError(
            "--prompt", "give a text or --prompt-file, one of the two", 'Example: --prompt "def main():"'
        )
    try:
        text = prompt if prompt_file is None else prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SdfpError(str(prompt_file), f"cannot be read ({e})", "Give a text file in UTF-8.") from e
    if not text:
        raise SdfpError("--prompt", "is empty", "Give some text.")
    return text
