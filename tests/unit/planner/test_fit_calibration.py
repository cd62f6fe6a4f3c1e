"""Calibration windows from every source, and every refusal."""

import importlib.util
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.calibration import (
    LONGEST_PROMPT,
    count_tokens,
    is_chat_source,
    load_calibration,
    read_chats,
    standard_library_files,
)

EOS, BOS = 256, 257
has_datasets = importlib.util.find_spec("datasets") is not None


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, so that windows decode back to the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<eos>": EOS, "<bos>": BOS}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    if bos:
        tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>", bos_token="<bos>")


TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def load(source, sequences=3, length=16, seed=0, tokenizer=TOKENIZER, **kwargs):
    return load_calibration(source, tokenizer, sequences=sequences, length=length, seed=seed, **kwargs)


@pytest.mark.parametrize("source", [None, "stdlib"])
def test_built_in_sample(source):
    calibration = load(source, sequences=8, length=128)
    assert calibration.ids.shape == (8, 128) and calibration.ids.dtype == torch.int64
    assert calibration.tokens == 1024
    assert "standard library" in calibration.description and "seed 0" in calibration.description


def test_built_in_sample_leaves_out_test_suites_and_foreign_packages():
    files = standard_library_files()
    names = {f.name for f in files}
    assert len(files) > 300 and {"argparse.py", "ast.py"} <= names
    assert not any({"test", "tests", "site-packages", "dist-packages"} & set(f.parts) for f in files)


def test_same_seed_same_ids_and_another_seed_other_ids():
    assert torch.equal(load(None).ids, load(None).ids)
    assert not torch.equal(load(None).ids, load(None, seed=1).ids)


def test_more_sequences_begin_with_the_same_ones():
    assert torch.equal(load(None, sequences=6).ids[:3], load(None, sequences=3).ids)


def test_text_file_windows_do_not_overlap(tmp_path):
    file = tmp_path / "numbers.txt"
    file.write_text("".join(f"line {i:05d}\n" for i in range(400)))
    calibration = load(str(file), sequences=40, length=64)
    text = TOKENIZER.decode(calibration.ids.flatten())
    lines = [part for part in text.replace("<eos>", "\n").split("\n") if len(part) == 10]
    assert len(lines) > 200 and len(lines) == len(set(lines))
    assert str(file) in calibration.description
    assert lines != sorted(lines), "pieces are shuffled"


def test_long_lines_are_cut(tmp_path):
    file = tmp_path / "one_line.txt"
    file.write_text("x" * 10_000)
    assert load(str(file), sequences=100, length=64).ids.shape == (100, 64)


