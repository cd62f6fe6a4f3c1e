"""Batch input and output without engines: faulty rows by line number, partial files after crashes, order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.calibration import read_chats
from sdfp_vllm.ray.batch.answers import Answers
from sdfp_vllm.ray.batch.last_words import last_words
from sdfp_vllm.ray.batch.rows import read_requests
from tests import toy

MODEL = toy.MODEL
DEFAULTS = {"max_tokens": 8, "temperature": 0.0, "seed": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def read(tmp_path: Path, tokenizer, *lines: str, longest: int = 64, defaults=DEFAULTS):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return read_requests(path, tokenizer, longest=longest, defaults=defaults)


def test_rows_keep_order_ids_and_their_own_settings(tmp_path, tokenizer):
    a, b, c = read(
        tmp_path,
        tokenizer,
        '{"id": "b", "prompt": "import os"}',
        "",
        '{"prompt": "def f", "max_tokens": 3, "seed": 1}',
        '{"id": 0, "prompt": "x", "temperature": 1.0, "stop": ["\\n"]}',
    )
    assert [(r.index, r.id) for r in (a, b, c)] == [(0, "b"), (1, 3), (2, 0)]
    assert a.prompt_token_ids == tokenizer.encode("import os") and a.sampling == DEFAULTS
    assert b.sampling == {"max_tokens": 3, "temperature": 0.0, "seed": 1}
    assert c.sampling == {"max_tokens": 8, "temperature": 1.0, "seed": 7, "stop": ["\n"]}
    assert len({r.digest for r in (a, b, c)}) == 3


def test_only_who_asks_for_a_seed_gets_one(tmp_path, tokenizer):
    """Requests with a seed are not paced, and on a CPU vLLM fails on them where prompts are computed in chunks."""
    lines = ('{"prompt": "x", "temperature": 0.8}', '{"prompt": "x", "seed": 3}')
    for defaults in ({"max_tokens": 8, "temperature": 0.8}, {"max_tokens": 8, "seed": None}):
        without, own = read(tmp_path, tokenizer, *lines, defaults=defaults)
        assert "seed" not in without.sampling and own.sampling["seed"] == 3


def test_lines_are_read_as_calibration_text_is(tmp_path):
    """What editors and tools write: a byte order mark, line ends of Windows, and JSON's line separators in strings."""
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    texts = ["a\u2028b\u2029c\u0085d", "ä", "e"]
    content = "\ufeff" + "\r\n \t\r\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in texts)
    path = tmp_path / "in.ndjson"
    path.write_bytes(content.encode())
    requests = read_requests(path, tokenizer, longest=64, defaults=DEFAULTS)
    assert [r.id for r in requests] == [1, 3, 5]
    assert [r.prompt_token_ids for r in requests] == [tokenizer.encode(t) for t in texts]
    chats = read_chats(str(path), tokenizer, count=3, seed=0)
    assert sorted(c.tolist() for c in chats) == sorted(r.prompt_token_ids for r in requests)


def test_a_chat_goes_through_the_models_template(tmp_path):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    (chat,) = read(tmp_path, tokenizer, '{"messages": [{"role": "user", "content": "import os"}]}')
    assert chat.prompt_token_ids == tokenizer.encode("[user] import os\n[assistant]")


GOOD = '{"prompt": "x"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "a prompt or messages"),
        ('{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "one of the two"),
        ('{"prompt": ""}', "prompt: String should have at least 1"),
        ('{"prompt": "x", "max_token": 3}', "max_token: .*The fields are id, prompt"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens: Input should be greater"),
        ('{"prompt": "x", "max_tokens": 64}', "exceed 64"),
        ('{"id": 1, "prompt": "x"}', "id 1 is also line 1's"),
        ('{"prompt": "x", "stop": [""]}', "stop cannot contain an empty string"),
        ('{"prompt": "x", "stop": ""}', "stop cannot contain an empty string"),
        ('{"prompt": "x", "temperature": 2.5}', r"temperature must be in \[0, 2\], got 2.5"),
        ('{"prompt": "x", "temperature": Infinity}', "temperature must be a finite number"),
        ('{"prompt": "x", "temperature": 1e999}', "temperature must be a finite number"),
        ('{"prompt": "x", "temperature": NaN}', "temperature"),
        ('{"prompt": "x", "top_p": NaN}', "top_p"),
        ('{"prompt": "x", "max_tokens": Infinity}', "max_tokens"),
        ('{"prompt": "x", "seed": 9223372036854775808}', "seed must be a whole number of 64 bits"),
        ('{"prompt": "half a \\ud83d"}', "prompt: Input should be a valid string"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "chat template"),
    ],
)
def test_a_faulty_row_is_named_by_its_line(tmp_path, tokenizer, line, reason):
    with pytest.raises(SdfpError, match=rf"in.jsonl, line 2: .*{reason}"):
        read(tmp_path, tokenizer, GOOD, line, GOOD)


