"""DiP-GO plans as a cache backend of vLLM-Omni: `cache_backend="dipgo"`, `cache_config={"plan": PLAN}`.

`register` is the `vllm_omni.general_plugins` entry point, which vLLM-Omni calls in every process. Its cache
backends are a closed list, so three of its functions are wrapped (docs/reference/upstream.md has the list); each does what
it did for every other backend.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

BACKEND = "dipgo"
_MARK = "_sdfp_dipgo"
_SELECTOR = "vllm_omni.diffusion.cache.selector"
_RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
_ADAPTER = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter"

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes `cache_backend="dipgo"` known to vLLM-Omni. Idempotent.

    A symbol that is gone is logged as an error by name and not raised: a plugin must not end a server
    that does not use it. One that does is then ended by vLLM-Omni, which does not know the backend.
    """
    for patch in (_route_get_cache_backend, _let_diffusers_adapter_pass):
        try:
            patch()
        except (ImportError, AttributeError) as e:
            logger.error(
                "cache_backend='%s' is not available with this vLLM-Omni: %s. It was made for 0.30.0; "
                "see docs/reference/upstream.md of sdfp-vllm.",
                BACKEND,
                e,
            )


def _route_get_cache_backend() -> None:
    """`get_cache_backend` is a closed if/elif. The model runner imports it by value: a loaded one gets ours too."""
    selector: Any = import_module(_SELECTOR)
    original: Callable[..., Any] = selector.get_cache_backend
    if not hasattr(original, _MARK):
        selector.get_cache_backend = _selecting(original)
    runner: Any = sys.modules.get(_RUNNER)
    if runner is not None and not hasattr(runner.get_cache_backend, _MARK):
        runner.get_cache_backend = selector.get_cache_backend


def _selecting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        return _backend(cache_config) if cache_backend == BACKEND else original(cache_backend, cache_config)

    setattr(get_cache_backend, _MARK, True)
    return get_cache_backend


def _let_diffusers_adapter_pass() -> None:
    """The adapter that runs diffusers pipelines refuses every cache backend; ours hooks what is inside it."""
    adapter: Any = import_module(_ADAPTER).DiffusersAdapterPipeline
    original: Callable[[Any], None] = adapter._raise_unsupported_features
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def _raise_unsupported_features(self: Any) -> None:
        config = self.od_config
        if config.cache_backend != BACKEND:
            return original(self)
        _backend(config.cache_config)  # a plan that cannot be read is refused before weights are loaded
        config.cache_backend = "none"
        try:
            return original(self)
        finally:
            config.cache_backend = BACKEND

    setattr(_raise_unsupported_features, _MARK, True)
    adapter._raise_unsupported_features = _raise_unsupported_features


def _backend(cache_config: Any) -> Any:
    from sdfp_vllm.dipgo.omni.backend import DipgoBackend

    return DipgoBackend.of(cache_config)
