"""Cost-scaled copies of the toy target and its draft, made once into the user's cache: synthetic workloads."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.store import plans_root
from tests.toy.widen import read_config, widen, widened_bytes

PACKAGED = Path(__file__).parent

# 16 layers of this shape are 0.32B parameters; the draft's 2 layers are then 1/8 of the
# target's cost, the usual proportion of a separate draft.
SHAPE = dict(hidden=1024, mlp=5632, heads=32, kv_heads=8)
SEED = 0
_SPARE_BYTES = 256 << 20
_RECIPE = 1  # raise when `widen` writes something else from the same source


def demo_cache() -> Path:
    """The per-user folder of cost-scaled copies, beside the plans."""
    return plans_root().parent / "demo"


def demo_target(cache: Path | None = None, source: Path = PACKAGED / "model") -> Path:
    """Folder of the cost-scaled toy target (float32, about 1.3 GB), made on first use.

    Raises:
        SdfpError: If the checkout lacks the model, or the disk lacks room.
    """
    return _materialise("target", source, cache or demo_cache())


def demo_draft(cache: Path | None = None, source: Path = PACKAGED / "draft") -> Path:
    """Folder of the cost-scaled separate draft (float32, about 0.2 GB); as `demo_target`."""
    return _materialise("draft", source, cache or demo_cache())


def _materialise(name: str, source: Path, cache: Path) -> Path:
    if not (source / "model.safetensors").is_file():
        raise SdfpError(
            str(source),
            "the toy model is not in this checkout",
            "Take a full checkout, or train it with tests/toy/train.py.",
        )
    copy = cache / f"{name}-{_key(source)}"
    if copy.is_dir():
        return copy
    needed = widened_bytes(read_config(source), **SHAPE, dtype=torch.float32) + _SPARE_BYTES
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    except OSError as e:
        raise SdfpError(
            str(cache), f"cannot be used ({e.strerror})", "Set SDFP_CACHE_DIR to a folder of yours."
        ) from e
    if free < needed:
        raise SdfpError(
            str(cache),
            f"has {free / 1e9:.1f} GB free, the cost-scaled demo {name} needs {needed / 1e9:.1f} GB",
            "Free some space, or set SDFP_CACHE_DIR to a larger disk.",
        )
    try:
        return widen(source, copy, **SHAPE, dtype=torch.float32, seed=SEED)
    except (SdfpError, OSError):
        if copy.is_dir():  # another process was faster; its copy is the same
            return copy
        raise


def _key(source: Path) -> str:
    """Hash of all that decides the copy: the source's files, the shape, the recipe."""
    digest = hashlib.sha256(repr((_RECIPE, SEED, sorted(SHAPE.items()))).encode())
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            digest.update(file.name.encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