def test_jsonl_field(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": "no", "body": f"doc {i}"}) for i in range(10)) + "\n\n")
    calibration = load(str(file), sequences=2, length=21, field="body")
    documents = [[*encode(f"doc {i}"), EOS] for i in range(10)]
    rows = calibration.ids.flatten().tolist()
    got = [rows[i : i + 6] for i in range(0, 42, 6)]
    assert all(d in documents for d in got) and len({tuple(d) for d in got}) == 7, (
        "short documents, EOS after each"
    )
    assert got != documents[:7], "documents are shuffled"


def test_windows_start_with_bos_where_the_tokenizer_says_so(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcdefgh" * 20)
    ids = load(str(file), tokenizer=byte_tokenizer(bos=True)).ids
    assert ids[:, 0].tolist() == [BOS] * 3 and not (ids[:, 1:] == BOS).any()
    assert not (load(str(file)).ids == BOS).any()


def test_missing_file():
    with pytest.raises(SdfpError, match="no such file"):
        load("./nowhere.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_text("\n\n")
    with pytest.raises(SdfpError, match="holds no text"):
        load(str(tmp_path / name))


def test_binary_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SdfpError, match="UTF-8"):
        load(str(tmp_path / "a.txt"))


def test_too_little_text_says_how_much_there_is(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 39)
    with pytest.raises(SdfpError, match=r"has 40 tokens, 3 sequences of 16 need 48\. .* at most 2 sequences"):
        load(str(tmp_path / "a.txt"))
    assert load(str(tmp_path / "a.txt"), sequences=2).ids.shape == (2, 16)


def test_lines_end_at_line_feeds_alone(tmp_path):
    """JSON allows these inside strings; a byte order mark is no text."""
    body = "one\u2028two\u2029three\u0085four\x0bfive"
    lines = "\r\n".join(json.dumps({"text": body}, ensure_ascii=False) for _ in range(3))
    for name in ("a.jsonl", "a.ndjson", "A.NDJSON"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n")
        ids = load(str(tmp_path / name), sequences=1, length=len(encode(body)) * 3 + 3).ids[0]
        assert TOKENIZER.decode(ids) == (body + "<eos>") * 3
        counts = count_tokens(
            str(tmp_path / name), TOKENIZER, vocab_size=258, after=0, length=16, seed=0, field="text"
        )
        assert counts.sum() == len(encode(body)) * 3
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabcabcabc")
    assert TOKENIZER.decode(load(str(tmp_path / "a.txt"), sequences=1, length=9).ids[0]) == "abcabcabc"


def test_missing_ndjson():
    with pytest.raises(SdfpError, match="no such file"):
        load("nowhere.ndjson")


def test_lines_that_are_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(SdfpError, match="line 2: is not UTF-8"):
        load(str(tmp_path / "a.jsonl"))


def test_missing_field_names_line_and_the_fields_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"prompt": "b", "n": 1}\n')
    with pytest.raises(SdfpError, match=r"line 2: has no text field 'text'.*found: prompt"):
        load(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("line", ["[1]", '{"text": 3}', '"text"', r'{"text": "half a \ud83d"}'])
def test_row_without_text(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(SdfpError, match="found: none"):
        load(str(tmp_path / "a.jsonl"))


def test_damaged_jsonl_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(SdfpError, match="line 2: is not JSON"):
        load(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(("sequences", "length"), [(0, 8), (1, 1)])
def test_nonsense_sizes(sequences, length):
    with pytest.raises(SdfpError, match="Ask for at least"):
        load(None, sequences=sequences, length=length)


@pytest.mark.skipif(has_datasets, reason="datasets is installed")
def test_dataset_without_the_package(tmp_path):
    for source in ("someone/some-dataset", str(tmp_path)):
        with pytest.raises(SdfpError, match="pip install datasets"):
            load(source)


@pytest.mark.skipif(not has_datasets, reason="datasets is not installed")
def test_local_datasets(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(50)], "n": list(range(50))})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(tmp_path / "splits")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    first = load(str(tmp_path / "one")).ids
    assert torch.equal(first, load(str(tmp_path / "splits")).ids)
    assert torch.equal(first, load(str(tmp_path / "raw")).ids)
    with pytest.raises(SdfpError, match="no text field 'n'"):
        load(str(tmp_path / "one"), field="n")
    (tmp_path / "none").mkdir()
    with pytest.raises(SdfpError, match="cannot be read as a dataset"):
        load(str(tmp_path / "none"))


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHATTY = byte_tokenizer(bos=True)
CHATTY.chat_template = TEMPLATE


def write_rows(path, *rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def said(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def chats_of(source: str, count: int = 10, seed: int = 0, tokenizer=CHATTY) -> list[str]:
    prompts = read_chats(source, tokenizer, count, seed)
    assert all(p.dtype == torch.int64 and p.ndim == 1 for p in prompts)
    return [tokenizer.decode(p) for p in prompts]


def test_messages_are_rendered_without_their_last_answer(tmp_path):
    messages = [
        said("system", "Be kind."),
        said("user", "Hi"),
        said("assistant", "Hello"),
        said("user", "Bye"),
    ]
    rendered = "[system]Be kind.[user]Hi[assistant]Hello[user]Bye[assistant]"
    for answers in ([], [said("assistant", "See you")], [said("assistant", "See"), said("assistant", "you")]):
        source = write_rows(tmp_path / "a.jsonl", {"messages": messages + answers, "text": "other"})
        assert is_chat_source(source)
        assert chats_of(source) == [rendered], "and no BOS that the template does not write"


def test_turns_and_prompts_are_a_users_text(tmp_path):
    spec_bench = {"question_id": 81, "category": "writing", "turns": ["Write a blog.", "Now shorter."]}
    source = write_rows(
        tmp_path / "a.ndjson", spec_bench, "", {"prompt": "Sum it\u2028up", "completion": "x"}
    )
    assert is_chat_source(source)
    assert sorted(chats_of(source)) == ["[user]Sum it\u2028up[assistant]", "[user]Write a blog.[assistant]"]
    plain = byte_tokenizer(bos=True)
    assert sorted(chats_of(source, tokenizer=plain)) == ["<bos>Sum it\u2028up", "<bos>Write a blog."]


def test_chats_need_a_template_where_they_are_messages(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", {"messages": [said("user", "Hi")]})
    with pytest.raises(SdfpError, match="line 1, field messages: needs a chat template"):
        chats_of(source, tokenizer=TOKENIZER)


def test_chats_are_drawn_by_seed_without_repeats(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", *({"prompt": f"Question {i}"} for i in range(20)))
    some = chats_of(source, 8)
    assert len(some) == 8 and some == chats_of(source, 8) and some == chats_of(source, 12)[:8]
    assert some != sorted(some) and some != chats_of(source, 8, seed=1)
    assert len(set(chats_of(source, 50))) == 20, "no more than there are"


def test_long_prompts_are_left_out(tmp_path):
    fits = LONGEST_PROMPT - len("[user][assistant]")
    source = write_rows(tmp_path / "a.jsonl", {"prompt": "x" * (fits + 1)}, {"prompt": "y" * fits})
    assert [len(p) for p in chats_of(source)] == [LONGEST_PROMPT]
    source = write_rows(tmp_path / "a.jsonl", {"prompt": "x" * (fits + 1)})
    with pytest.raises(SdfpError, match="has no chat of at most 512 tokens"):
        chats_of(source)


def test_what_is_a_chat_source(tmp_path):
    assert not is_chat_source(None) and not is_chat_source("stdlib") and not is_chat_source("some/dataset")
    assert not is_chat_source(str(tmp_path)) and not is_chat_source(str(tmp_path / "none.jsonl"))
    assert not is_chat_source(write_rows(tmp_path / "a.jsonl", {"text": "a"}, {"prompt": "b"}))
    assert not is_chat_source(write_rows(tmp_path / "a.txt", {"prompt": "b"}))
    for empty in ("", "\n\n", "[1]", '"prompt"'):
        assert not is_chat_source(write_rows(tmp_path / "a.jsonl", empty))
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"prompt": "b"}\n\xff')
    assert is_chat_source(str(tmp_path / "a.jsonl")), "the rest is not looked at"
    with pytest.raises(SdfpError, match="line 1: is not JSON"):
        is_chat_source(write_rows(tmp_path / "a.jsonl", "{"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages: is empty"),
        ({"messages": "Hi"}, "messages: is not a list"),
        ({"messages": None}, "messages: is not a list"),
        ({"messages": ["Hi"]}, r"messages\[0\]: is not an object"),
        ({"messages": [said("user", "")]}, r"messages\[0\]\.content: is empty"),
        ({"messages": [said("user", "a"), said("user", " \n")]}, r"messages\[1\]\.content: is empty"),
        ({"messages": [said("user", None)]}, r"messages\[0\]\.content: is not text"),
        (
            {"messages": [said("user", [{"type": "image_url"}])]},
            r"messages\[0\]\.content\[0\]: is a part of type 'image_url'",
        ),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: is not text"),
        ({"messages": [said("human", "Hi")]}, r"messages\[0\]\.role: 'human' is not known"),
        ({"messages": [said(["user"], "Hi")]}, r"messages\[0\]\.role: \['user'\] is not known"),
        ({"messages": [{"content": "Hi"}]}, r"messages\[0\]\.role: None is not known"),
        ({"messages": [said("assistant", "Hi")]}, "messages: has nothing for the model to answer"),
        ({"messages": [said("system", "Hi")]}, "messages: has nothing for the model to answer"),
        ({"messages": [said("tool", "Hi")]}, "template refuses it .TemplateError: no tools"),
        ({"turns": []}, "turns: is empty"),
        ({"turns": "Hi"}, "turns: is not a list"),
        ({"turns": [3]}, r"turns\[0\]: is not text"),
        ({"turns": [""]}, r"turns\[0\]: is empty"),
        ({"prompt": ["Hi"]}, "prompt: is not text"),
        ({"prompt": ""}, "prompt: is empty"),
        (r'{"prompt": "half a \ud83d"}', "prompt: is not text"),
        ({"text": "Hi"}, "is no chat: it has none of the fields messages, turns, prompt"),
        ([1], "is no chat"),
        ('{"prompt": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_faulty_chats_are_named(tmp_path, row, message):
    source = write_rows(tmp_path / "a.jsonl", {"prompt": "Hi"}, "", row)
    with pytest.raises(SdfpError, match=rf"a\.jsonl, line 3(, field |: (the .*)?){message}"):
        chats_of(source)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_chats(tmp_path, text):
    with pytest.raises(SdfpError, match="holds no chats"):
        chats_of(write_rows(tmp_path / "a.jsonl", text))
    with pytest.raises(SdfpError, match="cannot be read"):
        chats_of(str(tmp_path / "none.jsonl"))
