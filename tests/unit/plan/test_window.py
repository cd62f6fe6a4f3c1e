"""A draft's window: what is asked for, where it is stored and shown, and the block table it makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdfp_vllm.engine.draft.window import gaps, longest_seen, reaches, without_gaps
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.schema import WindowTried
from sdfp_vllm.plan.window import DraftWindow, parse_window
from sdfp_vllm.planner.long_texts import LongText, long_texts
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.window_search import best_window, turns_of


@pytest.mark.parametrize(
    ("asked", "window"),
    [
        ("none", None),
        (1024, DraftWindow(sinks=4, last=1024)),
        ("1024", DraftWindow(last=1024)),
        ("1", DraftWindow(last=1)),
    ],
)
def test_what_is_asked_for(asked, window):
    assert parse_window("--window", asked) == window
    PlanOptions(window=str(asked)).check()


@pytest.mark.parametrize("asked", [0, -1, True, None, 1.5, 1 << 31, "", "0", "-1", "1.5", "²", "often", [8]])
def test_anything_else_is_refused_by_name(asked):
    with pytest.raises(SdfpError, match=r"--window.*none"):
        parse_window("--window", asked)
    with pytest.raises(SdfpError, match=r"--window.*none"):
        PlanOptions(window=asked).check()


@settings(max_examples=500, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    sinks=st.integers(0, 40),
    last=st.integers(1, 210),
    size=st.sampled_from([1, 8, 16]),
    drafts=st.integers(1, 9),
    beyond=st.sampled_from([0, 0, 60, 150]),
)
def test_what_is_seen_are_whole_blocks_from_the_first_and_the_last_tokens_on(
    lengths, sinks, last, size, drafts, beyond
):
    """Token by token: position p of a context is seen where the table says that position q of the view lies."""
    window, n = DraftWindow(sinks=sinks, last=last, beyond=beyond), torch.tensor(lengths, dtype=torch.int32)
    blocks = -(-(max(lengths) + drafts) // size)
    table = torch.randperm(1000)[: len(lengths) * blocks].view(len(lengths), blocks).int()
    gap = gaps(window, n, size)
    edited = without_gaps(window, table, gap, size)
    assert edited.shape == table.shape and edited.dtype == table.dtype and gap.dtype == n.dtype
    for row, computed in enumerate(lengths):
        for drafted in range(1, drafts + 1):
            length = computed + drafted
            first = -(-sinks // size) * size
            from_ = max(0, computed - last) // size * size
            want = [p for p in range(length) if p < first or p >= from_ or computed <= beyond]
            seen = length - int(gap[row]) * size
            got = [int(edited[row, q // size]) * size + q % size for q in range(seen)]
            assert got == [int(table[row, p // size]) * size + p % size for p in want]
            assert seen <= longest_seen(window, size) + drafted
    if not reaches(window, max(lengths)):
        assert not gap.any() and torch.equal(edited, table)


def tried(**speeds: dict[int | None, float]) -> list[WindowTried]:
    """By context ("c1024") and window."""
    return [
        WindowTried(context=int(c[1:]), last=last, tokens_per_second=speed, acceptance_rate=0.5)
        for c, of in speeds.items()
        for last, speed in of.items()
    ]


def test_auto_takes_what_is_fastest_after_the_longest_context_from_where_it_pays_on():
    slow = {None: 10.0, 512: 9.0}
    short, middle = {None: 10.0, 512: 20.0}, {None: 10.0, 512: 12.0, 1024: 30.0}
    long = {None: 10.0, 512: 14.0, 1024: 13.0}
    assert best_window(tried(c1024=slow, c4096=middle, c8192=long)) == DraftWindow(
        last=512, beyond=4096 - 112
    )
    # A shorter context where it pays, behind one where it does not, is no reason.
    assert best_window(tried(c1024=short, c2048=slow, c4096=middle)) == DraftWindow(
        last=1024, beyond=4096 - 112
    )
    assert best_window(tried(c1024=short, c8192=long)) == DraftWindow(last=512, beyond=1024 - 112)
    assert best_window(tried(c1024=short, c2048=slow)) is None
    assert best_window(tried(c4096={None: 10.0, 512: 10.2})) is None  # may be noise


def test_auto_asks_each_window_that_is_shorter_than_the_context_after_filling_the_cache():
    chat = LongText(list(range(8192)), before=(-1, -2), behind=(-3,))
    turns = turns_of([chat], [2048, 4096], drafts=3)
    for turn in turns:
        (prompt,) = turn.prompts
        assert prompt[:2] == [-1, -2] and prompt[-1] == -3 and prompt[2:-1] == list(range(len(prompt) - 3))
    asked = [(len(t.prompts[0]), t.max_tokens, t.window) for t in turns]
    assert asked[0] == (2048 - 112, 1, None) and asked[3] == (4096 - 112, 1, None)
    assert [w for _, n, w in asked if n > 1] == ["none", 512, "none", 512, 2048]
    assert {(t.drafts, t.copies) for t in turns if t.max_tokens > 1} == {(3, False)}


class Chats:
    """A tokenizer of words, with a chat template."""

    chat_template, bos_token_id, eos_token_id = "{{ messages }}", None, None

    def __call__(self, text, **_):
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, **_):
        return f"<user> {messages[0]['content']} <end>"

    def encode(self, text, **_):
        return text.split()


def positions(folder, count=300):
    (folder / "config.json").write_text(f'{{"max_position_embeddings": {count}}}')
    return folder


def test_every_second_text_is_summarised_by_a_model_that_chats(tmp_path):
    made = long_texts(positions(tmp_path), Chats(), PlanOptions(), 2, (100, 300, 900))
    plain, chat = made
    assert plain.before == plain.behind == () and len(plain.document) == len(chat.document) == 300
    assert chat.before == ("<user>",) and chat.behind[0] == "Summarise" and chat.behind[-1] == "<end>"
    assert len(chat.prompt(200, 10)) == len(plain.prompt(200, 10)) == 200 - 10 - 64
    assert long_texts(tmp_path, Chats(), PlanOptions(), 2, (900,)) == []


def test_nothing_that_nobody_asked_for_refuses_a_plan(tmp_path):
    """A short text to calibrate on, a template that refuses the chat or hides what is said."""

    class Refuses(Chats):
        def apply_chat_template(self, messages, **_):
            raise ValueError("no users here")

    class Hides(Chats):
        def apply_chat_template(self, messages, **_):
            return "<user> <end>"

    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    folder = positions(tmp_path)
    built_in = long_texts(folder, Chats(), PlanOptions(), 2, (300,))
    assert long_texts(folder, Chats(), PlanOptions(calibration=str(short)), 2, (300,)) == built_in
    for tokenizer in (Refuses(), Hides()):
        made = long_texts(folder, tokenizer, PlanOptions(), 2, (300,))
        assert [t.before for t in made] == [(), ()] and made[1].document == built_in[1].document
