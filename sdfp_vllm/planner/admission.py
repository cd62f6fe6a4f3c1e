"""Which checkpoints `sdfp plan` takes: seen in seconds, before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sdfp_vllm.common.checkpoint import load_config, refused
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.families import family_of
from sdfp_vllm.planner.decoder import auto_class, decoder_of, is_multimodal
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.stack import DecoderStack

# Beside config.json, where older and other tools write how they quantised.
_QUANTISED_BY = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_IN_CONFIG = ("quantization_config", "compression_config")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def admit(model_dir: Path, options: PlanOptions) -> None:
    """Refuses a checkpoint that could not be planned, or whose plan the engine could not draft with.

    Raises:
        SdfpError: If its weights are quantised; if loading it would run its own code and that is not allowed; or if
            its architecture has not been tried, is not a uniform stack of decoder layers, or has no room for what is
            asked for. A config.json that is missing or damaged is left to the fingerprint.
    """
    if how := quantised_by(model_dir):
        raise _quantised(model_dir, how)
    read = _json(model_dir / "config.json")
    if not read:
        return
    try:
        config = load_config(model_dir, options.trust_remote_code)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=options.trust_remote_code)
    except SdfpError:
        raise
    except Exception as e:  # every model class has its own exceptions
        raise refused(model_dir, e) or SdfpError(
            f"model {model_dir}",
            f"is no causal LM that transformers can build ({type(e).__name__}: {e})",
            "Give a folder with the config.json of a decoder-only language model.",
        ) from e
    DecoderStack(decoder_of(model))
    architecture = (read.get("architectures") or [type(model).__name__])[0]
    family = family_of(architecture)
    if family is None and is_multimodal(config):
        raise SdfpError(
            f"model architecture {architecture}",
            "takes more than text, and drafts were not tried with its family: no engine drafts for it",
            "Use a model of a family in docs/use/multimodal.md, or serve it without SDFP.",
        )
    if family is None and not options.anyway:
        raise SdfpError(
            f"model architecture {architecture}",
            "has not been tried with SDFP, so that its plan may be one that no engine can draft with",
            "Use a model of a family in docs/use/compatibility.md; or try it with --anyway, which costs the planning at worst.",
        )
    if family and family.call == "forward" and options.bridge != "none":
        raise SdfpError(
            f"--bridge {options.bridge}",
            f"has no place in {family.name} ({architecture}): the engine runs its layers by the decoder's own forward",
            "Leave it out.",
        )


def quantised_by(model_dir: Path) -> str | None:
    """What quantised a checkpoint's weights, and where it says so; None where they are as they were trained."""
    if any(model_dir.glob("*.gguf")) and not any(any(model_dir.glob(kind)) for kind in _WEIGHTS):
        return "GGUF"  # of which a folder may hold nothing else, not even a config.json
    config = _json(model_dir / "config.json")
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):  # text_config and the like
        for key in _IN_CONFIG:
            if isinstance(said := part.get(key), dict) and said:
                return f"{_method(said)}, {key} in config.json"
    for name in _QUANTISED_BY:
        if said := _json(model_dir / name):
            return f"{_method(said)}, {name}"
    return None


def _method(said: dict[str, Any]) -> str:
    """The method's name: `quant_method`, or what NVIDIA's ModelOpt calls it."""
    inner = said.get("quantization")
    parts = [said, inner] if isinstance(inner, dict) else [said]
    named = (part.get(key) for part in parts for key in ("quant_method", "quant_algo"))
    return str(next((name for name in named if name), "an unnamed method"))


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _quantised(model: str | Path, how: str) -> SdfpError:
    return SdfpError(
        f"model {model}",
        f"has quantised weights ({how}), and `sdfp plan` takes gradients of weights as they were trained",
        "Plan and serve the unquantised checkpoint, whose drafts may run on rounded weights (--precision int8); or serve "
        "this one without SDFP: a plan made for the unquantised one is for other weights, and is refused for it.",
    )
