"""The cache backend itself: puts a plan on vLLM-Omni's pipeline, or on the diffusers pipeline inside its adapter."""

from __future__ import annotations

import logging
from typing import Any

from diffusers import DiffusionPipeline
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig

from sdfp_vllm.dipgo.omni.native import put_on_native, watch_steps
from sdfp_vllm.dipgo.plan import load_plan
from sdfp_vllm.dipgo.rows import RowSkipping
from sdfp_vllm.dipgo.runtime import Skipping, apply_dipgo
from sdfp_vllm.errors import SdfpError

# vLLM-Omni's `DiffusionEngine._dummy_run`, the first generation of a server.
WARM_UP_STEPS = 2

logger = logging.getLogger(__name__)


class DipgoBackend(CacheBackend):
    """A DiP-GO plan for every generation of a pipeline.

    Where vLLM-Omni runs a diffusers pipeline (`diffusion_load_format="diffusers"`) the plan goes on that, as without a
    server. Its own pipelines take the plan too where their denoiser is of a class that was tried (`native.TRIED`).

    Raises:
        SdfpError: If `config` names no plan, or the plan cannot be read.
    """

    def __init__(self, config: DiffusionCacheConfig):
        super().__init__(config)
        path = getattr(config, "plan", None)
        if not isinstance(path, str) or not path:
            raise SdfpError(
                'cache_backend="dipgo"',
                "cache_config names no plan",
                'Give one: cache_config={"plan": "FOLDER"}, made with `sdfp dipgo search`.',
            )
        self.plan = load_plan(path)
        self._skipping: Skipping | None = None
        self._begun = False

    @classmethod
    def of(cls, config: DiffusionCacheConfig | dict[str, Any] | None) -> DipgoBackend:
        """From what a user gave as `cache_config`."""
        return cls(
            config
            if isinstance(config, DiffusionCacheConfig)
            else DiffusionCacheConfig.from_dict(config or {})
        )

    def enable(self, pipeline: Any) -> None:
        """Puts the plan on `pipeline`, whose weights are loaded.

        Raises:
            SdfpError: If its denoiser is of a class that plans were not tried on, or the plan is for another model.
        """
        self._skipping = self._applied(pipeline)
        self.enabled, self._begun = True, False
        if isinstance(self._skipping, RowSkipping) and getattr(pipeline.od_config, "step_execution", False):
            watch_steps(pipeline, self._skipping, self._runs_in_full)
            # In step mode the runner refuses whatever this setting names. The pipeline has the plan now.
            pipeline.od_config.cache_backend = None
        logger.info(
            "DiP-GO plan for %s: %.1f %% of the compute", self.plan.pipeline, 100 * self.plan.compute_share
        )

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Called by vLLM-Omni before every generation. The plan itself begins anew at its first timestep.

        The server's warm-up, two steps right after `enable`, runs in full: no plan is for it.

        Raises:
            SdfpError: If the plan is for another number of steps.
        """
        in_full = self._runs_in_full(num_inference_steps)
        if in_full and self._skipping is not None:
            self._skipping.remove()
            self._skipping = None
        elif not in_full and self._skipping is None:
            self._skipping = self._applied(pipeline)

    def _runs_in_full(self, steps: int) -> bool:
        """Whether a request for so many steps is the server's warm-up; refuses one that the plan is not for."""
        first, self._begun = not self._begun, True
        planned = self.plan.scheduler.num_inference_steps
        if steps == planned:
            return False
        if first and steps == WARM_UP_STEPS:
            return True
        raise SdfpError(
            f"DiP-GO plan for {self.plan.pipeline}",
            f"is for {planned} steps, and this request asks for {steps}",
            f"Ask for num_inference_steps={planned}, or start the server with a plan for "
            f"{steps} (`sdfp dipgo search --steps {steps}`).",
        )

    def _applied(self, pipeline: Any) -> Skipping:
        inner = getattr(pipeline, "_pipeline", None)  # of DiffusersAdapterPipeline
        if isinstance(inner, DiffusionPipeline):
            return apply_dipgo(inner, self.plan)
        return put_on_native(pipeline, self.plan)
