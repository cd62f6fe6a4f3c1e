"""Loads the draft over a target: the same for both model runners."""

from __future__ import annotations

from typing import Any

from torch import nn

from sdfp_vllm.engine.draft.adapter_rows import mend_cpu_rows_without_adapter
from sdfp_vllm.engine.draft.adapters import BASE, DraftAdapters
from sdfp_vllm.engine.draft.head import draft_head, padded
from sdfp_vllm.engine.draft.model import SkipDraftModel, attention_names
from sdfp_vllm.engine.draft.reach import call_of, decoder_of
from sdfp_vllm.engine.draft.rounded_weights import BRIDGED
from sdfp_vllm.engine.draft.twins import copies_of
from sdfp_vllm.engine.upstream.symbols import (
    AttentionLayerBase,
    VllmConfig,
    get_layers_from_vllm_config,
    init_logger,
    set_model_tag,
)
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.view import DraftView

logger = init_logger(f"vllm.{__name__}")


def load_draft(vllm_config: VllmConfig, target: nn.Module) -> tuple[SkipDraftModel, set[str]]:
    """Returns the draft over `target`'s own modules, and the names of the attention layers it runs.

    Allocates no weight but the plan's bridges and the rows of its head; rounded copies were made while the target
    was loaded (`engine/draft/rounded_weights.py`). Everything comes from `vllm_config.speculative_config`, an
    SdfpConfig.

    Raises:
        SdfpError: If the target's layers cannot be reached; if a kept layer does not exist, has no attention, or reads
            another layer's K/V; if nothing kept attends, or a layer's branch cannot run by itself; or if a branch
            that the plan rounds has no rounded copy.
    """
    config: Any = vllm_config.speculative_config
    view: DraftView = config.view
    decoder = decoder_of(target)
    layers, architecture = decoder.layers, vllm_config.model_config.architecture
    call = call_of(architecture, decoder)
    if call == "forward" and (view.partial or config.parcel.bridges()):
        raise SdfpError(
            f"plan {config.model}",
            f"has {'single branches' if view.partial else 'bridges'}, and {architecture} runs its layers by its own "
            "forward, which has room for neither",
            "Make a plan with `sdfp plan MODEL --bridge none --selector fit`.",
        )
    drafting = _attending(vllm_config, layers, view)
    if not drafting:
        raise SdfpError(
            f"plan {config.model}",
            f"keeps no attention ({view}), and vLLM schedules a draft by its attention",
            "Make a plan that keeps the attention of some layer.",
        )
    device, dtype = next(target.parameters()).device, vllm_config.model_config.dtype
    bridges = {
        run: bridge.to(device=device, dtype=dtype)  # type: ignore[arg-type]
        for run, bridge in config.parcel.bridges().items()
    }
    adapters = DraftAdapters(target)
    if vllm_config.lora_config is not None:
        mend_cpu_rows_without_adapter()
    adapters.begin([BASE], rows=1)  # the head is tried on a row
    head = draft_head(target, config.parcel.tokens(), config.plan.view.head.precision)
    adapters.end()
    rows = config.drafting.padding
    with set_model_tag("sdfp_draft"):
        draft = SkipDraftModel(
            vllm_config=vllm_config,
            prefix="",
            target=target,
            view=view,
            bridges=bridges,
            head=padded(head or target.compute_logits, rows) if rows else head,  # type: ignore[arg-type]
            call=call,
        )
    if bridges:
        linear = next(m for m in layers.modules() if hasattr(m, "quant_method") and hasattr(m, "weight"))
        vars(linear)[BRIDGED] = config.parcel.source  # says so when other weights pass by
    copies = copies_of(draft) + (head.nbytes if head else 0)
    window = config.plan.view.window
    logger.info(
        "SDFP is on: %s. Drafts run %g of %d layers (%s%s), %d bridges, %s; rounded copies and head rows take %.1f MB, as "
        "much as %d tokens of KV cache. The plan %s expects %.2fx plain decoding at batch 1.",
        config.drafting,
        view.size,
        len(layers),
        view,
        f"; attention to {window}" if window else "",
        len(bridges),
        head.describe() if head else "all logits",
        copies / 1e6,
        copies // max(1, kv_bytes_per_token(vllm_config)),
        config.parcel.source,
        config.plan.promised_speedup,
    )
    return draft, drafting


def _attending(vllm_config: VllmConfig, layers: Any, view: DraftView) -> set[str]:
    """Names of the attention layers that `view` runs, each of which must be one the draft can share."""
    attention = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
    drafting: set[str] = set()
    for i in view.touched():
        if i >= len(layers):
            raise SdfpError(
                f"plan {vllm_config.speculative_config.model}",  # type: ignore[union-attr]
                f"keeps layer {i}, but the model has {len(layers)} layers",
                "Make a plan for this model with `sdfp plan MODEL`.",
            )
        if "attention" not in view.branches(i):
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
    return drafting


def kv_bytes_per_token(vllm_config: VllmConfig) -> int:
    """Bytes of KV cache that a token takes on this worker, all layers together."""
    attention = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
    specs = [layer.get_kv_cache_spec(vllm_config) for layer in attention.values()]
    return sum(spec.page_size_bytes // spec.block_size for spec in specs if spec is not None)
