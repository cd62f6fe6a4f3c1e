"""Calibration text -> token windows: from a file, a jsonl field, a dataset, or the built-in sample."""

from __future__ import annotations

import json
import platform
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError

BUILT_IN = "stdlib"
# Not the standard library itself, or its test suites and vendored copies.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "__pycache__"}
# Documents are shuffled as a whole, then cut and shuffled again this many at a time, so that a
# dataset of any size is read only as far as the windows need.
_POOL = 1024

# A source: how many documents it has, how to read the i-th, and its name for the plan.
_Source = tuple[int, Callable[[int], str], str]


@dataclass(frozen=True)
class Calibration:
    """Windows of calibration text.

    Attributes:
        ids: int64 [N, T] token ids, every row a window without padding.
        description: The source, size and seed, for the plan's provenance.
    """

    ids: Tensor
    description: str

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def load_calibration(
    source: str | None,
    tokenizer: Any,
    *,
    sequences: int,
    length: int,
    seed: int,
    field: str = "text",
) -> Calibration:
    """Reads `sequences` non-overlapping windows of `length` tokens; the same arguments give the same ids.

    Documents are cut at line ends into pieces of a few windows, shuffled by `seed`, joined with
    the tokenizer's EOS and cut into windows. Where the tokenizer starts a text with BOS, every
    window does, as a served prompt would.

    Args:
        source: None or "stdlib" (the Python standard library's sources), a text file, a .jsonl
            file, or a dataset's folder or name (needs the `datasets` package; its train split).
        tokenizer: A Hugging Face tokenizer.
        field: The text field of a .jsonl file or dataset.

    Raises:
        SdfpError: If the source is missing, empty, unreadable or too short.
    """
    if sequences < 1 or length < 2:
        raise SdfpError(
            "calibration",
            f"{sequences} sequences of {length} tokens",
            "Ask for at least 1 sequence of at least 2 tokens.",
        )
    count, read, name = _open(source, field)
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = length - len(prefix)
    needed = sequences * body
    stream: list[int] = []
    for piece in _shuffled_pieces(count, read, size=8 * length, rng=random.Random(seed)):
        stream += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(stream) >= needed:
            break
    if not stream:
        raise SdfpError(f"calibration {name}", "holds no text", "Give a source with text in it.")
    if len(stream) < needed:
        raise SdfpError(
            f"calibration {name}",
            f"has {len(stream)} tokens, {sequences} sequences of {length} need {needed}",
            f"Give more text, or ask for at most {len(stream) // body} sequences or shorter ones.",
        )
    rows = [prefix + stream[i * body : (i + 1) * body] for i in range(sequences)]
    return Calibration(
        torch.tensor(rows, dtype=torch.int64), f"{name}, {sequences} x {length} tokens, seed {seed}"
    )


def count_tokens(
    source: str | None,
    tokenizer: Any,
    *,
    vocab_size: int,
    after: int,
    length: int,
    seed: int,
    field: str = "text",
    characters: int = 4 << 20,
) -> Tensor:
    """How often each token occurs in the source, int64 [vocab_size]: in up to `characters` of it.

    Args:
        after: Leaves out the text of the first `after` windows of `length` tokens that `load_calibration`
            would read with this seed, so that nothing is judged on text it was counted in.

    Raises:
        SdfpError: If the source is missing or unreadable.
    """
    count, read, _ = _open(source, field)
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    left_out, batch, taken = after * length, [], 0
    for piece in _shuffled_pieces(count, read, size=8 * length, rng=random.Random(seed)):
        if left_out > 0:
            left_out -= len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
            continue
        batch.append(piece)
        taken += len(piece)
        if taken >= characters:
            break
    for start in range(0, len(batch), _POOL):
        encoded = tokenizer(batch[start : start + _POOL], add_special_tokens=False, verbose=False)
        ids = torch.tensor([i for row in encoded["input_ids"] for i in row], dtype=torch.int64)
        counts += torch.bincount(ids, minlength=vocab_size)[:vocab_size]
    return counts


def _shuffled_pieces(
    count: int, read: Callable[[int], str], *, size: int, rng: random.Random
) -> Iterator[str]:
    order = list(range(count))
    rng.shuffle(order)
    for start in range(0, count, _POOL):
        pieces = [p for i in order[start : start + _POOL] for p in _cut(read(i), size)]
        rng.shuffle(pieces)
        yield from pieces


def _cut(text: str, size: int) -> Iterator[str]:
    """Cuts a text at the first line end after every `size` characters (or hard, in endless lines)."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + size, start + 2 * size)
        end = line_end + 1 if line_end >= 0 else start + 2 * size
        if piece := text[start:end].strip("\n"):
            yield piece
        start = end


def _open(source: str | None, field: str) -> _Source:
    if source is None or source == BUILT_IN:
        return _standard_library()
    path = Path(source)
    if path.is_file():
        return _jsonl(path, field) if path.suffix == ".jsonl" else _listed([_read_text(path)], str(path))
    if not path.is_dir() and (
        path.suffix in {".txt", ".jsonl", ".json", ".md"} or source.startswith((".", "/", "~"))
    ):
        raise SdfpError(
            f"calibration {source}",
            "no such file",
            "Correct the path, or leave it out for the built-in sample.",
        )
    return _dataset(source, field)


def _listed(texts: Sequence[str], name: str) -> _Source:
    return len(texts), texts.__getitem__, name


def standard_library_files() -> list[Path]:
    """The running Python's own sources, test suites left out, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(f for f in root.rglob("*.py") if not _LEFT_OUT & set(f.relative_to(root).parts))


def _standard_library() -> _Source:
    files = standard_library_files()
    name = f"Python {platform.python_version()} standard library"
    # A few of its files are deliberately not UTF-8.
    return len(files), lambda i: files[i].read_text(encoding="utf-8", errors="replace"), name


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SdfpError(
            f"calibration {path}", f"cannot be read as UTF-8 text ({e})", "Give a readable text file."
        ) from e


def _jsonl(path: Path, field: str) -> _Source:
    texts = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise SdfpError(
                f"calibration {path}, line {number}", f"is not JSON ({e})", "Mend or remove the line."
            ) from e
        texts.append(_text_of(row, field, f"calibration {path}, line {number}"))
    return _listed(texts, f"{path} (field {field})")


def _text_of(row: Any, field: str, where: str) -> str:
    if isinstance(row, dict) and isinstance(row.get(field), str):
        return row[field]
    found = (
        ", ".join(sorted(k for k, v in row.items() if isinstance(v, str))) if isinstance(row, dict) else ""
    )
    raise SdfpError(
        where, f"has no text field {field!r}", f"Name one of its text fields (found: {found or 'none'})."
    )


def _dataset(source: str, field: str) -> _Source:
    where = f"calibration {source}"
    try:
        import datasets
    except ImportError as e:
        raise SdfpError(
            where,
            "is not a file, and reading it as a dataset needs the `datasets` package",
            "Run `pip install datasets`, give a .txt or .jsonl file, or leave it out for the built-in sample.",
        ) from e
    try:
        saved = (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file()
        data = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except Exception as e:  # network, format and hub errors of a large library
        raise SdfpError(
            where,
            f"cannot be read as a dataset ({type(e).__name__}: {e})",
            "Correct the name, or give a .txt or .jsonl file.",
        ) from e
    if isinstance(data, dict):
        data = data["train"] if "train" in data else next(iter(data.values()))
    return len(data), lambda i: _text_of(data[i], field, f"{where}, row {i}"), f"{source} (field {field})"
