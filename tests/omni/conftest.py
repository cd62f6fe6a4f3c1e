"""Real modules of vLLM-Omni without its package's `__init__`, which rewrites vLLM and wants the vLLM of its version."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

_folder = Path(os.environ["VLLM_OMNI_FOLDER"]).resolve()
if not (_folder / "vllm_omni").is_dir():
    raise RuntimeError(
        f"VLLM_OMNI_FOLDER={_folder} has no vllm_omni; `make` installs packaging/vllm-omni.txt there"
    )
sys.path.append(str(_folder))  # cache_dit
_package = types.ModuleType("vllm_omni")
_package.__path__ = [str(_folder / "vllm_omni")]
sys.modules["vllm_omni"] = _package

# These import their whole pipelines. Modules inside them are loaded by name.
for _name in ("qwen_image", "flux", "sd3"):
    _package = types.ModuleType(f"vllm_omni.diffusion.models.{_name}")
    _package.__path__ = [str(_folder / "vllm_omni" / "diffusion" / "models" / _name)]
    sys.modules[_package.__name__] = _package
