"""Chats that show images: the decoder alone, given what was kept of them, is transformers' whole model."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.common.checkpoint import load_config, load_tokenizer
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.planner import job
from sdfp_vllm.planner.bridges import BridgeFitter
from sdfp_vllm.planner.chat_rows import without_pictures
from sdfp_vllm.planner.fisher import fisher_sums
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.pictured import LONGEST, Pictured, show
from sdfp_vllm.planner.rollout import Continuations, DraftRollout, greedy_continuations
from sdfp_vllm.planner.shown import Shown, Window, entering
from sdfp_vllm.planner.stack import DecoderStack, load_target
from sdfp_vllm.planner.texts import CHECKED, Texts
from sdfp_vllm.ray.cluster import RayOptions
from tests.support import vision
from tests.support.picture_rows import image, inline, mixed, png, rows, text
from tests.support.tiny_multimodal import TINY, pictures, saver, token_id
from tests.unit.planner.test_job import SMALL, save_tiny

pytestmark = pytest.mark.skipif(
    not vision.usable(), reason="no torchvision; `make` installs packaging/vision.txt"
)

# Gemma 3's images attend both ways: its plans are made of text alone.
KINDS = [kind for kind in TINY if kind != "gemma3"]
ROTARY = [kind for kind in KINDS if kind.startswith("qwen")]
FEW = dict(text_sequences=2, bridge="affine", sequences=3)  # 4 texts, and 4 for the check


@pytest.fixture(scope="module", name="saved")
def _saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


class Loaded:
    """A tiny model as a whole, its decoder, and what chats show it."""

    def __init__(self, model: Path, folder: Path):
        source = mixed(folder, 14)
        options = PlanOptions(calibration=source, **FEW)
        self.texts = Texts.read(options, load_tokenizer(model), model)
        self.shown: list[Shown | None] = []
        self.whole: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()

        def look(whole: Any) -> None:
            self.shown.extend(show(whole, self.texts.pictured))

        self.stack = DecoderStack(load_target(model, torch.float32, look=look))
        assert self.texts.prompts is not None
        self.prompts = self.texts.prompts
        # Chats of every form are among those that are drawn.
        assert {c.pictures for c in self.texts.pictured} == {0, 1, 2}
        assert [s is not None for s in self.shown] == [bool(c.pictures) for c in self.texts.pictured]

    def written(self, new: int = 8) -> Continuations:
        return greedy_continuations(self.stack, self.prompts, new, shown=self.shown)

    def longer(self, n: int, added: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the whole model is given for chat n with tokens added to it."""
        given = dict(self.texts.pictured[n].inputs)
        given.pop("attention_mask", None)
        given["input_ids"] = torch.cat([self.prompts[n], added])[None]
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = torch.cat(
                [given["mm_token_type_ids"], torch.zeros(1, len(added), dtype=torch.int64)], dim=1
            )
        return given


@pytest.fixture(scope="module", name="loaded")
def _loaded(saved, tmp_path_factory):
    made: dict[str, Loaded] = {}

    def loaded(kind: str) -> Loaded:
        if kind not in made:
            made[kind] = Loaded(saved(kind), tmp_path_factory.mktemp(f"chats-{kind}"))
        return made[kind]

    return loaded


