"""Loads a diffusers pipeline from a folder."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sdfp_vllm.errors import SdfpError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(folder: str | Path, dtype: str = "float32") -> Any:
    """Loads the diffusers pipeline saved in `folder`, in `dtype`.

    Raises:
        SdfpError: If there is none, it cannot be loaded, or the dtype is unknown.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as e:
        raise SdfpError(
            "DiP-GO", "diffusers is not installed", "Install it: pip install 'sdfp-vllm[diffusion]'."
        ) from e
    if dtype not in _DTYPES:
        raise SdfpError("--dtype", f"{dtype} is unknown", f"Choose from {', '.join(_DTYPES)}.")
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise SdfpError(
            str(folder),
            "no model_index.json in it",
            "Give the folder of a diffusers pipeline (pipe.save_pretrained).",
        )
    try:
        index = json.loads((folder / "model_index.json").read_text())
        # A pipeline saved without a component is loaded without it; diffusers wants to be told.
        absent = {name: None for name, entry in index.items() if entry == [None, None]}
        # The default of low_cpu_mem_usage wants accelerate. Most families do without; Wan keeps some weights in float32 and does not.
        with _quietly():
            pipe = DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, low_cpu_mem_usage=_has_accelerate(), **absent
            )
        return pipe if dtype == "float32" else pipe.to(_DTYPES[dtype])
    except Exception as e:
        way_out = "Save the pipeline again with diffusers."
        if "low_cpu_mem_usage" in str(e) and not _has_accelerate():
            way_out = "Install accelerate, which this family's weights need: pip install accelerate."
        raise SdfpError(str(folder), f"cannot be loaded ({e})", way_out) from e


def _has_accelerate() -> bool:
    return importlib.util.find_spec("accelerate") is not None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without diffusers' remarks on components whose class it does not know."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
