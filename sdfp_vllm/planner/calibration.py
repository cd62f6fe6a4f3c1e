"""Calibration text: windows of a file, a jsonl field, a dataset or the built-in sample; prompts of chats."""

from __future__ import annotations

import platform
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfp_vllm.common.json_lines import json_rows
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.chat_rows import CHAT_FIELDS, Chat, chat_of, is_text, pictures_in
from sdfp_vllm.planner.chats import has_chat_template, render_chat
from sdfp_vllm.planner.pictures import picture_of

BUILT_IN = "stdlib"
# Not the standard library itself, or its test suites and vendored copies.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "__pycache__"}
# Documents are shuffled as a whole, then cut and shuffled again this many at a time, so that a
# dataset of any size is read only as far as the windows need.
_POOL = 1024

_JSON_LINES = {".jsonl", ".ndjson"}
LONGEST_PROMPT = 512

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
        source: None or "stdlib" (the Python standard library's sources), a text file, a .jsonl or .ndjson
            file, or a dataset's folder or name (needs the `datasets` package; its train split).
        tokenizer: A Hugging Face tokenizer.
        field: The text field of such a file or dataset.

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
        return _jsonl(path, field) if _is_json_lines(path) else _listed([_read_text(path)], str(path))
    if not path.is_dir() and (
        path.suffix in {".txt", ".json", ".md"} or _is_json_lines(path) or source.startswith((".", "/", "~"))
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
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise SdfpError(
            f"calibration {path}", f"cannot be read as UTF-8 text ({e})", "Give a readable text file."
        ) from e


def _is_json_lines(path: Path) -> bool:
    return path.suffix.lower() in _JSON_LINES


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a .jsonl file, each with its place for errors."""
    return ((where, row) for _, where, row in json_rows(path, f"calibration {path}"))


def _jsonl(path: Path, field: str) -> _Source:
    return _listed([_text_of(row, field, where) for where, row in _rows(path)], f"{path} (field {field})")


def _text_of(row: Any, field: str, where: str) -> str:
    if isinstance(row, dict) and is_text(row.get(field)):
        return row[field]
    found = ", ".join(sorted(k for k, v in row.items() if is_text(v))) if isinstance(row, dict) else ""
    raise SdfpError(
        where, f"has no text field {field!r}", f"Name one of its text fields (found: {found or 'none'})."
    )


def is_chat_source(source: str | None) -> bool:
    """Whether `read_chats` is for this source: a .jsonl or .ndjson file whose first row is a chat.

    Raises:
        SdfpError: If the first row is not JSON, or cannot be read.
    """
    path = Path(source or BUILT_IN)
    if not (_is_json_lines(path) and path.is_file()):
        return False
    _, row = next(_rows(path), ("", None))
    return isinstance(row, dict) and any(field in row for field in CHAT_FIELDS)


def read_chats(source: str, tokenizer: Any, count: int, seed: int) -> list[Tensor]:
    """Prompts of `count` rows of a file of chats, each drawn once; equal arguments give equal prompts.

    A row is a chat by one of its fields: `messages` (role and content of each, as in OpenAI's API; answers at
    the end are cut off, so that the model gives its own), `turns` (a user's texts, of which the first is
    asked) or `prompt` (a user's text). The latter two are plain text for a tokenizer without chat template.

    Returns:
        int64 [P] each, P at most LONGEST_PROMPT: longer ones are left out. Fewer than `count` where the file
        has no more.

    Raises:
        SdfpError: If the file cannot be read, any row is no chat, the template refuses one, or none remains.
    """
    path = Path(source)
    chats = [(where, *chat_of(row, where)) for where, row in _rows(path)]
    random.Random(seed).shuffle(chats)
    prompts: list[Tensor] = []
    for where, field, messages in chats:
        if len(prompts) == count:
            break
        ids = _prompt_of(tokenizer, field, messages, where)
        if 0 < len(ids) <= LONGEST_PROMPT:
            prompts.append(ids)
    if not prompts:
        raise _no_chats(path, bool(chats))
    return prompts


def chats_with_pictures(source: str) -> list[Chat]:
    """Every chat of a file, in its order, where one or more hold pictures; else none.

    Pictures are looked up (`picture_of`), and not opened.

    Raises:
        SdfpError: If the file cannot be read, or any row is no chat or names a picture that cannot be had.
    """
    path = Path(source)
    take = partial(picture_of, beside=path.parent)
    chats = [Chat(where, chat_of(row, where, take)[1]) for where, row in _rows(path)]
    return chats if any(pictures_in(chat.messages) for chat in chats) else []


def read_questions(source: str, tokenizer: Any) -> list[tuple[str, Tensor]]:
    """Every chat of a file, in its order, with its kind: the row's `category`, "all" where it has none.

    Rows are those of `read_chats`; longer ones than LONGEST_PROMPT are left out.

    Raises:
        SdfpError: As `read_chats`.
    """
    path, found, rows = Path(source), [], 0
    for where, row in _rows(path):
        rows += 1
        ids = _prompt_of(tokenizer, *chat_of(row, where), where)
        if 0 < len(ids) <= LONGEST_PROMPT:
            found.append((str(row.get("category", "all")), ids))
    if not found:
        raise _no_chats(path, bool(rows))
    return found


def _no_chats(path: Path, too_long: bool) -> SdfpError:
    return SdfpError(
        f"calibration {path}",
        f"has no chat of at most {LONGEST_PROMPT} tokens" if too_long else "holds no chats",
        "Give a file with shorter ones." if too_long else "Give a file with chats in it.",
    )


def _prompt_of(tokenizer: Any, field: str, messages: list[dict[str, str]], where: str) -> Tensor:
    if has_chat_template(tokenizer):
        return render_chat(tokenizer, messages, where)
    if field == "messages":
        raise SdfpError(
            f"{where}, field messages",
            "needs a chat template, which the model's tokenizer does not have",
            "Give rows with a text or prompt field.",
        )
    return torch.tensor(tokenizer(messages[0]["content"], verbose=False)["input_ids"], dtype=torch.int64)


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
