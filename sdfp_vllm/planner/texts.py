"""The texts of a job: what the target is asked, what it writes, and what is left for the check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.calibration import (
    chats_with_pictures,
    count_tokens,
    is_chat_source,
    load_calibration,
    read_chats,
)
from sdfp_vllm.planner.chat_rows import Chat, pictures_in
from sdfp_vllm.planner.chats import chat_prompts, has_chat_template
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.pictured import Pictured, PictureReader, read_pictured
from sdfp_vllm.planner.rollout import Continuations
from sdfp_vllm.planner.shown import Window, Windows
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
        pictured: Where chats show images, those that `prompts` are of; else empty.
    """

    options: PlanOptions
    tokenizer: Any
    prompts: list[Tensor] | None
    description: str
    pictured: Sequence[Pictured] = ()

    @classmethod
    def read(cls, options: PlanOptions, tokenizer: Any, model_dir: Path | None = None) -> Texts:
        """Reads what the user gave; without anything, a model with a chat template asks itself.

        Args:
            model_dir: Where the model's processor is, for chats that show images; None refuses those.

        Raises:
            SdfpError: If the source is missing, faulty or too short, or shows images that the model does not take:
                before the model is loaded.
        """
        count = options.texts + CHECKED
        source = options.calibration
        if source is None and has_chat_template(tokenizer):
            return cls(options, tokenizer, None, f"{_OWN}, seed {options.seed}")
        if source is not None and is_chat_source(source):
            if showing := chats_with_pictures(source):
                return cls._shown(options, tokenizer, model_dir, showing)
            chats = read_chats(source, tokenizer, count, options.seed)
            _check_enough(options, len(chats))
            return cls(options, tokenizer, chats, f"{source} ({len(chats)} chats, seed {options.seed})")
        # Drafts are tried on other text than the layers were scored on.
        found = _windows(options, tokenizer, count, options.prompt, options.seed + 1)
        return cls(options, tokenizer, list(found.ids), found.description)

    @classmethod
    def _shown(cls, options: PlanOptions, tokenizer: Any, model_dir: Path | None, chats: list[Chat]) -> Texts:
        """Prompts of chats that show images."""
        first = next(found[0].where for chat in chats if (found := pictures_in(chat.messages)))
        if options.ray:
            raise SdfpError(
                first,
                "is an image, and workers of --ray are sent text alone",
                "Leave --ray out, or the images.",
            )
        reader = PictureReader(model_dir, tokenizer, first, options.trust_remote_code)
        read = read_pictured(
            chats, reader, options.texts + CHECKED, options.seed, reader.longest(options.new_tokens)
        )
        _check_enough(options, len(read))
        images = sum(chat.pictures for chat in read)
        description = f"{options.calibration} ({len(read)} chats, {images} images, seed {options.seed})"
        return cls(options, tokenizer, [chat.ids for chat in read], description, read)

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

    def for_the_check(self, prompts: list[Tensor]) -> list[Tensor]:
        """Of `prompts`, those for the check on the engine. It runs without the encoder: what shows images is asked without."""
        given = [chat.question for chat in self.pictured] or prompts
        return given[self.options.texts :][:CHECKED] or given[:CHECKED]

    def scored(self, text: Continuations, corpus: Tensor | None) -> Windows:
        """What Fisher traces are taken on in this process: the corpus, or what the target wrote.

        Args:
            corpus: What `corpus` gave; None where it was not asked for, or chats show images.
        """
        if corpus is not None:
            return corpus
        most = self.options.sequences
        if self.pictured and self.options.score_text == "corpus":
            asked = self.pictured[: len(text.ids)]
            shown = text.shown or [None] * len(asked)  # it may be that none of these shows anything
            return [Window(c.ids, s) for c, s in zip(asked, shown, strict=True)][:most]
        return own_windows(text, most)

    def frequencies(self, own: Tensor, vocab_size: int) -> list[Tensor]:
        """How often tokens occur, int64 [V] each: in what the target wrote (`own`, its tokens) and in the source."""
        o = self.options
        counts = [torch.bincount(own.cpu(), minlength=vocab_size)[:vocab_size]]
        if self.prompts is not None and _is_chats(o, self.tokenizer):
            said = [chat.ids[~chat.image] for chat in self.pictured] or self.prompts
            counts.append(torch.bincount(torch.cat(said), minlength=vocab_size)[:vocab_size])
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


def own_windows(text: Continuations, most: int) -> Windows:
    """The ends of up to `most` sequences that the target wrote, of one length without padding, int64 [N, T].

    Where images are shown, an end could begin in the middle of one: there it is whole sequences, each of its own length.
    """
    ids = text.ids[:most]
    if text.shown:
        begins = text.begins[:most].tolist()
        return [Window(row[b:], s) for row, b, s in zip(ids, begins, text.shown[:most], strict=True)]
    return ids[:, int(text.begins[:most].max()) :]


def _check_enough(options: PlanOptions, chats: int) -> None:
    if chats < options.texts:
        raise SdfpError(
            f"calibration {options.calibration}",
            f"has {chats} chats of usable length, {options.texts} are needed",
            "Give more, or leave --calibration out: a model with a chat template then asks itself.",
        )


def _is_chats(options: PlanOptions, tokenizer: Any) -> bool:
    return options.calibration is not None and is_chat_source(options.calibration)


def _windows(options: PlanOptions, tokenizer: Any, sequences: int, length: int, seed: int) -> Any:
    return load_calibration(
        options.calibration, tokenizer, sequences=sequences, length=length, seed=seed, field=options.field
    )