def with_images(shown: Sequence[Shown | None]) -> list[int]:
    return [n for n, s in enumerate(shown) if s is not None]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_decoder_sees_what_the_whole_model_shows_it(kind, loaded):
    it = loaded(kind)
    for n in with_images(it.shown):
        prompt, chat = it.prompts[n][None], it.texts.pictured[n]
        want = it.whole(**chat.inputs).logits
        torch.testing.assert_close(it.stack.logits(prompt, shown=[it.shown[n]]), want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(it.stack.logits(prompt)[0, -1], want[0, -1], atol=1e-2)
        # Placeholders, which no text has, are where images are.
        assert int(chat.image.sum()) == int((prompt == token_id(TINY[kind].embedded)).sum()) > 0
    # DeepStack's features count; without them the model is another.
    if kind == "qwen3_vl":
        n = with_images(it.shown)[0]
        s = it.shown[n]
        assert len(s.features) == 2
        other = it.stack.logits(it.prompts[n][None], shown=[replace(s, features=())])
        assert not torch.allclose(
            other[0, -1], it.whole(**it.texts.pictured[n].inputs).logits[0, -1], atol=1e-2
        )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_of_chats_goes_on_as_the_whole_model_would(kind, loaded):
    it = loaded(kind)
    written = it.written()
    assert bool(written.begins.any()), "the batch has no padding"
    for n, prompt in enumerate(it.prompts):
        given = it.longer(n, written.ids[n, written.first :]) if it.shown[n] else {}
        if not given:
            given = {"input_ids": written.ids[n : n + 1, int(written.begins[n]) :]}
        chosen = it.whole(**given).logits[0, len(prompt) - 1 :].argmax(-1)
        assert written.ids[n, written.first :].tolist() == chosen[:-1].tolist()
        assert int(written.chosen[n, -1]) == int(chosen[-1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_drafts_are_tried_behind_the_images(kind, loaded):
    it = loaded(kind)
    written = it.written()
    rollout = DraftRollout(it.stack, written)
    assert rollout.run(range(4), 3).rounds(3).acceptance_rate == 1.0
    partial = rollout.run([0, 3], 2).lengths
    # The full pass over the text, images and all, gives what the writing left.
    read = Continuations(written.ids, written.first, written.ends, begins=written.begins, shown=written.shown)
    assert torch.equal(DraftRollout(it.stack, read).run([0, 3], 2).lengths, partial)
    # One draft after the other, over a cache, as in `offline_drafts.py`.
    n = with_images(it.shown)[0]
    begin, s = int(written.begins[n]), it.shown[n]
    for start in range(written.first, written.ids.shape[1]):
        cache = DynamicCache(config=it.stack.config)
        past = written.ids[n : n + 1, begin:start]
        it.stack.model(
            **entering(it.stack.embed, past, past.new_zeros(1), [s]), past_key_values=cache, use_cache=True
        )
        with it.stack.keeping([0, 3]) as model:
            step = model(
                input_ids=written.ids[n : n + 1, start : start + 1],
                position_ids=torch.tensor([[start - begin + s.delta]]),
                past_key_values=cache,
                use_cache=True,
            )
        right = int(step.logits[0, -1].argmax()) == int(written.chosen[n, start - written.first])
        assert right == (int(partial[n, start - written.first]) > 0)


@pytest.mark.parametrize("kind", ROTARY)
@torch.no_grad()
def test_a_wrong_delta_would_show(kind, loaded):
    """The power of the tests above: drafts at their columns, as behind text, are accepted less."""
    it = loaded(kind)
    written = it.written()
    assert all(it.shown[n].delta < 0 for n in with_images(it.shown))
    assert DraftRollout(it.stack, replace(written, shown=())).run(range(4), 1).rounds(1).acceptance_rate < 0.9


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl"])
def test_fisher_traces_are_those_of_the_whole_model(kind, loaded):
    """Squared gradients of the whole model's log-likelihood of the text, an image's tokens left out."""
    it = loaded(kind)
    written = it.written()
    for n in with_images(it.shown)[:2]:
        ids = written.ids[n, int(written.begins[n]) :]
        got = fisher_sums(it.stack, [Window(ids, it.shown[n])]).sums[..., 0].sum(1)
        it.whole.zero_grad()
        odds = it.whole(**it.longer(n, written.ids[n, written.first :])).logits[0, :-1].log_softmax(-1)
        is_text = ids[1:] != token_id(TINY[kind].embedded)
        odds.gather(1, ids[1:, None])[is_text].sum().backward()
        layers = it.whole.get_decoder().layers
        want = [sum(float(p.grad.double().square().sum()) for p in layer.parameters()) for layer in layers]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-3, atol=0)
        it.whole.zero_grad()
        blind = fisher_sums(it.stack, [Window(ids)]).sums[..., 0].sum(1)
        assert not torch.allclose(blind, got, rtol=0.05)


def test_no_image_token_is_a_target_or_a_row_of_bridges(loaded):
    it = loaded("qwen2_vl")
    written = it.written()
    placeholder = token_id(TINY["qwen2_vl"].embedded)
    windows = it.texts.scored(written, None)
    assert len(windows) == it.texts.options.sequences and len({len(w.ids) for w in windows}) > 1
    for window in windows:
        targets = window.targets()
        assert placeholder not in targets.tolist()
        assert int((targets == -100).sum()) == int((window.ids == placeholder).sum())
    fitter = BridgeFitter(it.stack, written)
    sequence, start = fitter._rows
    rows_of_text = written.ids[sequence, start]
    assert placeholder not in rows_of_text.tolist() and bool((start < written.first).any())
    kept = fitter.fit([0, 3], "affine", 1)
    assert set(kept.bridges) <= {(1, 2)}


def test_what_is_counted_and_checked_is_text(loaded):
    it = loaded("qwen2_vl")
    placeholder, written = token_id(TINY["qwen2_vl"].embedded), it.written()
    counts = it.texts.frequencies(written.written(), 384)
    assert int(counts[1][placeholder]) == 0 and int(counts[1].sum()) > 0
    checked = it.texts.for_the_check(it.prompts)
    assert len(checked) == CHECKED
    tokenizer = it.texts.tokenizer
    assert all(placeholder not in p.tolist() and tokenizer.decode(p).endswith("assistant:") for p in checked)


def test_the_sums_of_another_image_are_not_gone_on_with(loaded, tmp_path):
    it = loaded("llava")
    n = with_images(it.shown)[0]
    ids, s = it.prompts[n], it.shown[n]
    file = tmp_path / "fisher.json"
    done = fisher_sums(it.stack, [Window(ids, s)], checkpoint=file)
    again = fisher_sums(it.stack, [Window(ids, s)], checkpoint=file, resume=True)
    assert torch.equal(done.sums, again.sums)
    other = replace(s, embeddings=s.embeddings + s.image[:, None] * 0.1)
    with pytest.raises(SdfpError, match="made with another model, calibration text"):
        fisher_sums(it.stack, [Window(ids, other)], checkpoint=file, resume=True)


def test_a_draw_without_images_is_scored_like_any_other():
    """A large file may show images in rows that were not drawn."""
    ids = torch.arange(2, 8)
    said = Pictured("chats.jsonl, line 1", ids, torch.zeros(6, dtype=torch.bool), ids)
    texts = Texts(PlanOptions(score_text="corpus", **FEW), None, [ids] * 3, "", [said] * 3)
    written = Continuations(torch.ones(2, 9, dtype=torch.int64), 6, torch.tensor([9, 9]))
    assert [w.ids.tolist() for w in texts.scored(written, None)] == [ids.tolist()] * 2


def test_without_pictures_roles_go_on_taking_turns():
    shown = {"type": "image", "picture": None}
    chat = [
        {"role": "user", "content": [shown]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}, shown]},
    ]
    plain = without_pictures(chat)
    assert [m["role"] for m in plain] == ["user", "assistant", "user"]
    assert all(isinstance(m["content"], str) and m["content"] for m in plain)


