"""What a request may say of its own drafts, in vLLM's extra arguments, and what its other fields say of them.

`SamplingParams.extra_args` from Python, `vllm_xargs` from a server's routes. `docs/use/settings.md` is this for users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PREFIX = "sdfp_"
DRAFT, LENGTH, COPIES = "sdfp_draft", "sdfp_max_draft_tokens", "sdfp_copies"
# Names and what they take. A server's routes turn true and false into 1 and 0 before anybody sees them.
FIELDS = {
    DRAFT: "true or false (or 1 or 0)",
    LENGTH: "a whole number from 0 on",
    COPIES: "true or false (or 1 or 0)",
}


@dataclass(frozen=True)
class Limits:
    """How many tokens may be drafted for a request in a round, and whether they may be copied from its context."""

    longest: int = 1 << 30
    copies: bool = True


NONE = Limits()


def limits(params: Any) -> Limits:
    """Reads the limits that a request, by its SamplingParams, has set to its drafts; the fields are right already."""
    extra = getattr(params, "extra_args", None)
    if not extra:
        return NONE
    longest = extra.get(LENGTH, NONE.longest) if extra.get(DRAFT, True) else 0
    return Limits(longest, bool(extra.get(COPIES, True)))


def refuse_wrong_limits(params: Any) -> None:
    """Raises upstream's VLLMValidationError for a field of ours that is unknown, or has a value that it cannot have."""
    from vllm.exceptions import VLLMValidationError

    for name, value in (getattr(params, "extra_args", None) or {}).items():
        if not name.startswith(PREFIX):
            continue
        if name not in FIELDS:
            problem = f"{name} is not a field of SDFP. Remove it; the fields are {', '.join(FIELDS)}."
        elif not _fits(name, value):
            problem = f"{name} is {value!r}. Give {FIELDS[name]}, or leave it out."
        else:
            continue
        raise VLLMValidationError(problem, parameter=name, value=value)


def _fits(name: str, value: Any) -> bool:
    if name == LENGTH:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, int) and value in (0, 1)


def is_ruled(params: Any) -> bool:
    """Whether a request has rules for its output, which drafts do not know: what it rejects says little about others."""
    return params is not None and bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.bad_words
        or params.allowed_token_ids
        or params.logit_bias
        or params.min_tokens
        or params.structured_outputs
        or params.thinking_token_budget is not None
    )
