"""Reading and checking the input: whatever is wrong with a row is said before an engine starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdfp_vllm.common.json_lines import json_rows
from sdfp_vllm.engine.sampling_params import check_sampling
from sdfp_vllm.errors import SdfpError


class Row(BaseModel):
    """A line of the input file.

    Attributes:
        id: Names the answer; unique in the file. Without it, the line's number from 1.
        prompt, messages: Text to continue, or a chat in OpenAI's form; one of the two.
        max_tokens, temperature, top_p, seed, stop: As in vLLM's SamplingParams; None for the
            command's flags and vLLM's defaults.
    """

    model_config = ConfigDict(extra="forbid")

    id: str | int | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Row:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt or messages, one of the two")
        return self


@dataclass(frozen=True)
class Request:
    """A checked row: its place in the file from 0, its id, token ids and SamplingParams' arguments."""

    index: int
    id: str | int
    prompt_token_ids: list[int]
    sampling: dict[str, Any]

    @property
    def digest(self) -> str:
        """Hash of what is asked: with the run's key, all that the answer depends on."""
        return hashlib.sha256(json.dumps([self.prompt_token_ids, self.sampling]).encode()).hexdigest()[:16]


def read_requests(path: Path, tokenizer: Any, *, longest: int, defaults: dict[str, Any]) -> list[Request]:
    """Reads and tokenizes the input.

    Args:
        longest: Tokens the engine has room for, prompt and answer together.
        defaults: Sampling fields for rows that do not set them, as flags of their names gave them. None is no
            setting; a `seed` is counted up by row.

    Raises:
        SdfpError: For a flag that vLLM refuses, a file that cannot be read or holds no row, or the first faulty
            line, by number.
    """
    defaults = {flag: value for flag, value in defaults.items() if value is not None}
    for flag, value in defaults.items():
        check_sampling("--" + flag.replace("_", "-"), {flag: value})
    requests: list[Request] = []
    lines: dict[str | int, int] = {}
    for number, where, row in _rows(path):
        name = number if row.id is None else row.id
        if name in lines:
            raise SdfpError(where, f"id {name!r} is also line {lines[name]}'s", "Give every row its own id.")
        lines[name] = number
        sampling = _sampling(row, defaults, len(requests), where)
        ids = _token_ids(row, tokenizer, where)
        if len(ids) + sampling["max_tokens"] > longest:
            raise SdfpError(
                where,
                f"{len(ids)} prompt tokens and max_tokens {sampling['max_tokens']} exceed {longest}",
                "Shorten the prompt, lower max_tokens or raise --max-model-len.",
            )
        requests.append(Request(len(requests), name, ids, sampling))
    if not requests:
        raise SdfpError(str(path), "holds no row", 'Give lines like {"id": 1, "prompt": "..."}.')
    return requests


def run_key(*identity: str) -> str:
    """Hash of what all answers of a run depend on: model, engine and plan."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _rows(path: Path) -> Iterator[tuple[int, str, Row]]:
    for number, where, row in json_rows(path, str(path)):
        yield number, where, _row(row, where)


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise SdfpError(where, "is not a JSON object", 'Give lines like {"id": 1, "prompt": "..."}.')
    try:
        return Row.model_validate(row)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        known = f"The fields are {', '.join(Row.model_fields)}." if first["type"] == "extra_forbidden" else ""
        what = f"{field}: {first['msg']}" if field else first["msg"]
        raise SdfpError(where, what, known or "Correct the line.") from e


def _sampling(row: Row, defaults: dict[str, Any], index: int, where: str) -> dict[str, Any]:
    """What the row asks for: its own settings, else the command's. No seed where neither asks for one."""
    fields = ("max_tokens", "temperature", "top_p", "seed", "stop")
    own = {k: v for k in fields if (v := getattr(row, k)) is not None}
    counted = {"seed": defaults["seed"] + index} if "seed" in defaults else {}
    sampling = {**defaults, **counted, **own}
    check_sampling(where, sampling)
    return sampling


def _token_ids(row: Row, tokenizer: Any, where: str) -> list[int]:
    if row.prompt is not None:
        ids = tokenizer.encode(row.prompt)
    else:
        try:
            ids = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, return_dict=False)
        except Exception as e:  # no template, or whatever a template raises
            raise SdfpError(
                where,
                f"messages cannot be put into the model's chat template ({type(e).__name__}: {e})",
                "Correct them, or give a prompt.",
            ) from e
    if not ids:
        raise SdfpError(where, "has no token in the model's vocabulary", "Give it some text.")
    return ids
