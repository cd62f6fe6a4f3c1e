"""Chats to try drafts on where there is no data: the target writes the questions itself.

What a chat template puts before a user's text is where such a text begins, so a model that was trained on
chats goes on with one (as in Magpie, arXiv 2406.08464). It is the first token that decides the kind of a
question, and small models ask a few kinds again and again; so every other question is given its first word.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.rollout import Writing
from sdfp_vllm.planner.stack import DecoderStack

_TOP_P = 0.95
# Likeliest tokens that are drawn from: sorting a whole vocabulary for each row would take longer.
_CANDIDATES = 1024
_ROUNDS = 4  # of sampling, before built-in questions fill the gaps
_BLANKS = " \t\r\n\ufeff\ufffd\u200b"  # U+FFFD: a character that was cut in the middle
_SENTENCE_END = re.compile(r"[?!。？！\n]|\.(?=\s|$)")
_SENTINEL = "sdfpUserText"  # plain letters: templates strip and escape
# First words, neighbours of different kinds, so that a few questions are of many.
_STEMS = (
    "What", "Translate", "Write", "Solve", "Summarize", "How", "According to the following text,",
    "Explain", "Who", "If", "Give me", "Rewrite", "Why", "Calculate", "Can you",
    "Answer the question using this passage:",
)  # fmt: skip
# Conversation, translation, summary, question answering, mathematics, retrieval; twice.
_BUILT_IN = (
    "I have a free weekend and would like to spend it outdoors. What would you suggest?",
    "Translate into French: The train leaves at nine, so we should be at the station by half past eight.",
    "Summarize in one sentence: Bees visit flowers to collect nectar and pollen. While they do so, pollen"
    " from one flower is carried to another, which lets the plants form seeds. Farmers of fruit trees "
    "therefore often keep hives close to their orchards, or rent them for the weeks in which the trees "
    "are in bloom.",
    "Why is the sky blue during the day and red in the evening?",
    "A shop sells pencils in packs of 12. A class of 28 children needs 3 pencils each. How many packs "
    "must it buy?",
    "Answer using this passage. Passage: The old bridge was built in 1874 of granite from a quarry "
    "nearby. It was closed to cars in 1982 and reopened in 1990 for people on foot and bicycles. "
    "Question: When was the bridge closed to cars, and who may use it now?",
    "Write a short, friendly email to a colleague asking to move tomorrow's meeting to the afternoon.",
    "Translate into Spanish: My sister has lived in a small village by the sea since she finished school.",
    "Give the main points of this text as a list: Regular sleep helps memory and mood. Adults need about "
    "seven to nine hours. Bright screens late in the evening make it harder to fall asleep, as does "
    "coffee in the afternoon. Going to bed at the same time every day is the simplest improvement for "
    "most people.",
    "Who wrote Romeo and Juliet, and what is the play about?",
    "Solve for x and show the steps: 3x + 7 = 2(x - 4) + 21.",
    "According to the following notes, which plant needs the least water? Notes: Ferns like damp soil and"
    " shade. Tomatoes are watered daily in summer. A cactus is watered about once a month.",
)


@dataclass(frozen=True)
class _Frame:
    """What a chat template puts around a user's text.

    Attributes:
        before: Text up to where the user's begins.
        closing: The first token behind the user's text; None where nothing comes there.
        marks: Tokens that no user's text holds: all that are special, and those of the frame.
        known: Token ids from here on are not the tokenizer's.
    """

    before: str
    closing: int | None
    marks: frozenset[int]
    known: int


def has_chat_template(tokenizer: Any) -> bool:
    """Whether chats can be rendered; of several named templates, only the default one counts."""
    template = getattr(tokenizer, "chat_template", None)
    return bool(template.get("default") if isinstance(template, Mapping) else template)


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], where: str = "chat template"
) -> Tensor:
    """The prompt that a server makes of a chat, up to where the model's answer begins: int64 [P].

    Args:
        messages: Role and content of each, the last not the assistant's.
        where: What an error names.

    Raises:
        SdfpError: If the template refuses the chat, or makes nothing of it.
    """
    # Only the template adds special tokens, as in a server: a BOS of the tokenizer's own would be a second.
    ids = _encode(tokenizer, rendered(tokenizer, messages, where))
    if not ids:
        raise SdfpError(where, "renders to nothing", "Mend the chat template in the model's folder.")
    return torch.tensor(ids, dtype=torch.int64)


def chat_prompts(
    stack: DecoderStack,
    tokenizer: Any,
    count: int,
    *,
    question_tokens: int = 48,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Prompts of chats with one question each that the model asked itself; equal arguments give equal ones.

    Questions are sampled (temperature 1, top-p 0.95) from where the template lets the user's text begin,
    every second one from a given first word. Empty ones and repeats are sampled again, a few times; what is
    missing then is filled with built-in questions, and with repeats where those do not suffice.

    Args:
        tokenizer: One that `has_chat_template`.
        question_tokens: Length at which a question that does not end is cut, to its whole sentences if it
            has any.
        advance: Called with 1 after each token of the first sampling, `question_tokens` in all.

    Returns:
        `count` prompts, each int64 [P] on the CPU, lengths differ.

    Raises:
        SdfpError: If the template refuses a user's text or hides it, or has tokens that the model lacks.
    """
    frame = _frame(tokenizer)
    slots = _first_words(count, bare=bool(_encode(tokenizer, frame.before)))
    questions: dict[int, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for attempt in range(_ROUNDS):
        missing = [i for i in range(count) if i not in questions]
        if not missing:
            break
        openings = [frame.before + slots[i] if slots[i] else frame.before for i in missing]
        ticks = advance if attempt == 0 else None
        texts = _sampled(stack, tokenizer, frame, openings, question_tokens, generator, ticks)
        for i, text in zip(missing, texts, strict=True):
            question = (slots[i] + text).strip(_BLANKS)
            new = question not in {slots[i], *questions.values()}
            if new and _sensible(question, frame.marks, tokenizer):
                questions[i] = question
    filling = itertools.cycle([*_BUILT_IN, *questions.values()])
    return [render_chat(tokenizer, _of_user(questions.get(i) or next(filling))) for i in range(count)]


def _first_words(count: int, bare: bool) -> list[str]:
    """What each question begins with: every second one, or all where not `bare`, with a stem."""
    stems = itertools.cycle(_STEMS)
    return ["" if bare and i % 2 == 0 else next(stems) for i in range(count)]


def _frame(tokenizer: Any) -> _Frame:
    before, found, rest = rendered(tokenizer, _of_user(_SENTINEL), "chat template").partition(_SENTINEL)
    if not found:
        raise SdfpError(
            "chat template", "does not show the user's text", "Mend the chat template in the model's folder."
        )
    behind = _encode(tokenizer, rest.partition(_SENTINEL)[0])
    # Blanks end no text, unless nothing else does.
    closing = next((i for i in behind if tokenizer.decode([i]).strip()), behind[0] if behind else None)
    added = tokenizer.added_tokens_decoder
    framing = {i for i in [*_encode(tokenizer, before), *behind] if i in added and added[i].content.strip()}
    # `all_special_ids` are only those that have a name, such as EOS.
    special = {i for i, token in added.items() if token.special}
    marks = frozenset(special | framing | set(tokenizer.all_special_ids))
    # Where words bring the blank before them, one at the end of the opening would be an odd token.
    return _Frame(before.rstrip(" "), closing, marks, max(tokenizer.get_vocab().values()) + 1)


def _sampled(
    stack: DecoderStack,
    tokenizer: Any,
    frame: _Frame,
    openings: Sequence[str],
    tokens: int,
    generator: torch.Generator,
    advance: Callable[[int], None] | None,
) -> list[str]:
    """What the model writes after each opening, until it ends the user's text."""
    prompts = [_encode(tokenizer, opening) for opening in openings]
    writing = Writing(stack, prompts)
    first = writing.ids.shape[1]
    closing = set() if frame.closing is None else {frame.closing}
    stops = torch.cat([writing.stops, writing.stops.new_tensor(sorted(frame.marks | closing))])
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=stops.device)
    for i in range(tokens):
        writing.add(_draw(writing.logits()[:, : frame.known], generator))
        ended |= torch.isin(writing.ids[:, -1], stops)
        if advance:
            advance(1)
        if bool(ended.all()):
            if advance:
                advance(tokens - i - 1)
            break
    stopped = torch.isin(writing.ids[:, first:], stops).cpu()
    texts = []
    for row, prompt, ends in zip(writing.ids[:, first:].tolist(), prompts, stopped, strict=True):
        length = int(ends.int().argmax()) if ends.any() else len(row)
        # Decoded with what comes before: alone, the blank before its first word would be lost.
        text = _decode(tokenizer, prompt + row[:length])[len(_decode(tokenizer, prompt)) :]
        texts.append(text if ends.any() else _whole_sentences(text))
    return texts


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row [N, V] at temperature 1 and top-p, int64 [N] on the CPU."""
    logits = logits.float()
    top, tokens = logits.topk(min(_CANDIDATES, logits.shape[1]))
    chances = (top - logits.logsumexp(-1, keepdim=True)).exp().cpu()
    if not bool(chances.isfinite().all()):
        raise SdfpError("model", "gives logits that are not finite", "Try --dtype float32 or bfloat16.")
    chances[chances.cumsum(-1) - chances >= _TOP_P] = 0.0
    return tokens.cpu().gather(1, torch.multinomial(chances, 1, generator=generator))[:, 0]


def _whole_sentences(text: str) -> str:
    """The text without its last, unfinished sentence, if another comes before it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if text[: match.end()].strip(_BLANKS)]
    return text[: ends[-1]] if ends else text


