"""Says what is installed on this machine, and whether it fits together; works where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import sdfp_vllm
from sdfp_vllm.engine.upstream import releases
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.parcel import PLAN_FILE
from sdfp_vllm.plan.schema import SCHEMA_VERSION, SkipPlan
from sdfp_vllm.plan.store import load_plan, plans_root
from sdfp_vllm.plan.view import ROUNDED


@dataclass(frozen=True)
class Finding:
    """One line of a report: what was looked at, what is there, and what to mend (empty: nothing)."""

    name: str
    found: str
    mend: str = ""


def installed() -> list[Finding]:
    """Returns versions, whether vLLM's is a tried one, whether vLLM finds the plugin, and which kernels run."""
    findings = [
        Finding("sdfp-vllm", sdfp_vllm.__version__),
        Finding("Python", platform.python_version()),
        *(Finding(name, _version(name) or "not installed") for name in ("torch", "triton")),
    ]
    if importlib.util.find_spec("vllm") is None:
        why = f"Install one of {releases.TRIED} (docs/use/getting-started.md)."
        return [*findings, Finding("vLLM", "not installed", why), _plugin()]
    findings += [_vllm(), _plugin()]
    return findings if findings[-2].mend else [*findings, *_kernels()]


def plans() -> list[tuple[Path, SkipPlan | SdfpError]]:
    """Returns the plans that `--speculative-model sdfp` can find, by folder; one that cannot be read with why."""
    found: list[tuple[Path, SkipPlan | SdfpError]] = []
    for file in sorted((plans_root() / f"v{SCHEMA_VERSION}").glob(f"*/{PLAN_FILE}")):
        try:
            found.append((file.parent, load_plan(file)))
        except SdfpError as e:
            found.append((file.parent, e))
    return found


def other_versions(plan: SkipPlan) -> str:
    """Names what made the plan and is of another version here; empty where nothing is."""
    made, here = plan.made, {"sdfp-vllm": sdfp_vllm.__version__, "torch": _version("torch")}
    then = {"sdfp-vllm": made.sdfp_version, "torch": made.torch_version}
    return ", ".join(f"{name} {then[name]}" for name in then if then[name] != here[name])


def served(model: str) -> Finding:
    """Says whether vLLM would serve the model with its plan, by making the engine's configuration; reads no weights."""
    from sdfp_vllm.plan.store import find_plan

    name = f"plan for {model}"
    try:
        parcel = find_plan(model)
        if importlib.util.find_spec("vllm") is None:
            return Finding(name, parcel.source, "Install vLLM: whether it accepts the plan cannot be said.")
        _configure(model, parcel.plan)
    except ValueError as e:  # SdfpError is one, and vLLM's own refusals are
        return Finding(name, "refused", " ".join(str(e).split()))
    return Finding(name, f"accepted: {parcel.source}")


def _configure(model: str, plan: SkipPlan) -> None:
    from sdfp_vllm.engine import register
    from sdfp_vllm.engine.upstream.symbols import EngineArgs

    register()
    dtype = plan.costs.dtype if plan.costs else "auto"
    arguments = {"model": model, "dtype": dtype, "speculative_config": {"method": "sdfp"}}
    EngineArgs(**arguments).create_engine_config()  # type: ignore[arg-type]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _vllm() -> Finding:
    try:
        releases.check_release()
    except SdfpError as e:
        return Finding("vLLM", releases.release(), str(e))
    return Finding("vLLM", f"{releases.release()}, tried ({releases.TRIED})")


def _plugin() -> Finding:
    """Whether vLLM loads the plugin: it must be registered, and not left out by VLLM_PLUGINS."""
    if not any(e.name == "sdfp" for e in entry_points(group="vllm.general_plugins")):
        return Finding("plugin of vLLM", "not registered", "Install sdfp-vllm with pip in this environment.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "sdfp" not in allowed.split(","):
        return Finding("plugin of vLLM", "left out by VLLM_PLUGINS", "Add sdfp to VLLM_PLUGINS, or unset it.")
    return Finding("plugin of vLLM", "registered")


def _kernels() -> list[Finding]:
    """Which precisions drafts can use here, by the dtype that a model is served in."""
    import torch

    from sdfp_vllm.engine.draft.rounded_linear import refusal
    from sdfp_vllm.engine.upstream.symbols import current_platform

    findings = []
    for dtype in (torch.float32, torch.bfloat16):
        usable = [p for p in ROUNDED if refusal(p, dtype, 256, 256, tried=current_platform.is_cpu()) is None]
        name = str(dtype).removeprefix("torch.")
        findings.append(Finding(f"precisions in {name}", ", ".join(["full", *usable])))
    return findings
