"""The texts of a job: what the target is asked, what it writes, and what is left for the check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.calibration import count_tokens, is_chat_source, load_calibration, read_chats
from sdfp_vllm.planner.chats import chat_prompts, has_chat_template
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.rollout import Continuations
from sdfp_vllm.planner.stack import DecoderStack

CHECKED = 4  # prompts for the check on the engine, which nothing was tried on
_OWN = "chats that the model asks itself"


@dataclass(frozen=True)
class Texts:
    """Prompts of one kind: windows of a text, chats of a file, or chats that the model makes up (not there yet).

    Attributes:
        options, tokenizer: As asked.
        prompts: Prompts for the target, `options.texts` + CHECKED of them; None where the model makes them up.
        description: Source, for the plan's provenance.
    """

    options: PlanOptions
    tokenizer: Any
    prompts: list[Tensor] | None
    description: str

    @classmethod
    def read(cls, options: PlanOptions, tokenizer: Any) -> Texts:
        """Reads what the user gave; without anything, a model with a chat template asks itself.

        Raises:
            SdfpError: If the source is missing, faulty or too short: before the model is loaded.
        """
        count = options.texts + CHECKED
        source = options.calibration
        if source is None and has_chat_template(tokenizer):
            return cls(options, tokenizer, None, f"{_OWN}, seed {options.seed}")
        if source is not None and is_chat_source(source):
            chats = read_chats(source, tokenizer, count, options.seed)
            if len(chats) < options.texts:
                raise SdfpError(
                    f"calibration {source}",
                    f"has {len(chats)} chats of usable length, {options.texts} are needed",
                    "Give more, or leave --calibration out: a model with a chat template then asks itself.",
                )
            return cls(options, tokenizer, chats, f"{source} ({len(chats)} chats, seed {options.seed})")
        # Drafts are tried on other text than the layers were scored on.
        found = _windows(options, tokenizer, count, options.prompt, options.seed + 1)
        return cls(options, tokenizer, list(found.ids), found.description)

    def corpus(self) -> Tensor:
        """Windows for Fisher traces where they are not the target's own text, int64 [N, T].

        Raises:
            SdfpError: If there is not enough text.
        """
        o = self.options
        if self.prompts is None or not _is_chats(o, self.tokenizer):
            return _windows(o, self.tokenizer, o.sequences, o.length, o.seed).ids
        stream = torch.cat(self.prompts)
        count = len(stream) // o.length
        if not count:
            raise SdfpError(
                f"calibration {o.calibration}",
                f"has {len(stream)} tokens, a window for Fisher traces needs {o.length}",
                "Give more chats, or --length with a smaller number.",
            )
        return stream[: min(count, o.sequences) * o.length].view(-1, o.length)

    def ask(self, stack: DecoderStack, advance: Callable[[int], None] | None = None) -> list[Tensor]:
        """The prompts; made up by the model where nothing was given."""
        if self.prompts is not None:
            return self.prompts
        count = self.options.texts + CHECKED
        return chat_prompts(stack, self.tokenizer, count, seed=self.options.seed, advance=advance)

    def frequencies(self, own: Tensor, vocab_size: int) -> list[Tensor]:
        """How often tokens occur, int64 [V] each: in what the target wrote (`own`, its tokens) and in the source."""
        o = self.options
        counts = [torch.bincount(own.cpu(), minlength=vocab_size)[:vocab_size]]
        if self.prompts is not None and _is_chats(o, self.tokenizer):
            counts.append(torch.bincount(torch.cat(self.prompts), minlength=vocab_size)[:vocab_size])
            return counts
        counts.append(
            count_tokens(
                o.calibration,
                self.tokenizer,
                vocab_size=vocab_size,
                after=o.texts + CHECKED,
                length=o.prompt,
                seed=o.seed + 1,
                field=o.field,
            )
        )
        return counts


def own_windows(text: Continuations, most: int) -> Tensor:
    """The ends of up to `most` sequences that the target wrote, of one length without padding, int64 [N, T]."""
    ids = text.ids[:most]
    return ids[:, int(text.begins[:most].max()) :]


def _is_chats(options: PlanOptions, tokenizer: Any) -> bool:
    return options.calibration is not None and is_chat_source(options.calibration)


def _windows(options: PlanOptions, tokenizer: Any, sequences: int, length: int, seed: int) -> Any:
    return load_calibration(
        options.calibration, tokenizer, sequences=sequences, length=length, seed=seed, field=options.field
    )