def _sensible(question: str, marks: frozenset[int], tokenizer: Any) -> bool:
    """Whether there are words in it, and nothing that the tokenizer would take for a mark."""
    return any(c.isalnum() for c in question) and marks.isdisjoint(_encode(tokenizer, question))


def _of_user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str) -> str:
    """The text that a template makes of a chat. A content is a text, or a list of parts as the template takes them.

    Raises:
        SdfpError: If the template refuses the chat.
    """
    try:
        given: list[Any] = _in_parts(messages) if _wants_parts(tokenizer) else list(messages)
        return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # a template is a program, and raises what it likes
        reason = " ".join(str(e).split()) or "no reason given"
        raise SdfpError(
            where,
            f"the model's chat template refuses it ({type(e).__name__}: {reason})",
            "Give chats that the template takes, or mend it.",
        ) from e


def _in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages as multimodal templates may want them: a content is a list of parts, a text of one."""
    return [
        {
            **m,
            "content": [{"type": "text", "text": m["content"]}]
            if isinstance(m["content"], str)
            else m["content"],
        }
        for m in messages
    ]


def _wants_parts(tokenizer: Any) -> bool:
    """Whether a template shows a text in parts and no plain one, as vLLM finds out for its server by reading it."""
    plain: list[Any] = _of_user(_SENTINEL)

    def shows(messages: list[Any]) -> bool:
        try:
            return _SENTINEL in tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template is a program, and raises what it likes
            return False

    return not shows(plain) and shows(_in_parts(plain))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
