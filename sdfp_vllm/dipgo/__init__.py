"""DiP-GO: finds and skips the block x timestep work a frozen diffusion model hardly needs.

    layout -> macs -> (learn | surrogate -> refine) -> plan -> runtime

`job` is the offline search, `plan` the file between the two, `runtime` what a pipeline runs with.
The runtime imports nothing of the search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdfp_vllm.dipgo.plan import DipgoPlan, load_plan
    from sdfp_vllm.dipgo.runtime import apply_dipgo

__all__ = ["DipgoPlan", "apply_dipgo", "load_plan"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `sdfp --help` does not load torch and diffusers."""
    if name == "apply_dipgo":
        from sdfp_vllm.dipgo.runtime import apply_dipgo

        return apply_dipgo
    if name in ("DipgoPlan", "load_plan"):
        from sdfp_vllm.dipgo import plan

        return getattr(plan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
