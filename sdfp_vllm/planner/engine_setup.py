"""How the job starts engines: whether it can, with which settings, in which dtype."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch

from sdfp_vllm.plan.families import MULTIMODAL
from sdfp_vllm.plan.fingerprint import Fingerprint
from sdfp_vllm.planner.options import PlanOptions

ROOM = 32  # positions behind a text, for drafts


def engine_is_here() -> bool:
    """Whether vLLM is installed; plans can be made without it, from torch's own products."""
    return find_spec("vllm") is not None


def engine_settings(identity: Fingerprint, positions: int, options: PlanOptions) -> dict[str, object]:
    """Arguments of an engine for one request of `positions` tokens of text, and drafts behind them."""
    settings: dict[str, object] = {
        "max_model_len": positions + ROOM,
        "enforce_eager": options.eager,
        "trust_remote_code": options.trust_remote_code,
    }
    if identity.architecture in MULTIMODAL:
        settings["language_model_only"] = True  # loads no encoder, and tries none with its largest image
    if torch.cuda.is_available():  # this process keeps some of the GPU
        free, total = torch.cuda.mem_get_info()
        settings["gpu_memory_utilization"] = round(0.9 * free / total, 2)
    return settings


def stored_dtype(model_dir: Path) -> str:
    """The checkpoint's own dtype, which vLLM serves by default."""
    config = json.loads((model_dir / "config.json").read_text())
    config = config | (config.get("text_config") or {})
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
