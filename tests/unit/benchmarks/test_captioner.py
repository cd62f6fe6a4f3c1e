"""The toy captioner: its pictures and answers, and its training script at a tiny size, in seconds, on a random language model."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.captioner import questions
from benchmarks.captioner.chats import write_chats
from benchmarks.captioner.pictures import PLACE, SIDE, Picture, _hands, draw
from benchmarks.captioner.questions import KINDS, ask
from benchmarks.studies.captions import over_pictures, scored
from tests.support import vision

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<jupyter_script>")
SIZES = dict(tower_steps=120, language_steps=80, minutes=1.0, rate=5e-3, seed=0)


# ---------------------------------------------------------------- pictures and answers
def test_digits_are_where_the_record_says():
    for picture in draw(50, seed=3):
        assert 1 <= len(picture.present) <= 5 and len({d for _, d in picture.present}) == len(picture.present)
        places = picture.pixels.reshape(3, PLACE, 3, PLACE).swapaxes(1, 2).reshape(9, -1)
        lit = places.max(1) > 128
        assert [i for i, _ in picture.present] == np.flatnonzero(lit).tolist()


def test_no_digit_of_training_is_in_a_held_out_picture():
    seen = {hand.tobytes() for hands in _hands(False).values() for hand in hands}
    kept = {hand.tobytes() for hands in _hands(True).values() for hand in hands}
    assert kept and not seen & kept


def test_equal_seeds_draw_equal_pictures():
    (a,), (b,), (c,) = draw(1, 5), draw(1, 5), draw(1, 6)
    assert np.array_equal(a.pixels, b.pixels) and not np.array_equal(a.pixels, c.pixels)


@pytest.mark.parametrize(
    "kind, digits, want",
    [
        (
            "describe",
            {0: 3, 4: 7, 8: 1},
            "The picture shows three digits: a 3 at the top left, a 7 in the center and a 1 at the bottom right.",
        ),
        (
            "how many",
            {1: 5},
            "There is one digit in the picture, and the other eight places are empty.",
        ),
        ("which", {2: 4, 3: 9}, "There are two digits in the picture: 4 and 9. The largest is 9."),
        (
            "where",
            {4: 6},
            "The digit 6 is in the center of the picture. The picture has no other digit.",
        ),
    ],
)
def test_answers_are_right(kind, digits, want):
    picture = Picture(np.zeros((SIDE, SIDE), np.uint8), tuple(digits.get(i) for i in range(9)))
    assert KINDS[kind](picture, np.random.default_rng(0))[1] == want


def test_a_question_of_where_is_of_a_digit_that_is_there():
    for one in ask(40, seed=1, kind="where"):
        digit = int("".join(c for c in one.question if c.isdigit()))
        (place,) = (p for p, d in one.picture.present if d == digit)
        assert questions.place_name(place) in one.answer


def test_calibration_rows_carry_the_pictures(tmp_path):
    asked = ask(4, seed=2)
    rows = [
        json.loads(line) for line in write_chats(tmp_path / "chats.jsonl", asked).read_text().splitlines()
    ]
    for row, one in zip(rows, asked, strict=True):
        image, text = row["messages"][0]["content"]
        url = image["image_url"]["url"]
        png = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        assert np.array_equal(np.asarray(png)[..., 0], one.picture.pixels) and text["text"] == one.question


# ---------------------------------------------------------------- the study's figures
def test_acceptance_over_pictures_leaves_plain_chats_out_and_a_prediction_is_scored():
    rows = [
        {"plan": "a", "kind": "which", "drafts": 10, "accepted": 9},
        {"plan": "a", "kind": "where", "drafts": 30, "accepted": 21},
        {"plan": "a", "kind": "no picture", "drafts": 100, "accepted": 0},
    ]
    assert over_pictures(rows) == {"a": 0.75}
    score = scored({"a": 0.85, "not made": 0.1}, over_pictures(rows))
    assert score["mean_absolute_error"] == 0.1 and list(score["by_plan"]) == ["a"]
    assert scored({}, {"a": 0.75})["mean_absolute_error"] is None


# ---------------------------------------------------------------- training
@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A random Llama of two layers with a tokenizer of bytes, which has SmolLM2's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    # It stays as it is in training and is the head too: as small as transformers makes it no token could be made likely.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.25)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(language_model, tmp_path_factory) -> tuple[Path, str]:
    """The tiny captioner's folder, and what the script said."""
    import contextlib

    if not vision.usable():
        pytest.skip("no torchvision; `make` installs packaging/vision.txt")
    from benchmarks.captioner.__main__ import train

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        folder = train(tmp_path_factory.mktemp("captioner"), language_model, **SIZES)
    return folder, said.getvalue()


