"""Questions that a model asks itself, and chats as prompts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner import chats
from sdfp_vllm.planner.chats import chat_prompts, has_chat_template, render_chat
from sdfp_vllm.planner.rollout import greedy_continuations
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.tiny_models import tiny_model

EOS, BOS, END, USER, SPARE = range(256, 261)
VOCAB = 300  # of the model: more than the tokenizer has
SYSTEM = "{% if messages[0]['role'] != 'system' %}Be nice.<end>{% endif %}"
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user>\n{% else %}{{ m['role'] }}: {% endif %}"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)
TEMPLATE = "{{ bos_token }}" + SYSTEM + TURNS


def chat_tokenizer(template: Any = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and marks; a text of its own begins with BOS."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    marks = ["<eos>", "<bos>", "<end>", "<user>", "<spare>"]
    tok.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<eos>", bos_token="<bos>", chat_template=template
    )


TOKENIZER = chat_tokenizer()
FRAMED = ("<bos>Be nice.<end><user>\n", "<end>\nanswer:")


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def asked(prompts: list[torch.Tensor], framed: tuple[str, str] = FRAMED) -> list[str]:
    """The questions in prompts, whose frame is checked."""
    texts = [TOKENIZER.decode(p) for p in prompts]
    assert all(t.startswith(framed[0]) and t.endswith(framed[1]) for t in texts)
    return [t[len(framed[0]) : -len(framed[1])] for t in texts]


def saying(answer: Callable[[str], str | list[int]], vocab: int = VOCAB) -> Any:
    """A model that says `answer` of what is in its context, a text or tokens, and then only END."""

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        logits = torch.full((len(input_ids), 1, vocab), -30.0)
        for n, row in enumerate(input_ids):
            real = row if attention_mask is None else row[attention_mask[n].bool()]
            context = TOKENIZER.decode(real)
            answers = answer(context)
            ids = encode(answers) if isinstance(answers, str) else answers
            begin = contexts.setdefault(n, len(real))
            done = len(real) - begin
            logits[n, 0, ids[done] if 0 <= done < len(ids) else END] = 30.0
        return SimpleNamespace(logits=logits)

    contexts: dict[int, int] = {}
    model: Any = forward
    embed = SimpleNamespace(weight=torch.zeros(vocab, 1))
    return SimpleNamespace(model=model, embed=embed, device=torch.device("cpu"))


@pytest.fixture(name="stack", scope="module")
def _stack() -> DecoderStack:
    return DecoderStack(tiny_model(vocab_size=VOCAB, eos_token_id=None, max_position_embeddings=512))


def test_who_has_a_chat_template():
    assert has_chat_template(TOKENIZER)
    for template in (None, "", {}, {"tool_use": TEMPLATE}):
        assert not has_chat_template(chat_tokenizer(template))
    assert has_chat_template(chat_tokenizer({"default": TEMPLATE, "tool_use": ""}))
    assert not has_chat_template(object())


def test_a_chat_is_rendered_as_a_server_does():
    ids = render_chat(TOKENIZER, [{"role": "user", "content": "Hello"}])
    assert ids.dtype == torch.int64
    assert TOKENIZER.decode(ids) == "<bos>Be nice.<end><user>\nHello<end>\nanswer:"
    assert (ids == BOS).sum() == 1
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    expected = "<bos>system: Be short.<end>\n<user>\nHi<end>\nassistant: Yes?<end>\n<user>\nBye<end>\nanswer:"
    assert TOKENIZER.decode(render_chat(TOKENIZER, messages)) == expected
    without = chat_tokenizer(TURNS)
    assert BOS not in render_chat(without, messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no\nchats, please') }}", r"refuses it \(TemplateError: no chats, please\)"),
        ("{{ messages[0].content.nothing.at_all }}", "refuses it .UndefinedError"),
        ("{% if %}", "refuses it .TemplateSyntaxError"),
        ("", "renders to nothing|refuses it"),
        ("{# #}", "renders to nothing"),
    ],
)
def test_templates_that_refuse(template, message):
    with pytest.raises(SdfpError, match=message) as e:
        render_chat(chat_tokenizer(template), [{"role": "user", "content": "Hello"}], "here")
    assert str(e.value).startswith("here: ") and "\n" not in str(e.value)


def test_templates_that_refuse_or_hide_a_users_text(stack):
    with pytest.raises(SdfpError, match=r"refuses it .TemplateError: none"):
        chat_prompts(stack, chat_tokenizer("{{ raise_exception('none') }}"), 2, seed=0)
    with pytest.raises(SdfpError, match="does not show the user's text"):
        chat_prompts(stack, chat_tokenizer("<user>{{ messages[0].content | upper }}"), 2, seed=0)


def test_prompts_of_a_real_model(stack):
    ticks: list[int] = []
    prompts = chat_prompts(stack, TOKENIZER, 12, question_tokens=20, seed=3, advance=ticks.append)
    assert len(prompts) == 12 and sum(ticks) == 20
    for ids in prompts:
        assert ids.dtype == torch.int64 and ids.ndim == 1 and ids.max() <= SPARE
        assert [(ids == mark).sum().item() for mark in (EOS, BOS, END, USER, SPARE)] == [0, 1, 2, 1, 0]
    questions = asked(prompts)
    assert len(set(questions)) == 12 and all(q == q.strip() and q for q in questions)
    assert all(q.startswith(stem) for q, stem in zip(questions[1::2], chats._STEMS, strict=False))
    assert len({q[0] for q in questions[::2]}) > 2, "the others begin as the model likes"
    again = chat_prompts(stack, TOKENIZER, 12, question_tokens=20, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(prompts, again, strict=True))
    other = asked(chat_prompts(stack, TOKENIZER, 12, question_tokens=20, seed=4))
    assert not set(other) & set(questions)
    assert len(greedy_continuations(stack, prompts, 2).ids) == 12


def test_questions_end_where_the_template_goes_on():
    stack = saying(lambda context: " is a cat?\nTell me.")
    questions = asked(chat_prompts(stack, TOKENIZER, 2, seed=0))
    assert questions == ["is a cat?\nTell me.", "What is a cat?\nTell me."]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" is a cat? And what is a d", "is a cat?"),
        (" is 3.14 and 2.71 or three apples", "is 3.14 and 2.71 or three apples"[:24]),
        (" will go. Yes. Or may be not now", "will go. Yes."),
        ("\n\n cats and dogs and more of those", "cats and dogs and more"),
        (
            " cats and dogs\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9",
            "cats and dogs\u00e9\u00e9\u00e9\u00e9\u00e9",
        ),
    ],
)
def test_questions_without_an_end_are_cut_at_the_last_sentence(said, expected):
    ticks: list[int] = []
    prompts = chat_prompts(
        saying(lambda context: said), TOKENIZER, 1, question_tokens=25, seed=0, advance=ticks.append
    )
    assert asked(prompts) == [expected.strip()] and ticks == [1] * 25


@pytest.mark.parametrize("said", ["", "  \n ", " ...!", [USER], [SPARE, SPARE], [EOS], "\ufeff"])
def test_what_is_no_question_is_asked_again_and_then_replaced(said):
    rounds: list[int] = []

    def answer(context: str) -> Any:
        rounds.append(1)
        return said

    questions = asked(chat_prompts(saying(answer), TOKENIZER, 20, question_tokens=8, seed=0))
    bare = questions[::2]
    assert len(rounds) > 20 * 3, "in several rounds"
    built_in = list(chats._BUILT_IN)
    if said == " ...!":  # behind a first word it is one
        assert bare == built_in[:10] and questions[1] == "What ...!"
    else:
        assert questions == [*built_in, *built_in][:20]


def test_marks_spelt_out_are_no_question():
    letters = [encode(c)[0] for c in "Hi <spare>"]
    questions = asked(chat_prompts(saying(lambda context: letters), TOKENIZER, 2, seed=0))
    assert questions == list(chats._BUILT_IN[:2])


def test_repeats_are_replaced():
    questions = asked(chat_prompts(saying(lambda context: "Hello there."), TOKENIZER, 5, seed=0))
    assert questions[0] == "Hello there." and questions[2] == chats._BUILT_IN[0]
    assert questions[1] == "WhatHello there." and questions[4] == chats._BUILT_IN[1]


def test_as_many_as_asked_where_there_are_not_as_many():
    questions = asked(chat_prompts(saying(lambda context: ""), TOKENIZER, 30, seed=0))
    assert len(questions) == 30 and set(questions) == set(chats._BUILT_IN)
    assert asked(chat_prompts(saying(lambda context: ""), TOKENIZER, 0, seed=0)) == []


def test_built_in_questions_are_of_six_kinds_twice():
    assert len(set(chats._BUILT_IN)) == 12
    assert all(q == q.strip() and "\n" not in q for q in chats._BUILT_IN)


def test_tokens_beyond_the_tokenizers_are_never_drawn():
    def answer(context: str) -> list[int]:
        return [VOCAB - 1] * 30

    # All that is left is as likely as anything else, marks included: whatever comes is of the tokenizer's.
    for prompt in chat_prompts(saying(answer), TOKENIZER, 6, question_tokens=6, seed=0):
        assert prompt.max() <= SPARE


def test_a_template_with_tokens_that_the_model_lacks():
    with pytest.raises(SdfpError, match=r"token 25[79], which is not in the model's vocabulary of 257"):
        chat_prompts(saying(lambda context: "x", vocab=257), TOKENIZER, 2, seed=0)


def test_a_template_with_nothing_before_the_users_text(stack):
    tokenizer = chat_tokenizer("{{ messages[0].content }}<end>")
    questions = asked(chat_prompts(stack, tokenizer, 4, question_tokens=12, seed=0), ("", "<end>"))
    assert all(q.startswith(stem) for q, stem in zip(questions, chats._STEMS, strict=False))


def test_a_template_with_nothing_behind_the_users_text(stack):
    tokenizer = chat_tokenizer("<user> {{ messages[0].content }}")
    prompts = chat_prompts(stack, tokenizer, 4, question_tokens=12, seed=0)
    assert all(TOKENIZER.decode(p).startswith("<user> ") for p in prompts)


@pytest.mark.parametrize(
    ("behind", "closing"), [("<end>\n", END), ("\n <end>", END), (" [/I]", "["), ("\n\n", "\n"), ("", None)]
)
def test_what_ends_a_users_text(behind, closing):
    frame = chats._frame(chat_tokenizer("[I] {{ messages[0].content }}" + behind.replace("\n", "{{ '\n' }}")))
    assert frame.before == "[I]", "a blank at the end belongs to the next word"
    assert frame.closing == (encode(closing)[0] if isinstance(closing, str) else closing)
    assert {EOS, BOS, END, USER, SPARE} == frame.marks and frame.known == SPARE + 1


def test_draws_are_from_the_likeliest_tokens():
    chances = torch.tensor([[0.5, 0.3, 0.16, 0.04], [0.96, 0.02, 0.01, 0.01]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([chats._draw(chances.log(), generator) for _ in range(400)])
    assert set(drawn[:, 0].tolist()) == {0, 1, 2} and set(drawn[:, 1].tolist()) == {0}
    assert abs((drawn[:, 0] == 0).float().mean().item() - 0.5 / 0.96) < 0.1
    with pytest.raises(SdfpError, match="not finite"):
        chats._draw(torch.full((1, 4), torch.nan), generator)
