"""Loading a model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdfp_vllm.errors import SdfpError


def load_tokenizer(model_dir: Path) -> Any:
    """Loads the Hugging Face tokenizer in a model's folder.

    Raises:
        SdfpError: If there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as e:  # every tokenizer library has its own exceptions
        raise SdfpError(
            f"model {model_dir}",
            f"has no tokenizer that can be loaded ({type(e).__name__}: {e})",
            "Save the tokenizer in the model's folder.",
        ) from e
