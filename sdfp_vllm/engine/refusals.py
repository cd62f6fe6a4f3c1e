"""What SDFP does not work with, refused at start-up by name; `docs/use/limits.md` is this table for users."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdfp_vllm.engine.upstream.releases import check_adapters_release, minor, refuse_missing
from sdfp_vllm.engine.upstream.symbols import current_platform
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.families import MULTIMODAL

# Load formats that read a model's own weight files, or none.
_OWN_FILES = {
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "runai_streamer", "bitsandbytes", "dummy",
}  # fmt: skip

# Drafts of models that take images: on no earlier release was one run.
_FIRST_WITH_MEDIA = (0, 32)

# (feature, is it asked for?, why not, the way out)
_Check = tuple[str, Callable[[Any, Any, Any], bool], str, str]

CHECKS: list[_Check] = [
    (
        "--pipeline-parallel-size",
        lambda args, model, parallel: parallel.pipeline_parallel_size > 1,
        "above 1 puts the draft's layers on different workers",
        "Use --tensor-parallel-size instead.",
    ),
    (
        "--decode-context-parallel-size",
        lambda args, model, parallel: getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "above 1 splits the KV cache the draft shares with the target",
        "Leave it at 1.",
    ),
    (
        "--prefill-context-parallel-size",
        lambda args, model, parallel: getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "above 1 splits the KV cache the draft shares with the target",
        "Leave it at 1.",
    ),
    (
        "--data-parallel-size",
        lambda args, model, parallel: getattr(parallel, "data_parallel_size", 1) > 1 and bool(getattr(model, "is_moe", False)),
        "above 1 makes all ranks of a mixture of experts meet in every forward, and a rank without requests runs fewer draft "
        "steps than one that drafts: they would wait for each other for ever",
        "Use --tensor-parallel-size, or replicas that share nothing (docs/use/deployments.md).",
    ),
    (
        "--kv-transfer-config",
        lambda args, model, parallel: getattr(args, "kv_transfer_config", None) is not None,
        "moves KV blocks between engines, and those of draft positions must not leave this one",
        "Serve without a KV connector.",
    ),
    (
        "--kv-offloading-size",
        lambda args, model, parallel: getattr(args, "kv_offloading_size", None) is not None,
        "moves KV blocks through a connector, and those of draft positions must not leave the engine",
        "Leave it out.",
    ),
    (
        "--enable-eplb",
        lambda args, model, parallel: bool(getattr(parallel, "enable_eplb", False)),
        "counts expert loads per layer, which drafting would distort",
        "Leave it off.",
    ),
    (
        "--enable-tower-connector-lora",
        lambda args, model, parallel: bool(
            getattr(args, "enable_lora", False) and getattr(args, "enable_tower_connector_lora", False)
        ),
        "puts adapters on the encoder of images, with which drafts were not tried",
        "Leave it out: adapters of the language model work.",
    ),
    (
        "--load-format",
        lambda args, model, parallel: str(getattr(args, "load_format", "auto")).lower() not in _OWN_FILES,
        "takes weights from other files than those a plan is tied to",
        f"Use one of {', '.join(sorted(_OWN_FILES))}.",
    ),
    (
        "model",
        lambda args, model, parallel: bool(getattr(model, "model_weights", "")),
        "takes its weights from an object store, where a plan cannot be tied to its files",
        "Copy it to a folder, and serve that.",
    ),
    (
        "--hf-config-path",
        lambda args, model, parallel: getattr(model, "hf_config_path", None) not in (None, model.model),
        "takes the config from another place than the weights, and a plan is tied to both",
        "Put a config.json into the model's folder.",
    ),
    (
        "--enable-return-routed-experts",
        lambda args, model, parallel: bool(
            getattr(args, "enable_return_routed_experts", False)
            or getattr(getattr(args, "aux_output_config", None), "enable_return_routed_experts", False)
        ),
        "records the experts each layer routes to, over which drafts would write theirs",
        "Leave it off.",
    ),
    (
        "--offload-group-size",
        lambda args, model, parallel: getattr(args, "offload_group_size", 0) > 0
        or getattr(args, "offload_backend", "auto") == "prefetch",
        "fetches the weights of layers in the order in which all of them run, and drafts skip some",
        "Use --cpu-offload-gb instead.",
    ),
    (
        "--enable-dbo",
        lambda args, model, parallel: bool(getattr(parallel, "use_ubatching", False)),
        "runs halves of a batch beside each other (as does --ubatch-size), which was never tried with drafts",
        "Leave both out.",
    ),
    (
        "--runner",
        lambda args, model, parallel: getattr(model, "runner_type", "generate") != "generate",
        "is for a model that generates nothing, so there is nothing to draft",
        "Serve it without SDFP.",
    ),
    (
        "model",
        lambda args, model, parallel: bool(getattr(model, "is_diffusion", False)),
        "generates by denoising, not token by token",
        "Serve it without SDFP.",
    ),
    (
        "model",
        lambda args, model, parallel: bool(getattr(model, "is_encoder_decoder", False)),
        "is an encoder-decoder model; SDFP drafts with the layers of a decoder-only one",
        "Serve it without SDFP.",
    ),
    (
        "model",
        lambda args, model, parallel: _takes_media(model) and model.architecture not in MULTIMODAL,
        "takes images, video or sound, or uses M-RoPE positions, and its family is none of those in "
        "docs/use/multimodal.md, with which drafts were tried",
        "Serve it without SDFP.",
    ),
    (
        "model",
        lambda args, model, parallel: _takes_media(model) and minor() < _FIRST_WITH_MEDIA,
        "takes images, with which drafts were tried since vLLM {}.{} only".format(*_FIRST_WITH_MEDIA),
        "Install that release, or serve it without SDFP.",
    ),
    (
        "--enable-lora",
        lambda args, model, parallel: _takes_media(model) and bool(getattr(args, "enable_lora", False)),
        "was not tried with drafts of a model that takes images",
        "Merge the adapter into the weights, or serve without SDFP.",
    ),
    (
        "--video-pruning-rate",
        lambda args, model, parallel: _prunes_media(model),
        "moves a request's M-RoPE positions after its prompt was read, with which drafts were not tried",
        "Leave it out.",
    ),
    (
        "model",
        lambda args, model, parallel: bool(getattr(model, "is_hybrid", False) or getattr(model, "is_attention_free", False)),
        "has layers with recurrent state (mamba, linear attention), which rejected drafts would corrupt",
        "Serve it without SDFP.",
    ),
]  # fmt: skip


def _takes_media(model: Any) -> bool:
    """Whether a request may bring more than text. `uses_mrope` alone: a text checkpoint that says so all the same."""
    return bool(getattr(model, "is_multimodal_model", False) or getattr(model, "uses_mrope", False))


def _prunes_media(model: Any) -> bool:
    prunes = getattr(getattr(model, "multimodal_config", None), "is_multimodal_pruning_enabled", None)
    return prunes is not None and bool(prunes())


def refuse_unsupported(args: Any, model_config: Any, parallel_config: Any) -> None:
    """Raises SdfpError for the first feature in `CHECKS` that is asked for, or adapters on an untried release."""
    for where, asked, why, way_out in CHECKS:
        if asked(args, model_config, parallel_config):
            raise SdfpError(where, f"cannot be used with SDFP: it {why}", way_out)
    if getattr(args, "enable_lora", False):
        check_adapters_release()
    if _takes_media(model_config):
        refuse_missing("media")


def refuse_synthetic_on_cpu(settings: Mapping[str, Any]) -> None:
    """Raises SdfpError for synthetic acceptance on a CPU, where the first request would end the engine.

    Upstream's CPU sampler (V1 runner, 0.32.0) asserts that there is none, with any method.
    """
    if settings.get("rejection_sample_method") == "synthetic" and current_platform.is_cpu():
        raise SdfpError(
            "speculative_config['rejection_sample_method']",
            "is 'synthetic', which vLLM's sampler on a CPU does not have",
            "Leave it out, or use a GPU.",
        )
