"""Loads what describes a checkpoint, its configuration and tokenizer; its own code runs only where the user says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdfp_vllm.errors import SdfpError

FLAG = "--trust-remote-code"


def decoder_config(model_dir: Path) -> dict[str, Any]:
    """What `config.json` says of the text decoder, which multimodal checkpoints have in `text_config`."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    return config.get("text_config") or config


def refused(model_dir: str | Path, error: Exception) -> SdfpError | None:
    """What to tell the user where transformers would not load something without running its code; else None."""
    if "trust_remote_code" not in str(error):
        return None
    return SdfpError(
        f"model {model_dir}",
        "comes with code of its own, which would be run to load it",
        f"Read its .py files, then say {FLAG}; or use a model that transformers and vLLM know.",
    )


def refuse_untrusted(model_dir: Path, trusted: bool) -> None:
    """Raises SdfpError if configuration or tokenizer need the checkpoint's own code and that is not `trusted`.

    For commands that load neither themselves, before they start an engine that does.
    """
    if trusted or not any(_names_code(model_dir / f) for f in ("config.json", "tokenizer_config.json")):
        return
    load_config(model_dir)
    load_tokenizer(model_dir)


def load_config(model_dir: str | Path, trust_remote_code: bool = False) -> Any:
    """Loads the transformers configuration in a model's folder.

    Raises:
        SdfpError: If it cannot be loaded, or not without the checkpoint's own code.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as e:  # every configuration class has its own exceptions
        raise refused(model_dir, e) or SdfpError(
            f"model {model_dir}",
            f"has a config.json that cannot be loaded ({type(e).__name__}: {e})",
            "Use a decoder-only language model that this release of transformers knows.",
        ) from e


def load_tokenizer(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """Loads the Hugging Face tokenizer in a model's folder.

    Raises:
        SdfpError: If there is none, it is damaged, or it has code of its own that is not trusted.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as e:  # every tokenizer library has its own exceptions
        raise refused(model_dir, e) or SdfpError(
            f"model {model_dir}",
            f"has no tokenizer that can be loaded ({type(e).__name__}: {e})",
            "Save the tokenizer in the model's folder.",
        ) from e
    if not getattr(tokenizer, "chat_template", None) and (template := _processors_template(model_dir)):
        tokenizer.chat_template = template
    return tokenizer


def _processors_template(model_dir: Path) -> str | None:
    """A multimodal checkpoint may keep its chat template in a file of its processor's, which servers read."""
    try:
        read = json.loads((model_dir / "chat_template.json").read_text())
    except (OSError, ValueError):
        return None
    template = read.get("chat_template") if isinstance(read, dict) else None
    return template if isinstance(template, str) else None


def _names_code(file: Path) -> bool:
    try:
        return "auto_map" in json.loads(file.read_text())
    except (OSError, ValueError):
        return False  # whoever needs the file says what is wrong with it
