"""Takes rounded copies of the target's weights while they are loaded.

On a CPU vLLM packs the weight of a linear right after loading and drops the original, so whoever wants another
precision of it must come before. The same moment serves every platform, and weights that are loaded anew into a
running engine: they pass through it again, and the copies follow.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import nn

from sdfp_vllm.engine.draft.rounded_linear import RoundedLinear
from sdfp_vllm.engine.upstream.symbols import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
    get_current_vllm_config_or_none,
    init_logger,
)
from sdfp_vllm.plan.view import Branch, DraftView, Precision

logger = init_logger(f"vllm.{__name__}")

_MARK = "_sdfp_patched"
ROWS = "sdfp_rows"  # where a head holds the rows that a draft took of it
BRIDGED = "sdfp_bridged"  # where one linear of a bridged draft's target holds the plan's name
_COPY = (
    "sdfp_rounded"  # where a linear holds its copy: not as a child module, for it is no part of the target
)
# A router ("gate") decides which experts run: it is small, and rounding it buys nothing. `text_model` is Idefics3's
# decoder; the layers of vision towers have other parents (`encoder.layers`, `visual.blocks`).
_PLACE = re.compile(
    r"(?:^|\.)(?:model|text_model)\.layers\.(\d+)\.(self_attn|attn|mlp)\.(?!gate$|router$|shared_expert_gate$)"
)
_BRANCH: dict[str, Branch] = {"self_attn": "attention", "attn": "attention", "mlp": "mlp"}


def round_while_loading() -> None:
    """Wraps `UnquantizedLinearMethod.process_weights_after_loading`, which every loader calls for each linear, once.

    Checked on 0.32.0. Without the symbol a plan with rounded branches is refused when its draft is built.
    """
    method: Any = UnquantizedLinearMethod
    original = getattr(method, "process_weights_after_loading", None)
    if _MARK in vars(method) or original is None:
        return

    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
        take_copy(layer)
        original(self, layer)

    method.process_weights_after_loading = process_weights_after_loading
    setattr(method, _MARK, True)
    follow_the_head()


def follow_the_head() -> None:
    """Wraps `UnquantizedEmbeddingMethod.process_weights_after_loading`: the draft's rows of the head follow new weights."""
    method: Any = UnquantizedEmbeddingMethod
    original = method.process_weights_after_loading

    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
        rows = vars(layer).get(ROWS)
        if rows is not None:
            rows.take()
        original(self, layer)

    method.process_weights_after_loading = process_weights_after_loading


def take_copy(layer: Any) -> None:
    """Rounds the weight of `layer` as the plan in force asks, or renews the copy that it has."""
    if plan := vars(layer).get(BRIDGED):
        logger.warning(
            "New weights are loaded. Drafts follow them, but the bridges of the plan %s were fitted to the old ones: output "
            "stays exact, acceptance may fall. `sdfp plan` fits others.",
            plan,
        )
    held = copy_of(layer)
    if held is not None:
        held.refresh(layer.weight.detach())
        return
    config = get_current_vllm_config_or_none()
    view = getattr(config and config.speculative_config, "view", None)
    if isinstance(view, DraftView):
        precision = precision_of(getattr(layer, "prefix", ""), view)
        if precision != "full":
            layer.__dict__[_COPY] = RoundedLinear(layer.weight.detach(), None, precision, name=layer.prefix)


def copy_of(layer: Any) -> RoundedLinear | None:
    """The rounded copy that a linear holds, if any."""
    return vars(layer).get(_COPY)


def precision_of(prefix: str, view: DraftView) -> Precision:
    """At which precision `view` runs the linear of this name; "full" for one that is not part of a kept branch."""
    place = _PLACE.search(prefix)
    if place is None:
        return "full"
    layer, branch = int(place[1]), _BRANCH[place[2]]
    return view.precision(layer, branch) if branch in view.branches(layer) else "full"
