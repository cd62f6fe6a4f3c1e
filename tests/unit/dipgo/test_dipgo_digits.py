"""The digits models that come with the package, and the commands on them from end to end."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from examples.digits import main, run_demo
from sdfp_vllm.cli.app import app
from sdfp_vllm.dipgo import apply_dipgo, load_plan
from sdfp_vllm.dipgo.options import SearchOptions
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.errors import SdfpError
from tests.toy.digits.data import digits
from tests.toy.digits.judge import judge
from tests.toy.digits.pipelines import digits_folder, digits_pipeline


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_the_models_draw_the_digit_asked_for(name):
    pipe = digits_pipeline(name)
    conditions = load_conditions(pipe, digits_folder(name))
    assert len(conditions) == 10
    sampler = Sampler(pipe, conditions, steps=8, guidance_scale=2.0)
    seeds = list(range(24))
    asked = conditions.of(seeds)
    classes = asked["class_labels"] if name == "dit" else asked["prompt_embeds"][:, 0].argmax(-1).tolist()
    assert len(set(classes)) > 5
    assert judge().accuracy(sampler.latents(seeds), classes) >= 0.75


def test_the_judge_tells_digits_from_noise():
    images, labels = digits()
    assert judge().accuracy(images[:200], labels[:200].tolist()) > 0.95
    assert judge().fid(images) == pytest.approx(0, abs=1e-3)
    assert judge().fid(torch.randn(200, 1, 8, 8)) > judge().fid(images[::9] + 0.1)


def test_the_demo_saves_table_picture_and_plans(tmp_path, monkeypatch):
    few = partial(SearchOptions, images=1, projections=1, rounds=1, granularity="block")
    monkeypatch.setattr("examples.digits.SearchOptions", few)
    rows = run_demo(10, [0.6], 4, tmp_path, Console(quiet=True))
    full, pruned = rows
    assert (full.compute, full.psnr, full.ssim, full.latency) == (1.0, 100.0, pytest.approx(1.0), 1.0)
    assert 0.25 <= pruned.compute <= 0.6 and 10 < pruned.psnr < 100
    saved = json.loads((tmp_path / "dipgo.json").read_text())
    assert [r["name"] for r in saved["rows"]] == [r.name for r in rows]
    assert (tmp_path / "dipgo.png").read_bytes().startswith(b"\x89PNG")
    plan = load_plan(tmp_path / "dipgo-0.6.json")
    assert plan.compute_share == pytest.approx(pruned.compute)


@pytest.mark.parametrize("method", ["fisher", "learned"])
def test_search_show_and_use_on_the_unet(tmp_path, method):
    plan = tmp_path / "plan.json"
    arguments = [
        "dipgo", "search", str(digits_folder("unet")), "--steps", "4", "--budget", "0.6", "--method", method,
        "--images", "2", "--projections", "1", "--rounds", "1", "--test-images", "2", "--iterations", "2",
        "--guidance-scale", "2", "--keep", "-o", str(plan),
    ]  # fmt: skip
    searched = CliRunner().invoke(app, arguments)
    assert searched.exit_code == 0, searched.output
    assert "of the compute" in searched.output and str(plan) in searched.output
    shown = CliRunner().invoke(app, ["dipgo", "show", str(plan)])
    assert shown.exit_code == 0 and "UNet2DConditionModel" in shown.output
    made = load_plan(plan)
    assert made.compute_share <= 0.6 + 0.0125
    pipe = digits_pipeline("unet")
    pipe.set_progress_bar_config(disable=True)
    table = load_conditions(pipe, digits_folder("unet")).of([1, 2])
    with apply_dipgo(pipe, plan):
        images = pipe(
            **table,
            num_inference_steps=4,
            guidance_scale=2.0,
            generator=torch.manual_seed(0),
            output_type="pt",
        ).images
    assert images.shape == (2, 1, 8, 8) and torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("asked", "reason"), [({"budgets": "half"}, "not a list of numbers"), ({"images": 1}, "--images: is 1")]
)
def test_what_the_demo_cannot_do_is_refused(asked, reason, tmp_path):
    with pytest.raises(SdfpError, match=reason):
        main(out=tmp_path, **asked)
