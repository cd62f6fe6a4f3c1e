"""The texts of a job: too few chats are refused by name before a model is loaded, and windows have no padding."""

from __future__ import annotations

import json

import pytest
import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.rollout import Continuations
from sdfp_vllm.planner.texts import CHECKED, Texts, own_windows


class Words:
    """A tokenizer of a chat model: one id a word."""

    chat_template = "there is one"
    bos_token_id, eos_token_id, all_special_ids = None, 0, [0]

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True, **options):
        text = " ".join(m["content"] for m in messages) + " answer:"
        return self(text)["input_ids"] if tokenize else text

    def __call__(self, text, **options):
        return {"input_ids": [len(word) for word in text.split()]}

    def get_vocab(self):
        return {"a": 1}


def chats(path, count):
    path.write_text("".join(json.dumps({"prompt": f"question {'x' * i}"}) + "\n" for i in range(count)))
    return str(path)


def test_chats_are_read_for_trying_and_for_the_check(tmp_path):
    options = PlanOptions(calibration=chats(tmp_path / "c.jsonl", 40), text_sequences=4)
    texts = Texts.read(options, Words())
    assert texts.prompts is not None and len(texts.prompts) == options.texts + CHECKED == 12
    assert "12 chats" in texts.description


def test_too_few_chats_are_refused_by_name(tmp_path):
    source = chats(tmp_path / "c.jsonl", 5)
    with pytest.raises(
        SdfpError, match=r"calibration .*c\.jsonl: has 5 chats of usable length, 8 are needed"
    ):
        Texts.read(PlanOptions(calibration=source, text_sequences=4), Words())


def test_a_chat_model_without_data_asks_itself():
    texts = Texts.read(PlanOptions(), Words())
    assert (texts.prompts is None and "makes up" in texts.description) or "asks itself" in texts.description


def test_windows_of_own_text_have_one_length_and_no_padding():
    ids = torch.arange(24).view(3, 8)
    text = Continuations(ids, 4, torch.tensor([8, 8, 8]), begins=torch.tensor([0, 3, 1]))
    assert own_windows(text, 2).tolist() == [[3, 4, 5, 6, 7], [11, 12, 13, 14, 15]]
