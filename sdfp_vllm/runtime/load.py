"""Builds the draft over a loaded target, the same for both model runners."""

from __future__ import annotations

from torch import nn

from sdfp_vllm.bridge_file import bridges_at
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.head_file import head_at
from sdfp_vllm.integration.upstream import (
    AttentionLayerBase,
    VllmConfig,
    get_layers_from_vllm_config,
    init_logger,
    set_model_tag,
)
from sdfp_vllm.keep import KeepSet
from sdfp_vllm.runtime.draft_model import SkipDraftModel, attention_names, decoder_of
from sdfp_vllm.runtime.head import padded, restricted_head

logger = init_logger(f"vllm.{__name__}")


def load_draft(vllm_config: VllmConfig, target: nn.Module) -> tuple[SkipDraftModel, set[str]]:
    """Returns the draft over `target`'s own modules, and the names of the attention layers it runs.

    Allocates no weight but the plan's bridges and the rows of a restricted head. Keep set, bridges and head
    come from `vllm_config.speculative_config`, an SdfpConfig.

    Raises:
        SdfpError: If a kept layer does not exist, has no attention, or reads another layer's K/V; if
            nothing kept attends, or a layer's branch cannot run by itself; or if the bridges or the head
            are no longer those the engine was started with.
    """
    config = vllm_config.speculative_config
    keep: KeepSet = config.keep  # type: ignore[union-attr]
    layers = decoder_of(target).layers
    attention = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
    drafting: set[str] = set()
    for i in keep.touched():
        if i >= len(layers):
            raise SdfpError(
                f"plan {config.model}",  # type: ignore[union-attr]
                f"keeps layer {i}, but the model has {len(layers)} layers",
                "Make a plan for this model with `sdfp plan MODEL`.",
            )
        if "attention" not in keep.branches(i):
            continue
        names = attention_names(layers[i])
        if not names:
            raise SdfpError(
                f"decoder layer {i}", "has no attention with a paged KV cache", "Serve without SDFP."
            )
        for name in names:
            if getattr(attention[name], "kv_sharing_target_layer_name", None) is not None:
                raise SdfpError(
                    f"decoder layer {i}",
                    "reads another layer's K/V, which drafting may not have written",
                    "Serve this model without SDFP.",
                )
        drafting.update(names)
    if not drafting:
        raise SdfpError(
            f"plan {config.model}",  # type: ignore[union-attr]
            f"keeps no attention ({keep}), and vLLM schedules a draft by its attention",
            "Make a plan that keeps the attention of some layer.",
        )
    device, dtype = next(target.parameters()).device, vllm_config.model_config.dtype
    bridges = {
        run: bridge.to(device=device, dtype=dtype)  # type: ignore[arg-type]
        for run, bridge in bridges_at(str(config.model), config.bridges_sha256).items()  # type: ignore[union-attr]
    }
    tokens = head_at(str(config.model), config.head_sha256)  # type: ignore[union-attr]
    head = None if tokens is None else restricted_head(target, tokens)
    rows = config.step_rows  # type: ignore[union-attr]
    with set_model_tag("sdfp_draft"):
        draft = SkipDraftModel(
            vllm_config=vllm_config,
            prefix="",
            target=target,
            keep=keep,
            bridges=bridges,
            head=padded(head or target.compute_logits, rows) if rows else head,  # type: ignore[arg-type]
        )
    if head is not None:
        logger.info("Its head computes %d of %d logits", len(head.tokens), head.vocab_size)
    logger.info(
        "SDFP drafts %d tokens a round with %g of %d layers and %d bridges: %s",
        config.num_speculative_tokens,  # type: ignore[union-attr]
        keep.size,
        len(layers),
        len(bridges),
        keep,
    )
    return draft, drafting
