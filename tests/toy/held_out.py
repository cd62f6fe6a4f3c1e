"""Prompts for the toy target: stretches of Python source that it was not trained on."""

from __future__ import annotations

import random
import sys
import sysconfig
from pathlib import Path

from sdfp_vllm.errors import SdfpError

# These mirror train.py, which holds out every 50th file.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}
HELD_OUT_EVERY = 50
TRAINED_ON_PYTHON = (3, 11)


def held_out_files() -> list[Path]:
    """The files of the Python standard library that training held out, in order.

    The rule counts files, so it names the held-out ones only on the Python release that
    training ran on: see `is_held_out`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts))
    return files[::HELD_OUT_EVERY]


def is_held_out() -> bool:
    """Whether this Python is the release the toy target was trained on, so that the prompts are unseen."""
    return sys.version_info[:2] == TRAINED_ON_PYTHON


def held_out_prompts(tokenizer_dir: Path, *, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Takes `count` prompts of `tokens` token ids each, from different files while they last.

    Raises:
        SdfpError: If the tokenizer cannot be read, or no held-out file is long enough.
    """
    from tokenizers import Tokenizer

    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise SdfpError(str(path), "no such file", "Use a model folder saved with its tokenizer.")
    tokenizer = Tokenizer.from_file(str(path))
    encoded = [
        tokenizer.encode(f.read_text(encoding="utf-8", errors="replace")).ids for f in held_out_files()
    ]
    usable = [ids for ids in encoded if len(ids) >= tokens]
    if not usable:
        raise SdfpError("prompt length", f"no held-out file has {tokens} tokens", "Ask for shorter prompts.")
    rng = random.Random(seed)
    order = rng.sample(usable, len(usable))
    prompts = []
    for i in range(count):
        ids = order[i % len(order)]
        start = rng.randrange(len(ids) - tokens + 1)
        prompts.append(ids[start : start + tokens])
    return prompts
