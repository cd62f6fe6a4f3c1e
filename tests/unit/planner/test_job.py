"""The whole offline job on a tiny model saved to disk, through the command a user types."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.engine.draft.rounded_linear import refusal
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.store import default_plan_dir, load_plan
from sdfp_vllm.planner import job
from sdfp_vllm.planner.job import make_plan
from tests.support.tiny_models import tiny_model
from tests.unit.planner.test_search import flat_cost

TEXT = "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n"
# The tiny model is no engine's, and its times say nothing: what runs on lower precision has tests of its own.
QUICK = ["--no-check", "--precision", "full"]
SMALL = ["--sequences", "3", "--length", "32", *QUICK]


def save_tiny(folder: Path) -> Path:
    """A random Llama whose middle layers are idle, with a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    model = tiny_model("llama", vocab_size=300, eos_token_id=None, max_position_embeddings=256)
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", name="text")
def _text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 600)
    return path


@pytest.fixture(name="sdfp")
def _sdfp(tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_plan_then_show_in_the_default_place(sdfp, model, text, tmp_path):
    made = sdfp("plan", model, "--calibration", text, *SMALL)
    assert made.exit_code == 0, made.output
    folder = default_plan_dir(fingerprint(model))
    plan = load_plan(folder, expected=fingerprint(model))
    assert str(folder / "plan.json") in made.output
    assert f"vllm serve {model} --dtype {plan.costs.dtype} --speculative-model sdfp" in made.output
    assert [f.name for f in folder.iterdir()] == ["plan.json"]
    assert len(plan.scores) == 4 and plan.curve and plan.costs and plan.chances and plan.check is None
    assert plan.view.branches in [c.view for c in plan.curve]
    assert plan.made.calibration.startswith(str(text)) and plan.made.score_text == "own"
    assert plan.made.calibration_tokens == 3 * (64 + 64)  # prompts of 64 tokens and what the model wrote
    assert plan.extra_bytes == 0 and plan.used_precisions() == {"full"} and plan.costs.precisions == ["full"]
    assert ("Nothing beats plain decoding" in made.output) == (not plan.worthwhile)

    png, html = tmp_path / "plan.png", tmp_path / "plan.html"
    shown = sdfp("show", model, "--png", png, "--html", html)
    assert shown.exit_code == 0, shown.output
    for score in plan.scores:
        assert f"{score.total.trace_score:.3g}" in shown.output
    assert f"{plan.prediction.speedup:.2f}x" in shown.output and plan.made.created in shown.output
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    page = html.read_text()
    assert "<svg" in page and str(model) in page
    assert not re.search(r"(src|href)=|url\(|https?://|<script", page)


def test_fixed_numbers_seed_and_folder(sdfp, model, text, tmp_path):
    fixed = ["--layers", 2, "--draft-tokens", 3, "--seed", 5, "--score-form", "diagonal", "--selector", "fit"]
    fixed += ["--score-text", "corpus"]
    plans = []
    for name in ("a", "b"):
        made = sdfp("plan", model, "--calibration", text, *SMALL, *fixed, "-o", tmp_path / name)
        assert made.exit_code == 0, made.output
        assert f'"model": "{tmp_path / name}"' in made.output
        plans.append(load_plan(tmp_path / name / "plan.json"))
    a, b = plans
    assert a.view == b.view and a.keep == KeepSet((0, 3)) and a.num_speculative_tokens == 3
    assert a.scores == b.scores and a.curve[0].acceptance == b.curve[0].acceptance
    assert a.prediction.mean_accepted_length == b.prediction.mean_accepted_length > 2
    assert a.made.seed == 5 and a.made.selector == "fit-diagonal"
    assert a.made.score_text == "corpus" and a.made.calibration_tokens == 96


@pytest.mark.parametrize(("selector", "name"), [("auto", "auto-diagonal"), ("gradient", "gradient")])
def test_selectors_write_plans_that_say_so(sdfp, model, text, tmp_path, selector, name):
    made = sdfp(
        *("plan", model, "--calibration", text, *SMALL, "--score-form", "diagonal"),
        *("--selector", selector, "-o", tmp_path),
    )
    assert made.exit_code == 0, made.output
    plan = load_plan(tmp_path, expected=fingerprint(model))
    assert plan.made.selector == name
    assert plan.keep in [c.keep for c in plan.curve] and f"Kept layers: {plan.keep}" in made.output
    costs = plan.costs
    assert costs is not None and costs.num_layers == 4 and costs.rows[:9] == list(range(1, 10))
    branches = costs.layers_ms(KeepSet(attention=(0,)), 1) + costs.layers_ms(KeepSet(mlp=(0,)), 1)
    assert branches == pytest.approx(costs.layers_ms(KeepSet((0,)), 1))
    assert name in sdfp("show", tmp_path).output


@pytest.fixture
def lower(monkeypatch):
    """A machine where int8 takes half the time; its arithmetic is this machine's."""
    if why := refusal("int8", torch.float32, 16, 24):
        pytest.skip(why)
    half = flat_cost(4, rounded={"int8": 0.5}, head=[0.5] * 9)
    monkeypatch.setattr(job, "measure_costs", lambda stack, **settings: half)
    return half


# Bytes of an int8 copy: codes and a float32 scale a row. Fused as in the engine.
ATTENTION = (32 * 16 + 4 * 32) + (16 * 16 + 4 * 16)
MLP = (48 * 16 + 4 * 48) + (16 * 24 + 4 * 16)
HEAD = 300 * 16 + 4 * 300


@pytest.mark.parametrize("selector", ["auto", "fit", "gradient"])
def test_what_runs_at_lower_precision_is_planned_counted_and_shown(
    sdfp, model, text, tmp_path, lower, selector
):
    made = sdfp(
        *("plan", model, "--calibration", text, "--sequences", 3, "--length", 32, "--no-check"),
        *("--precision", "int8", "--selector", selector, "-o", tmp_path),
    )
    assert made.exit_code == 0, made.output
    plan = load_plan(tmp_path, expected=fingerprint(model))
    used = plan.view.branches.as_units()
    assert "int8" in used.values() and plan.view.head.precision == "int8"
    assert plan.costs == lower.model_copy(update={"draft_head": lower.head["int8"]})
    rounded = [branch for (branch, _), precision in used.items() if precision == "int8"]
    assert plan.extra_bytes == rounded.count("attention") * ATTENTION + rounded.count("mlp") * MLP + HEAD
    assert f"Kept layers: {plan.view.branches}" in made.output and "int8" in made.output
    assert "Extra weights: 0 MB" in made.output
    for s in plan.scores:
        assert s.attention.rounding_scores.keys() == s.mlp.rounding_scores.keys() == {"int8"}
    shown = sdfp("show", tmp_path)
    assert shown.exit_code == 0 and "int8" in shown.output


@pytest.mark.parametrize(("allowed", "head"), [(0, "full"), (HEAD - 1, "full"), (HEAD + ATTENTION, "int8")])
def test_the_memory_that_is_allowed_is_not_exceeded(sdfp, model, text, tmp_path, lower, allowed, head):
    made = sdfp(
        *("plan", model, "--calibration", text, "--sequences", 3, "--length", 32, "--no-check"),
        *("--precision", "int8", "--extra-memory", f"{allowed}B", "-o", tmp_path),
    )
    assert made.exit_code == 0, made.output
    plan = load_plan(tmp_path)
    assert plan.extra_bytes <= allowed and plan.view.head.precision == head
    if not allowed:
        assert plan.used_precisions() == {"full"} and plan.extra_bytes == 0


def test_interrupted_leaves_no_plan_and_resume_finishes(model, text, tmp_path):
    """A real Ctrl-C to a real process, in the middle of the Fisher traces."""
    out, partial = tmp_path / "out", tmp_path / "out" / ".fisher-partial.pt"
    command = [
        sys.executable,
        "-m",
        "sdfp_vllm.cli.app",
        "plan",
        str(model),
        "--calibration",
        str(text),
        "-o",
        str(out),
    ]
    command += ["--sequences", "64", "--length", "16", "--score-text", "corpus", *QUICK]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not partial.exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130, errors
    assert "Traceback" not in errors and "--resume" in errors
    assert [f.name for f in out.iterdir()] == [partial.name]
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert [f.name for f in out.iterdir()] == ["plan.json"]


def test_what_cannot_be_done_is_refused_before_the_model_is_loaded(sdfp, model, text, tmp_path):
    # A folder that has everything but weights: whatever loads the model first would say so.
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((model / file).read_bytes())
    (tmp_path / "file").touch()
    refused = [
        (["-o", tmp_path / "file" / "out"], "output folder"),
        (["--layers", 4], "Keep 1 to 3 layers"),
        (["--draft-tokens", 40], "Draft 1 to 32"),
        (["--calibration", tmp_path / "none.txt"], "no such file"),
        (["--extra-memory", "much"], "--extra-memory"),
    ]
    for arguments, reason in refused:
        result = sdfp("plan", tmp_path, "--calibration", text, *arguments)
        assert result.exit_code == 2 and reason in result.stderr, result.output
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    choices = [
        ("dtype", "int3", "bfloat16"),
        ("score_form", "best", "diagonal"),
        ("selector", "best", "gradient"),
        ("precision", "int3", "mxfp4"),
        ("score_text", "both", "corpus"),
    ]
    for name, wrong, one in choices:
        flag = "--" + name.replace("_", "-")
        result = sdfp("plan", tmp_path, "--calibration", text, flag, wrong)
        assert result.exit_code == 2 and flag in result.stderr and f"'{one}'" in result.stderr, result.output
        with pytest.raises(SdfpError, match=f"{flag}.*Use one of .*{one}"):  # and from Python
            make_plan(str(tmp_path), calibration=str(text), **{name: wrong})
    with pytest.raises(SdfpError, match="cannot be loaded"):
        make_plan(str(tmp_path), out=tmp_path / "out", calibration=str(text))
    assert not list(tmp_path.rglob("plan.json"))


def test_a_model_without_tokenizer_is_refused_by_name(sdfp, model, tmp_path):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    result = sdfp("plan", tmp_path)
    assert result.exit_code == 2 and "no tokenizer" in result.stderr


def test_a_deep_mixture_of_experts_is_planned_with_its_experts_in_full(tmp_path, model, text):
    """More moves than are screened: each is weighed by its score, which experts have for skipping alone."""
    sizes = dict(hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    experts = dict(moe_intermediate_size=64, decoder_sparse_step=1, num_hidden_layers=14, vocab_size=300)
    made = tiny_model("qwen3_moe", **sizes, **experts, eos_token_id=None, max_position_embeddings=256)
    made.save_pretrained(tmp_path / "moe")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "moe" / file).write_bytes((model / file).read_bytes())
    small = dict(sequences=2, length=16, text_sequences=2, prompt=8, new_tokens=8)
    plan = make_plan(
        str(tmp_path / "moe"),
        out=tmp_path / "plan",
        calibration=str(text),
        run_check=False,
        precision="int8",  # at this size it is slower, and auto would leave it out
        **small,
    )
    assert set(plan.view.mlp) <= {"full", "skip"}
    assert all(set(c.mlp) <= {"full", "skip"} for c in plan.curve)
    assert "int8" in plan.costs.precisions