# --- what is refused, before a model is loaded -------------------------------------------------------------------------


@pytest.fixture(name="plan")
def _plan(tmp_path, monkeypatch):
    """`sdfp plan`, that fails where it comes to load a model."""
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")

    def loads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(job, "load_target", loads)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in ("plan", *args, *SMALL)])


HALF = base64.b64encode(png(pictures(1)[0])[:200]).decode()
NETWORK = "would be fetched from the network"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/cat.png", NETWORK),
        ("HTTPS://example.org/cat.png", NETWORK),
        ("s3://bucket/cat.png", NETWORK),
        ("file://server/cat.png", "names a file on another machine (server)"),
        ("file:///nowhere/cat.png", "/nowhere/cat.png is no file"),
        ("file:///" + "a" * 300, "cannot be had"),
        ("cat.png", "'cat.png' is no URL that starts with data: or file:"),
        ("", "is no URL"),
        ("data:image/png,abc", "is a data: URL that is not in base64"),
        ("data:image/png;base64,a*b", "is not base64"),
        ("data:image/png;base64,YWJj", "cannot be read as an image"),
        (f"data:image/png;base64,{HALF}", "cannot be read as an image"),
    ],
)
def test_images_that_cannot_be_had_are_refused_by_name(saved, tmp_path, plan, url, message):
    good = [image(inline(pictures(1)[0])), text("What is it?")]
    source = rows(tmp_path / "chats.jsonl", good, [text("And this?"), image(url)])
    made = plan(saved("qwen2_vl"), "--calibration", source)
    assert made.exit_code == 2, made.output
    assert "chats.jsonl, line 2, field messages[0].content[1].image_url.url: " in made.stderr
    assert message in made.stderr and "loaded" not in made.stderr


def test_a_url_may_be_the_images_own_value(saved, tmp_path, plan):
    content = [{"type": "image_url", "image_url": "http://example.org/cat.png"}]
    made = plan(saved("llava"), "--calibration", rows(tmp_path / "chats.jsonl", content))
    assert made.exit_code == 2
    assert (
        "line 1, field messages[0].content[0].image_url: http://example.org/cat.png would be" in made.stderr
    )
    assert "data:image/png;base64" in made.stderr, "the way out"


