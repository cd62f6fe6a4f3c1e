"""The `sdfp doctor` command: is it on, and does it do any good?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

MEND = 1  # exit code where something is to be mended


def doctor_command(
    url: Annotated[
        str | None,
        typer.Argument(help="http://HOST:PORT of a running server (default: look at this machine)."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or id: would vLLM serve it with its plan? (without URL)")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to watch the server.")] = 60.0,
) -> None:
    """Say what is installed and planned here; or, of a running server, what its drafts come to and what to mend."""
    from sdfp_vllm.common.terminal import console
    from sdfp_vllm.errors import SdfpError

    if url and model:
        raise SdfpError("--model", "is a question to this machine, not to a server", "Give it without a URL.")
    out = console()
    advice = _server(url, seconds, out) if url else _machine(model, out)
    for line in advice:
        out.print(line, style="yellow", soft_wrap=True, markup=False)
    if advice:
        raise typer.Exit(MEND)


def _machine(model: str | None, out: Any) -> list[str]:
    """Shows what is here; returns what to mend."""
    from rich.markup import escape
    from rich.table import Table

    from sdfp_vllm.engine.installation import installed, other_versions, plans, served
    from sdfp_vllm.errors import SdfpError

    findings = [*installed(), *([served(model)] if model else [])]
    table = Table(show_header=False, title="Installed")
    for f in findings:
        table.add_row(f.name, escape(f.found), style="yellow" if f.mend else "")
    out.print(table)
    advice = [f"{f.name}: {f.mend}" for f in findings if f.mend]
    found = plans()
    if not found:
        out.print("No plans in the default place; `sdfp plan MODEL` makes one.", markup=False)
        return advice
    table = Table("model", "dtype", "expects", "made on", "by other versions", title="Plans")
    for folder, plan in found:
        if isinstance(plan, SdfpError):
            table.add_row(escape(folder.name), "cannot be read", style="yellow")
            advice.append(str(plan))
            continue
        costs = plan.costs
        table.add_row(
            escape(plan.model),
            costs.dtype if costs else "-",
            f"{plan.promised_speedup:.2f}x",
            escape(costs.device) if costs else "-",
            other_versions(plan),
        )
    out.print(table)
    return advice


def _server(url: str, seconds: float, out: Any) -> list[str]:
    """Watches a server and shows what its drafts come to; returns what to mend."""
    from rich.table import Table

    from sdfp_vllm.engine.serving_health import SPEC, checked, release_of, watch

    url = checked(url)
    with out.status(f"Watching {url} for {seconds:g} s ..."):
        last, traffic = watch(url, seconds)
    if last.info is None:
        other = f"{SPEC}drafts_total" in last.samples
        how = "drafts by another method" if other else "drafts nothing"
        return [
            f"vLLM {release_of(url)} is up and {how}, not SDFP: start it with --speculative-model sdfp (docs/use/getting-started.md)."
        ]
    paced = "of fixed lengths" if last.info["drafting"] == "fixed" else f"paced {last.info['drafting']}"
    out.print(f"vLLM {release_of(url)}, SDFP {last.info['version']}, drafts {paced}", markup=False)
    table = Table(show_header=False)
    for row in traffic.rows(seconds):
        table.add_row(*row)
    out.print(table)
    if not traffic.generated:
        out.print("No tokens were generated meanwhile: send requests, or watch longer.")
    return traffic.advice()
