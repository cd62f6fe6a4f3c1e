"""Loading a model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.remote_code import refused


def load_tokenizer(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """Loads the Hugging Face tokenizer in a model's folder.

    Raises:
        SdfpError: If there is none, it is damaged, or it has code of its own that is not trusted.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as e:  # every tokenizer library has its own exceptions
        raise refused(model_dir, e) or SdfpError(
            f"model {model_dir}",
            f"has no tokenizer that can be loaded ({type(e).__name__}: {e})",
            "Save the tokenizer in the model's folder.",
        ) from e
