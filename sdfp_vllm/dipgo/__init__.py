"""DiP-GO: finds and skips the block x timestep work a frozen diffusion model hardly needs.

    rehearsal, signature -> layout -> macs -> (learn | surrogate -> refine) -> plan -> runtime

`job` is the offline search, `plan` the file between the two, `runtime` what a pipeline runs with.
The runtime imports nothing of the search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdfp_vllm.dipgo.layout import Layout, Stream, Unit
    from sdfp_vllm.dipgo.plan import DipgoPlan, load_plan
    from sdfp_vllm.dipgo.runtime import apply_dipgo
    from sdfp_vllm.dipgo.signature import load_layout, save_layout

__all__ = [
    "DipgoPlan",
    "Layout",
    "Stream",
    "Unit",
    "apply_dipgo",
    "load_layout",
    "load_plan",
    "save_layout",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `sdfp --help` does not load torch and diffusers."""
    if name == "apply_dipgo":
        from sdfp_vllm.dipgo.runtime import apply_dipgo

        return apply_dipgo
    if name in ("Layout", "Stream", "Unit"):
        from sdfp_vllm.dipgo import layout

        return getattr(layout, name)
    if name in ("load_layout", "save_layout"):
        from sdfp_vllm.dipgo import signature

        return getattr(signature, name)
    if name in ("DipgoPlan", "load_plan"):
        from sdfp_vllm.dipgo import plan

        return getattr(plan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
