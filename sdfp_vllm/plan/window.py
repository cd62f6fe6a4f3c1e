"""DraftWindow: how much of a long context a draft attends to."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sdfp_vllm.errors import SdfpError

MAX_WINDOW = 1 << 30  # tokens; no context is longer


class DraftWindow(BaseModel):
    """The first `sinks` tokens and the last `last` of a context that is longer than `beyond`: all that drafts see of it.

    The first tokens are kept because attention gathers there whatever they say (StreamingLLM, arXiv 2309.17453). By
    whole blocks of the KV cache, so that up to a block more is seen at each edge.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sinks: Annotated[int, Field(ge=0, le=MAX_WINDOW, strict=True)] = 4
    last: Annotated[int, Field(ge=1, le=MAX_WINDOW, strict=True)]
    beyond: Annotated[int, Field(ge=0, le=MAX_WINDOW, strict=True)] = 0

    def seen(self, context: int) -> int:
        """How many tokens of a context drafts see, but for the rest of a block at each edge."""
        least = self.sinks + self.last
        return context if context <= max(least, self.beyond) else least

    def __str__(self) -> str:
        longer = f" of more than {self.beyond:,}" if self.beyond else ""
        return f"the first {self.sinks:,} and the last {self.last:,} tokens of a context{longer}"


def parse_window(subject: str, asked: Any) -> DraftWindow | None:
    """The window that `asked` stands for: "none", or a number of last tokens.

    Args:
        subject: What a refusal names: a flag or a setting.

    Raises:
        SdfpError: For anything else.
    """
    if asked == "none":
        return None
    last = int(asked) if isinstance(asked, str) and asked.isascii() and asked.isdecimal() else asked
    if isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= MAX_WINDOW:
        raise SdfpError(
            subject,
            f"is {asked!r}",
            'Give the number of last tokens that drafts shall attend to, or "none" for the whole context.',
        )
    return DraftWindow(last=last)
