"""Batch input and output without engines: faulty rows by line number, partial files after crashes, order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import sdfp_vllm.demo
from sdfp_vllm.batch.answers import Answers
from sdfp_vllm.batch.rows import read_requests, requests_key
from sdfp_vllm.cli import app
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.tokenizer import load_tokenizer

MODEL = Path(sdfp_vllm.demo.__file__).parent / "model"
DEFAULTS = {"max_tokens": 8, "temperature": 0.0, "seed": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def read(tmp_path: Path, tokenizer, *lines: str, longest: int = 64):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return read_requests(path, tokenizer, longest=longest, defaults=DEFAULTS)


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
    assert requests_key([a, b, c]) != requests_key([a, b]) != requests_key([a, b], "other model")


def test_a_chat_goes_through_the_models_template(tmp_path):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    (chat,) = read(tmp_path, tokenizer, '{"messages": [{"role": "user", "content": "import os"}]}')
    assert chat.prompt_token_ids == tokenizer.encode("[user] import os\n[assistant]")


GOOD = '{"prompt": "x"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ("{}", "a prompt or messages"),
        ('{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "one of the two"),
        ('{"prompt": ""}', "prompt: String should have at least 1"),
        ('{"prompt": "x", "max_token": 3}', "max_token: .*The fields are id, prompt"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens: Input should be greater"),
        ('{"prompt": "x", "max_tokens": 64}', "exceed 64"),
        ('{"id": 1, "prompt": "x"}', "id 1 is also line 1's"),
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


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(range(7)),
    crashes=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 60)), max_size=3),
)
def test_crashes_at_any_byte_leave_no_duplicate_and_no_gap(tmp_path_factory, order, crashes):
    """After some answers the process dies while it writes, so that the last bytes are missing."""
    output = tmp_path_factory.mktemp("out") / "out.jsonl"
    for count, torn in [*crashes, (7, 0)]:
        answers = Answers(output, "key", resume=True)
        assert answers.finished <= set(range(7))
        todo = [i for i in order if i not in answers.finished]
        answers.add({"index": i, "id": f"row {i}", "text": "ä" * i} for i in todo[:count])
        answers.add([{"index": i, "id": "a duplicate"} for i in todo[:1]])
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
    Answers(output, "key", resume=False).add([{"index": 0, "id": 1}])
    with pytest.raises(SdfpError, match="Add --resume"):
        Answers(output, "key", resume=False)
    with pytest.raises(SdfpError, match="another input, model, plan or settings"):
        Answers(output, "other", resume=True)
    output.write_text("precious")
    with pytest.raises(SdfpError, match="exists already"):
        Answers(output, "key", resume=True)


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
