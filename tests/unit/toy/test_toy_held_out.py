"""Demo prompts: repeatable, of the length asked, and from files that training held out."""

import importlib.util
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sdfp_vllm.errors import SdfpError
from tests.toy import held_out as demo_prompts
from tests.toy.held_out import held_out_files, held_out_prompts


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level tokenizer without merges: one token per byte, so that text can be found again."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_held_out_files_are_those_that_training_leaves_out():
    path = Path(__file__).parents[3] / "tests" / "toy" / "train.py"
    spec = importlib.util.spec_from_file_location("toy_train", path)
    assert spec and spec.loader
    recipe = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = recipe  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    trained = {f for i, f in enumerate(recipe.source_files()) if i % 50}
    held_out = held_out_files()
    assert len(held_out) >= 5
    assert not trained & set(held_out)
    assert trained | set(held_out) == set(recipe.source_files())


def test_prompts_are_repeatable_and_of_the_length_asked(tokenizer_dir):
    first = held_out_prompts(tokenizer_dir, count=6, tokens=40, seed=3)
    assert first == held_out_prompts(tokenizer_dir, count=6, tokens=40, seed=3)
    assert first != held_out_prompts(tokenizer_dir, count=6, tokens=40, seed=4)
    assert [len(p) for p in first] == [40] * 6
    assert len({tuple(p) for p in first}) == 6


def test_every_prompt_comes_from_a_held_out_file(tokenizer_dir):
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in held_out_files()]
    for ids in held_out_prompts(tokenizer_dir, count=12, tokens=60):
        text = tokenizer.decode(ids).strip("\ufffd")  # a cut character at an end
        assert any(text in t for t in texts)


def test_more_prompts_than_files_still_come(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(demo_prompts, "held_out_files", lambda: [Path(__file__)])
    assert len(held_out_prompts(tokenizer_dir, count=3, tokens=20)) == 3


def test_impossible_requests_are_refused(tokenizer_dir, tmp_path):
    with pytest.raises(SdfpError, match="shorter prompts"):
        held_out_prompts(tokenizer_dir, count=1, tokens=10**8)
    with pytest.raises(SdfpError, match=r"tokenizer\.json"):
        held_out_prompts(tmp_path, count=1, tokens=8)