def test_an_empty_or_missing_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(SdfpError, match="holds no row"):
        read(tmp_path, tokenizer, "")
    with pytest.raises(SdfpError, match="cannot be read"):
        read_requests(tmp_path / "none", tokenizer, longest=9, defaults=DEFAULTS)


@pytest.mark.parametrize(
    ("flag", "defaults"),
    [
        ("--temperature", {"temperature": 2.5}),
        ("--temperature", {"temperature": float("nan")}),
        ("--seed", {"seed": 1 << 63}),
    ],
)
def test_a_faulty_flag_is_named_itself(tmp_path, tokenizer, flag, defaults):
    with pytest.raises(SdfpError, match=f"^{flag}: "):
        read(tmp_path, tokenizer, GOOD, defaults={"max_tokens": 8, **defaults})


REQUESTS = {f"row {i}": f"digest {i}" for i in range(7)}


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(range(7)),
    crashes=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 60)), max_size=3),
)
def test_crashes_at_any_byte_leave_no_duplicate_and_no_gap(tmp_path_factory, order, crashes):
    """After some answers the process dies while it writes, so that the last bytes are missing."""
    output = tmp_path_factory.mktemp("out") / "out.jsonl"
    for count, torn in [*crashes, (7, 0)]:
        answers = Answers(output, "key", REQUESTS, resume=True)
        assert answers.finished <= REQUESTS.keys()
        todo = [i for i in order if f"row {i}" not in answers.finished]
        answers.add({"id": f"row {i}", "text": "ä" * i} for i in todo[:count])
        answers.add([{"id": f"row {i}", "text": "a duplicate"} for i in todo[:1]])
        if torn:
            size = answers.partial.stat().st_size
            header = answers.partial.read_bytes().index(b"\n") + 1
            answers._file.truncate(max(size - torn, header))
    answers.finish()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [{"id": f"row {i}", "text": "ä" * i} for i in range(7)]
    assert [f.name for f in output.parent.iterdir()] == ["out.jsonl"]


def test_nothing_is_overwritten_or_mixed(tmp_path):
    output = tmp_path / "out.jsonl"
    Answers(output, "key", {1: "digest"}, resume=False).add([{"id": 1}])
    with pytest.raises(SdfpError, match="Add --resume"):
        Answers(output, "key", {1: "digest"}, resume=False)
    with pytest.raises(SdfpError, match="another model, plan or engine settings"):
        Answers(output, "other", {1: "digest"}, resume=True)
    output.write_text("precious")
    with pytest.raises(SdfpError, match="exists already"):
        Answers(output, "key", {1: "digest"}, resume=True)


def test_rows_without_an_answer_may_change_before_a_run_goes_on(tmp_path):
    """Mended, taken out, added or moved; an answer that is an error is none to a row that was mended."""
    output = tmp_path / "out.jsonl"
    first = Answers(output, "key", {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"}, resume=False)
    first.add([{"id": "b", "text": "B"}, {"id": "c", "error": "no"}, {"id": "e", "error": "never"}])
    assert first.failed == {"c", "e"}

    for changed in ({"b": "other", "c": "3", "e": "5"}, {"c": "3", "e": "5"}, {"b": "2", "c": "3"}):
        with pytest.raises(SdfpError, match=r"has an answer to row '(b|e)', which (has changed|is gone)"):
            Answers(output, "key", changed, resume=True)

    again = Answers(
        output, "key", {"new": "6", "b": "2", "c": "mended", "a": "mended", "e": "5"}, resume=True
    )
    assert again.finished == {"b", "e"} and again.failed == {"e"}
    again.add([{"id": "c", "text": "C"}, {"id": "a", "text": "A"}, {"id": "new", "text": "N"}])
    again.finish()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r.get("text", r.get("error")) for r in rows] == ["N", "B", "C", "A", "never"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out.jsonl", tmp_path / "nowhere" / "out.jsonl"):
        with pytest.raises(SdfpError, match="cannot be written"):
            Answers(output, "key", REQUESTS, resume=False)
    with pytest.raises(SdfpError, match="exists already"):
        Answers(tmp_path, "key", REQUESTS, resume=False)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("first\n  last \n"), "RuntimeError: last"),
        (
            ValueError("1 error\n  bad dtype [x]\n    For further information visit https://x"),
            "ValueError: bad dtype [x]",
        ),
        (MemoryError(), "MemoryError"),
        (SdfpError("a plan", "is bad", "Make one."), "a plan: is bad. Make one."),
    ],
)
def test_the_last_line_of_an_error_is_what_is_told(error, words):
    assert last_words(error) == words


def test_what_is_wrong_is_said_before_ray_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "in.jsonl").write_text(GOOD)

    def refusal(*flags: str) -> str:
        result = CliRunner().invoke(
            app, ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), str(MODEL), *flags]
        )
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "no such plan" in refusal() or "has no plan" in refusal()
    assert "--engine: is not JSON" in refusal("--engine", "{")
    assert not (tmp_path / "out.jsonl.partial").exists()
