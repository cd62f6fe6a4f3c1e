"""Rivals that are packages, DeepCache and cache-dit: the settings that are swept, and how one is switched on and off.

Neither is a dependency: `pip install --no-deps --target FOLDER DeepCache cache-dit`, with FOLDER on the path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

STATIC = 10.0  # a threshold that no step is above: the schedule alone decides
_POLICIES = ("slow", "medium", "fast", "ultra")


@dataclass(frozen=True)
class Rival:
    """A package's name, its settings, and what switches one on (giving a handle) and off."""

    name: str
    settings: list[Any]
    on: Callable[[Any], Any]
    off: Callable[[Any], None]


def deepcache(pipe: Any) -> Rival:
    """DeepCache 0.1.1, for U-Nets: each setting is an interval and a branch."""
    from DeepCache import DeepCacheSDHelper

    def on(setting: tuple[int, int]) -> Any:
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=setting[0], cache_branch_id=setting[1])
        helper.enable()
        return helper

    settings = [(i, b) for i in (2, 3, 4, 5, 7, 10) for b in (0, 3)]
    return Rival("DeepCache", settings, on, lambda helper: helper.disable())


@dataclass(frozen=True)
class CacheDit:
    """A setting of cache-dit.

    Attributes:
        threshold: DBCache's, for the relative change of the first block's residual; `STATIC` for none.
        warm_up: First steps that are computed.
        row: Cached steps in a row, at most.
        order: TaylorSeer's; 0 for the last value.
        mask: SCM's policy of steps to compute, in place of warm-up and row; the others are cached, if below the threshold.
    """

    threshold: float = STATIC
    warm_up: int = 1
    row: int = -1
    order: int = 1
    mask: str | None = None

    def __str__(self) -> str:
        when = "any change" if self.threshold == STATIC else f"threshold {self.threshold:g}"
        which = f"SCM {self.mask}" if self.mask else f"warm-up {self.warm_up}, row {self.row}"
        return f"{which}, {when}, order {self.order}"


def cache_dit_settings() -> list[CacheDit]:
    """DBCache by thresholds and by a schedule alone, SCM's four masks, with TaylorSeer of order 0 (none), 1 and 2."""
    dynamic = [
        CacheDit(threshold, warm_up, row)
        for threshold, warm_up, row in product((0.05, 0.1, 0.3), (1, 3), (1, 2, 3, 8))
    ]
    curved = [CacheDit(threshold, 3, row, order=2) for threshold, row in product((0.05, 0.1, 0.3), (1, 3))]
    static = [
        CacheDit(STATIC, warm_up, row, order)
        for warm_up, row, order in product((1, 3), (1, 2, 3, 5, 8), (0, 1, 2))
    ]
    masked = [CacheDit(order=order, mask=mask) for mask, order in product(_POLICIES, (0, 1, 2))]
    both = [CacheDit(threshold, mask=mask) for threshold, mask in product((0.1, 0.3), _POLICIES)]
    return dynamic + curved + static + masked + both


def cache_dit(pipe: Any, steps: int) -> Rival:
    """cache-dit 1.5.3, for transformers; its first block is always computed."""
    import cache_dit as package

    def on(setting: CacheDit) -> None:
        mask = setting.mask and package.steps_mask(mask_policy=setting.mask, total_steps=steps)
        package.enable_cache(
            pipe,
            cache_config=package.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                residual_diff_threshold=setting.threshold,
                max_warmup_steps=setting.warm_up,
                max_continuous_cached_steps=setting.row,
                num_inference_steps=steps,
                steps_computation_mask=mask,
                steps_computation_policy="static" if setting.threshold == STATIC else "dynamic",
            ),
            calibrator_config=(
                package.TaylorSeerCalibratorConfig(
                    taylorseer_order=setting.order,
                    # SD3's last block gives no text, and cache-dit 1.5.3 then asks for a forecast of it that is not there.
                    enable_encoder_calibrator=False,
                )
                if setting.order
                else None
            ),
        )

    return Rival("cache-dit", list(cache_dit_settings()), on, lambda _: package.disable_cache(pipe))
