"""The cache backend itself: puts a plan on the diffusers pipeline inside vLLM-Omni's diffusers adapter."""

from __future__ import annotations

import logging
from typing import Any

from diffusers import DiffusionPipeline
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig

from sdfp_vllm.dipgo.plan import load_plan
from sdfp_vllm.dipgo.runtime import Skipping, apply_dipgo
from sdfp_vllm.errors import SdfpError

# vLLM-Omni's `DiffusionEngine._dummy_run`, the first generation of a server.
WARM_UP_STEPS = 2

logger = logging.getLogger(__name__)


class DipgoBackend(CacheBackend):
    """A DiP-GO plan for every generation of a pipeline.

    Works where vLLM-Omni runs a diffusers pipeline (`diffusion_load_format="diffusers"`), for which plans
    are made. Its own pipelines are refused: their transformers are other modules with other units, and they call
    them once for each branch of guidance.

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
            SdfpError: If this is one of vLLM-Omni's own pipelines, or the plan is for another model.
        """
        self._skipping = apply_dipgo(_diffusers_pipeline(pipeline), self.plan)
        self.enabled, self._begun = True, False
        logger.info(
            "DiP-GO plan for %s: %.1f %% of the compute", self.plan.pipeline, 100 * self.plan.compute_share
        )

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Called by vLLM-Omni before every generation. The plan itself begins anew at its first timestep.

        The server's warm-up, two steps right after `enable`, runs in full: no plan is for it.

        Raises:
            SdfpError: If the plan is for another number of steps.
        """
        steps = self.plan.scheduler.num_inference_steps
        first, self._begun = not self._begun, True
        if num_inference_steps == steps:
            if self._skipping is None:
                self._skipping = apply_dipgo(_diffusers_pipeline(pipeline), self.plan)
        elif first and num_inference_steps == WARM_UP_STEPS:
            assert self._skipping is not None, "vLLM-Omni refreshes a backend that it enabled"
            self._skipping.remove()
            self._skipping = None
        else:
            raise SdfpError(
                f"DiP-GO plan for {self.plan.pipeline}",
                f"is for {steps} steps, and this request asks for {num_inference_steps}",
                f"Ask for num_inference_steps={steps}, or start the server with a plan for "
                f"{num_inference_steps} (`sdfp dipgo search --steps {num_inference_steps}`).",
            )


def _diffusers_pipeline(pipeline: Any) -> DiffusionPipeline:
    inner = getattr(pipeline, "_pipeline", None)  # of DiffusersAdapterPipeline
    if not isinstance(inner, DiffusionPipeline):
        raise SdfpError(
            'cache_backend="dipgo"',
            f"{type(pipeline).__name__} is one of vLLM-Omni's own pipelines, and plans are for diffusers' models",
            'Load the model with diffusion_load_format="diffusers", or choose another cache_backend.',
        )
    return inner