def test_other_media_are_refused(saved, tmp_path, plan):
    content = [{"type": "video_url", "video_url": {"url": "data:,"}}]
    made = plan(saved("qwen2_vl"), "--calibration", rows(tmp_path / "chats.jsonl", content))
    assert made.exit_code == 2
    assert (
        "field messages[0].content[0]: is a part of type 'video_url', and text and image_url" in made.stderr
    )


def test_models_that_are_shown_no_images_refuse_them(saved, tmp_path, plan):
    source = rows(tmp_path / "chats.jsonl", [image(inline(pictures(1)[0])), text("What is it?")])
    where = "chats.jsonl, line 1, field messages[0].content[0].image_url.url: is an image, and "
    made = plan(save_tiny(tmp_path / "text"), "--calibration", source)
    assert made.exit_code == 2 and f"{where}the model takes text alone" in made.stderr
    made = plan(saved("gemma3"), "--calibration", source)
    assert made.exit_code == 2 and f"{where}Gemma3ForConditionalGeneration is planned on text" in made.stderr
    assert "both ways" in made.stderr


def test_workers_are_sent_no_images(saved, tmp_path):
    source = rows(tmp_path / "chats.jsonl", [image(inline(pictures(1)[0])), text("What is it?")])
    model = saved("qwen2_vl")
    with pytest.raises(SdfpError, match=r"is an image, and workers of --ray are sent text alone"):
        Texts.read(PlanOptions(calibration=source, ray=RayOptions()), load_tokenizer(model), model)


def test_a_template_without_a_place_for_images_is_refused(saved, tmp_path):
    source, model = mixed(tmp_path, 14), saved("qwen2_vl")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = tokenizer.chat_template.replace(TINY["qwen2_vl"].image, "")
    with pytest.raises(SdfpError, match=r"line \d+: .*(no place|processor refuses)"):
        Texts.read(PlanOptions(calibration=source, **FEW), tokenizer, model)


def test_too_few_and_too_long(saved, tmp_path):
    model = saved("qwen2_vl")
    source = mixed(tmp_path, 3)
    with pytest.raises(SdfpError, match="has 3 chats of usable length, 4 are needed"):
        Texts.read(PlanOptions(calibration=source, **FEW), load_tokenizer(model), model)
    long = rows(tmp_path / "long.jsonl", [image(inline(pictures(1)[0])), text("x" * LONGEST)])
    positions = load_config(model).get_text_config().max_position_embeddings
    most = min(LONGEST, positions - PlanOptions(**FEW).new_tokens)
    with pytest.raises(SdfpError, match=rf"long\.jsonl: has no chat of at most {most} tokens, its images'"):
        Texts.read(PlanOptions(calibration=long, **FEW), load_tokenizer(model), model)


# --- the whole job ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen2_vl", []),
        ("qwen3_vl", ["--score-text", "corpus", "--bridge", "affine"]),
        ("idefics3", ["--selector", "gradient", "--head", "64"]),
    ],
)
def test_a_plan_is_made_from_chats_with_images(kind, more, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    source = mixed(tmp_path, 45)
    args = ["plan", saved(kind), "--calibration", source, "--draft-tokens", 2, *SMALL, *more]
    made = CliRunner().invoke(app, [str(a) for a in (*args, "-o", tmp_path / "shown")])
    assert made.exit_code == 0, made.output
    plan = load_plan(tmp_path / "shown")
    chats, images = (int(w) for w in plan.made.calibration.replace("(", "").replace(",", "").split()[1:4:2])
    assert plan.made.calibration.startswith(f"{source} ({chats} chats, {images} images, seed 0)")
    assert chats >= 16 and images > chats / 2
    assert plan.made.calibration_tokens > 0 and len(plan.scores) == 4
    # The same questions without their images give other scores: what is shown is in the context.
    blind = tmp_path / "blind.jsonl"
    stripped = []
    for line in Path(source).read_text().splitlines():
        content = json.loads(line)["messages"][0]["content"]
        stripped.append(content if isinstance(content, str) else [p for p in content if p["type"] == "text"])
    args[3] = rows(blind, *stripped)
    made = CliRunner().invoke(app, [str(a) for a in (*args, "-o", tmp_path / "blind")])
    assert made.exit_code == 0, made.output
    other = load_plan(tmp_path / "blind")
    assert "images" not in other.made.calibration and other.scores != plan.scores
