"""`sdfp plan` of a checkpoint that takes images: its text decoder is found, loaded, scored and tried as a causal LM is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.families import MULTIMODAL
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.store import default_plan_dir, load_plan
from sdfp_vllm.planner.admission import admit
from sdfp_vllm.planner.chats import render_chat
from sdfp_vllm.planner.engine_overheads import of_layers
from sdfp_vllm.planner.engine_setup import engine_settings, stored_dtype
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests.support import vision
from tests.support.tiny_multimodal import TINY, VOCAB, saver
from tests.unit.planner.test_job import SMALL, TEXT

pytestmark = pytest.mark.skipif(
    not vision.usable(), reason="no torchvision; `make` installs packaging/vision.txt"
)


@pytest.fixture(scope="module", name="saved")
def _saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


def change(folder: Path, edit) -> None:
    """Edits a folder's config.json in place."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


# LLaVA's file has the names that vLLM reads, which transformers reads as well.
@pytest.mark.parametrize("kind", TINY)
def test_the_decoder_is_the_whole_model_on_text(kind, saved):
    model = saved(kind)
    identity = fingerprint(model)
    assert (identity.num_layers, identity.hidden_size, identity.vocab_size) == (4, 64, VOCAB)
    admit(model, PlanOptions())
    whole = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    stack = DecoderStack(load_target(model, torch.float32))
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(stack.logits(ids), whole(input_ids=ids).logits)
    parameters = {id(p) for p in stack.model.parameters()}
    assert len(parameters) == len(list(stack.model.parameters()))
    assert not [n for n, _ in stack.model.named_parameters() if "vision" in n or "visual" in n]
    # What is tried on it: all of it is accepted always, some of it not.
    text = greedy_continuations(stack, [[1, 2, 3], [4, 5, 6, 7, 8]], 8)
    rollout = DraftRollout(stack, text)
    assert rollout.run(range(4), 3).rounds(3).acceptance_rate == 1.0
    assert stack.has_sublayers == MULTIMODAL[identity.architecture].branches
    assert rollout.run(KeepSet((3,)), 3).rounds(3).acceptance_rate < 1.0


def test_the_list_is_what_is_tried(saved):
    assert {fingerprint(saved(kind), weights=False).architecture for kind in TINY} == set(MULTIMODAL)


def test_another_family_is_refused_with_anyway_too(saved, tmp_path):
    model = Path(shutil.copytree(saved("qwen2_vl"), tmp_path / "model"))
    change(model, lambda config: config.update(architectures=["HomemadeForConditionalGeneration"]))
    with pytest.raises(SdfpError, match=r"HomemadeForCond.*takes more than text.*docs/use/multimodal.md"):
        admit(model, PlanOptions(anyway=True))


def test_the_documented_families_are_those_of_the_list():
    page = (Path(__file__).parents[3] / "docs" / "use" / "multimodal.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| `(\w+)` \| .*\| yes \|", page, re.MULTILINE))
    assert {a: name for name, a in rows.items()} == {a: f.name for a, f in MULTIMODAL.items()}


def test_a_plan_is_made_and_found(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    model, text = saved("qwen2_vl"), tmp_path / "text.txt"
    text.write_text(TEXT * 200)
    made = CliRunner().invoke(app, [str(a) for a in ("plan", model, "--calibration", text, *SMALL)])
    assert made.exit_code == 0, made.output
    plan = load_plan(default_plan_dir(fingerprint(model)), expected=fingerprint(model))
    assert plan.fingerprint.architecture == "Qwen2VLForConditionalGeneration" and len(plan.scores) == 4


def test_a_shape_that_a_config_leaves_out_is_transformers(saved, tmp_path):
    """LLaVA 1.5 and Gemma 3 leave out what is its class's default."""
    model = Path(shutil.copytree(saved("llava"), tmp_path / "model"))
    change(model, lambda config: config["text_config"].pop("hidden_size"))
    assert fingerprint(model, weights=False).hidden_size == 4096
    change(
        model, lambda config: config["text_config"].clear()
    )  # no decoder of its own: the whole config is one
    with pytest.raises(SdfpError, match="num_hidden_layers"):
        fingerprint(model, weights=False)


def test_a_flat_config_of_an_older_checkpoint_has_the_same_shape(saved, tmp_path):
    """Qwen2-VL's own checkpoints have the decoder's fields beside the vision's."""
    model = Path(shutil.copytree(saved("qwen2_vl"), tmp_path / "model"))
    change(model, lambda config: config.update(config.pop("text_config") | {"model_type": "qwen2_vl"}))
    admit(model, PlanOptions())
    was, now = fingerprint(saved("qwen2_vl")), fingerprint(model)
    assert (was.num_layers, was.hidden_size, was.vocab_size) == (
        now.num_layers,
        now.hidden_size,
        now.vocab_size,
    )
    assert of_layers(model, 2) == {"num_hidden_layers": 2}


def test_engines_of_the_check_answer_text_alone(saved):
    model = saved("qwen2_vl")
    assert engine_settings(fingerprint(model), 64, PlanOptions())["language_model_only"] is True
    assert of_layers(model, 2) == {"text_config": {"num_hidden_layers": 2}}
    assert stored_dtype(model) == "float32"


def test_a_template_in_the_processors_file_and_of_parts_is_rendered(saved, tmp_path):
    model = Path(shutil.copytree(saved("idefics3"), tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    assert not load_tokenizer(model).chat_template
    parts = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    (model / "chat_template.json").write_text(json.dumps({"chat_template": parts}))
    tokenizer = load_tokenizer(model)
    prompt = render_chat(tokenizer, [{"role": "user", "content": "Why?"}])
    assert tokenizer.decode(prompt) == "user:Why?"
