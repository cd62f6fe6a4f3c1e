"""LongText: a document and what is asked of it, cut to a context of any length."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdfp_vllm.common.checkpoint import decoder_config
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.calibration import is_chat_source, load_calibration
from sdfp_vllm.planner.chats import has_chat_template, rendered
from sdfp_vllm.planner.options import PlanOptions

SPARE = 64  # positions behind an answer, for drafts
_MARK = "sdfpDocument"
_SUMMARY = "Summarise the text above in a few sentences."


@dataclass(frozen=True)
class LongText:
    """Token ids: a document, of which a prompt shows as much as fits, and what comes before and behind it."""

    document: list[int]
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    @classmethod
    def asking(cls, tokenizer: Any, document: list[int], task: str) -> LongText:
        """A chat whose one message is the document, then the task.

        Raises:
            SdfpError: If the template refuses the chat, or hides the message.
        """
        message = {"role": "user", "content": f"{_MARK}\n\n{task}"}
        before, shown, behind = rendered(tokenizer, [message], "chat template").partition(_MARK)
        if not shown:
            raise SdfpError("chat template", "leaves out what a user says", "Mend the template.")
        encoded = (tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, behind))
        return cls(document, *encoded)

    def prompt(self, context: int, answer: int) -> list[int]:
        """What leaves room in `context` positions for `answer` tokens and drafts behind them."""
        room = context - answer - SPARE - len(self.before) - len(self.behind)
        return [*self.before, *self.document[:room], *self.behind]


def long_texts(
    model_dir: Path, tokenizer: Any, options: PlanOptions, count: int, contexts: tuple[int, ...]
) -> list[LongText]:
    """Texts to try windows on, as long as the model and `contexts` go: continued, and every second one summarised if the model chats.

    None for a model of shorter contexts only. Nobody asked for these: where `--calibration` is too short for them the built-in sample stands
    in, where the chat template makes no summary of them they are continued.
    """
    lengths = [c for c in contexts if c <= positions(model_dir)]
    if not lengths:
        return []
    given = options.calibration
    own = [] if given is None or is_chat_source(given) else [given]
    for source in [*own, None]:
        with contextlib.suppress(SdfpError):
            documents = load_calibration(
                source,
                tokenizer,
                sequences=count,
                length=lengths[-1],
                seed=options.seed + 2,
                field=options.field,
            ).ids.tolist()
            return [_asked(tokenizer, ids, bool(i % 2)) for i, ids in enumerate(documents)]
    return []


def _asked(tokenizer: Any, document: list[int], summarised: bool) -> LongText:
    if summarised and has_chat_template(tokenizer):
        with contextlib.suppress(SdfpError):
            return LongText.asking(tokenizer, document, _SUMMARY)
    return LongText(document)


def positions(model_dir: Path) -> int:
    """The longest context that the model is made for; 0 where its config does not say."""
    return int(decoder_config(model_dir).get("max_position_embeddings") or 0)
