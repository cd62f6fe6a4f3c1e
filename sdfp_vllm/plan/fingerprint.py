"""Which model a plan was made for: its shape, and a hash over its config and the weights that an engine loads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdfp_vllm.common.checkpoint import load_config
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.model_files import resolve_model_dir, weight_files

__all__ = ["Fingerprint", "fingerprint", "resolve_model_dir"]

_SAMPLE_BYTES = 64 * 1024
_SHAPE = ("num_hidden_layers", "hidden_size", "vocab_size")
# Written by the saving library or changed by the user without changing what the model computes.
_VOLATILE_KEYS = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"}


class Fingerprint(BaseModel):
    """Identity of a target model.

    `sha256` covers config.json (without volatile keys) and, per weight file that an engine loads, its name,
    size, header and a sample of its data, so that a fine-tune of the same shape differs, and what else lies in the
    folder does not matter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    num_layers: int = Field(ge=1, le=100_000)
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    def differences(self, other: Fingerprint) -> list[str]:
        """Names the fields in which `other` is another model, with both values."""
        return [
            f"{name} is {getattr(self, name)} in the plan but {getattr(other, name)} in the model"
            for name in type(self).model_fields
            if getattr(self, name) != getattr(other, name)
        ]


def fingerprint(model_dir: str | Path, weights: bool = True) -> Fingerprint:
    """Computes the fingerprint of a model folder without loading any weight.

    Args:
        weights: False leaves the weight files out, for the shape alone.

    Raises:
        SdfpError: If config.json is missing or lacks a needed field, or a file is missing or cannot be read.
    """
    model_dir = Path(model_dir)
    config = _read_config(model_dir)
    text = _decoder_config(model_dir, config)
    digest = hashlib.sha256()
    stable = {k: v for k, v in config.items() if k not in _VOLATILE_KEYS}
    digest.update(json.dumps(stable, sort_keys=True).encode())
    for file in weight_files(model_dir) if weights else ():
        digest.update(file.name.encode())
        try:
            _hash_weight_file(file, digest)
        except OSError as e:
            raise SdfpError(
                str(file),
                f"cannot be read ({e.strerror or e})",
                "Mend its rights, or download the model again.",
            ) from e
    try:
        return Fingerprint(
            architecture=(config.get("architectures") or ["unknown"])[0],
            num_layers=text["num_hidden_layers"],
            hidden_size=text["hidden_size"],
            vocab_size=text["vocab_size"],
            sha256=digest.hexdigest(),
        )
    except KeyError as e:
        raise SdfpError(
            str(model_dir / "config.json"),
            f"field {e} is missing",
            "Use a decoder-only language model saved by transformers.",
        ) from e
    except ValidationError as e:
        first = e.errors()[0]
        raise SdfpError(
            str(model_dir / "config.json"), f"{first['loc'][0]}: {first['msg']}", "Download the model again."
        ) from e


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise SdfpError(str(path), "no such file", "Give the folder of a saved model.") from e
    except (OSError, ValueError) as e:
        raise SdfpError(str(path), f"cannot be read ({e})", "Download the model again.") from e
    if not isinstance(config, dict):
        raise SdfpError(str(path), "is not a JSON object", "Download the model again.")
    return config


def _decoder_config(model_dir: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that has the decoder's shape: `text_config` in a multimodal one.

    There a field with its class's default may be left out, as LLaVA 1.5's and Gemma 3's checkpoints do: transformers knows it.
    """
    text = config.get("text_config")
    if not isinstance(text, dict) or not text:
        return config
    absent = [name for name in _SHAPE if name not in text]
    if not absent:
        return text
    known = load_config(model_dir).get_text_config()
    return text | {name: getattr(known, name) for name in absent if hasattr(known, name)}


def _hash_weight_file(file: Path, digest: Any) -> None:
    """Adds size, head and a middle sample: reads at most header + 128 KiB of a file of any size."""
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as f:
        head = f.read(8)
        header = int.from_bytes(head, "little") if file.suffix == ".safetensors" else 0
        digest.update(head + f.read(min(header, 100 << 20) + _SAMPLE_BYTES))
        f.seek(size // 2)
        digest.update(f.read(_SAMPLE_BYTES))