def losses(said: str) -> list[float]:
    return [float(line.rsplit(" ", 1)[1]) for line in said.splitlines() if line.startswith("language: step ")]


def test_both_stages_learn(trained):
    _, said = trained
    read = float(said.split("% of held-out places")[0].rsplit(" ", 1)[1])
    assert read > 75, "two thirds of the places are empty, and saying so everywhere would give that"
    first, *_, last = losses(said)
    assert last < 0.8 * first


def test_the_checkpoint_is_llavas_and_a_plan_can_be_made_of_it(trained):
    from sdfp_vllm.plan.fingerprint import fingerprint
    from sdfp_vllm.planner.admission import admit
    from sdfp_vllm.planner.options import PlanOptions

    folder, _ = trained
    identity = fingerprint(folder)
    assert (identity.architecture, identity.num_layers) == ("LlavaForConditionalGeneration", 2)
    admit(folder, PlanOptions())
    note = (folder / "PROVENANCE").read_text()
    assert "toy captioner" in note and str(folder.parent) not in note


def test_the_checkpoints_processor_gives_the_pixels_and_tokens_of_training(trained):
    import transformers

    from benchmarks.captioner.checkpoint import pixels
    from benchmarks.captioner.language import messages, row_of

    folder, _ = trained
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    (one,) = ask(1, seed=4)
    text = processor.apply_chat_template(messages(one), tokenize=False, add_generation_prompt=True)
    made = processor(text=text, images=one.picture.image, return_tensors="pt")
    assert made["input_ids"][0].tolist() == row_of(one, processor.tokenizer).prompt
    assert torch.allclose(made["pixel_values"], pixels([one.picture]), atol=1e-5)


def test_the_image_token_takes_the_place_of_a_spare_one(language_model):
    from transformers import AutoTokenizer

    from benchmarks.captioner.checkpoint import IMAGE, load_tokenizer

    before, after = AutoTokenizer.from_pretrained(language_model), load_tokenizer(language_model)
    assert len(before) == len(after)
    assert after.convert_tokens_to_ids(IMAGE) == before.convert_tokens_to_ids("<jupyter_script>")


def test_a_picture_changes_what_the_trained_model_says(trained):
    import transformers

    from benchmarks.captioner.language import loss_of, row_of

    folder, _ = trained
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    row = row_of(ask(1, seed=4)[0], tokenizer)
    other = draw(1, seed=5)[0]
    with torch.no_grad():
        own = loss_of(model, [row]).item()
        assert own != loss_of(model, [type(row)(row.prompt, row.answer, other)]).item()
    # What is read back is what was trained: an untrained model's loss is that of guessing among 260 tokens, 5.6.
    assert own < 4.5


@pytest.mark.engine
@pytest.mark.more
def test_vllm_reads_the_checkpoint_as_transformers_does(trained):
    """The renamed tower and the tied head are there: greedy answers to pictures are transformers' own."""
    import transformers

    from benchmarks.captioner.language import messages
    from tests.support.engines import engine

    folder, _ = trained
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    asked = ask(6, seed=8)
    texts = [
        processor.apply_chat_template(messages(one), tokenize=False, add_generation_prompt=True)
        for one in asked
    ]
    want = []
    for text, one in zip(texts, asked, strict=True):
        inputs = processor(text=text, images=one.picture.image, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
        want.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    from vllm import SamplingParams

    prompts: Any = [
        {"prompt": text, "multi_modal_data": {"image": one.picture.image}}
        for text, one in zip(texts, asked, strict=True)
    ]
    with engine(folder, limit_mm_per_prompt={"image": 1}) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        got = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)]
    # Another order of adding up may decide a tie otherwise; a tower without weights would change them all.
    assert sum(a == b for a, b in zip(got, want, strict=True)) >= 5
