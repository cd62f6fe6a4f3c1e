"""`sdfp dipgo search` from a saved pipeline to a plan, or to the plain word that fewer steps do as well; for every family."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import tests.toy.digits.identity_vae  # noqa: F401  # so that diffusers finds its class
from sdfp_vllm.cli.app import app
from sdfp_vllm.dipgo import apply_dipgo, load_plan
from sdfp_vllm.dipgo.pipelines import load_pipeline
from sdfp_vllm.dipgo.plan import FewerSteps, Quality
from sdfp_vllm.dipgo.sampling import CONDITIONS_FILE, Sampler, load_conditions
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_plan import make_plan

WORSE = "NOTHING FOUND IS NEARER THAN FEWER STEPS"


def save(kind, folder):
    """The tiny pipeline of a kind as a folder, and the arguments that its call needs as flags."""
    sampler = tiny_sampler(kind)
    sampler.pipe.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in sampler.conditions.values.items()}, folder / CONDITIONS_FILE)
    return [f for name, value in sampler._given.items() for f in ("--set", f"{name}={json.dumps(value)}")]


def search(folder, *further, steps=8, budget=0.5):
    arguments = [
        "dipgo", "search", str(folder), "--steps", str(steps), "--budget", str(budget), "--guidance-scale", "3",
        "--images", "2", "--projections", "2", "--rounds", "1", "--test-images", "4",
        "-o", str(folder / "plan.json"), *further,
    ]  # fmt: skip
    return CliRunner().invoke(app, arguments)


def check(result, folder, kind, sets):
    assert result.exit_code == 0, result.output
    written = (folder / "plan.json").exists()
    assert written != (WORSE in result.output)
    if not written:
        assert "No plan written; --keep" in result.output and "num_inference_steps=" in result.output
        return None
    plan = load_plan(folder / "plan.json")
    assert plan.compute_share <= 0.5 + 0.0125 and plan.native.steps <= 4
    assert plan.quality.psnr > plan.native.psnr
    assert plan.quality.time > 0 and f"which took {plan.quality.time:.2f} of its time" in " ".join(
        result.output.split()
    )
    pipe = load_pipeline(folder)
    settings = {name: json.loads(value) for name, value in (s.split("=", 1) for s in sets[1::2])}
    sampler = Sampler(pipe, load_conditions(pipe, folder), 8, 3.0, **settings)
    with apply_dipgo(pipe, plan), torch.no_grad():
        assert torch.isfinite(sampler.decode(sampler.latents([1]))).all()
    return plan


@pytest.mark.more
@pytest.mark.parametrize("kind", ["sdxl", *FAMILIES])
def test_a_family_is_searched_from_its_folder(kind, tmp_path, capsys):
    sets = save(kind, tmp_path)
    plan = check(search(tmp_path, *sets), tmp_path, kind, sets)
    with capsys.disabled():
        print(
            f"\n{kind}: "
            + ("fewer steps are as near" if plan is None else f"{plan.quality.psnr:.1f} dB, native {plan.native.psnr:.1f} dB, "
               f"{plan.granularity}, {plan.reuse}, order {plan.order}, {plan.compute_share:.1%}")
        )  # fmt: skip


def test_a_video_family_is_searched_from_its_folder(tmp_path):
    sets = save("wan_21", tmp_path)
    check(
        search(tmp_path, *sets, "--granularity", "step", "--order", "0", "--rounds", "0"),
        tmp_path,
        "wan_21",
        sets,
    )


def test_what_fewer_steps_beat_is_not_written_unless_asked(tmp_path, monkeypatch):
    from sdfp_vllm.dipgo import job

    sets = save("flux", tmp_path)
    monkeypatch.setattr(job, "fewer_steps", lambda *_: FewerSteps(steps=2, psnr=99.0))
    few = ("--granularity", "step", "--rounds", "0", "--order", "0")
    result = search(tmp_path, *sets, *few, steps=4)
    assert result.exit_code == 0 and not (tmp_path / "plan.json").exists()
    assert WORSE in result.output and "num_inference_steps=2" in result.output and "--keep" in result.output
    result = search(tmp_path, *sets, *few, "--keep", steps=4)
    assert result.exit_code == 0 and WORSE in result.output
    assert load_plan(tmp_path / "plan.json").beaten
    shown = CliRunner().invoke(app, ["dipgo", "show", str(tmp_path / "plan.json")])
    assert WORSE in " ".join(shown.output.split())


def test_a_plan_that_is_nearer_than_fewer_steps_says_by_how_much():
    from sdfp_vllm.dipgo.report import verdict

    good = make_plan(quality=Quality(images=4, psnr=31.5, ssim=0.9), native=FewerSteps(steps=1, psnr=30.0))
    assert not good.beaten and "1 native steps reach 30.0 dB" in verdict(good) and WORSE not in verdict(good)
    assert good.model_copy(update={"native": FewerSteps(steps=1, psnr=31.5)}).beaten


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--set=height", "--set height: is not NAME=VALUE"),
        ("--set=colour=3", "--set colour: no argument of FluxPipeline"),
        ("--layout=nowhere.json", "--layout nowhere.json: cannot be read"),
    ],
)
def test_bad_flags_are_refused(flag, reason, tmp_path):
    sets = save("flux", tmp_path)
    result = search(tmp_path, *sets, flag)
    assert result.exit_code == 2 and reason in result.output


def test_several_budgets_give_a_plan_each_from_one_search(tmp_path):
    tiny_sampler("dit").pipe.save_pretrained(tmp_path)
    flags = ["dipgo", "search", str(tmp_path), "--steps", "8", "--guidance-scale", "3", "--images", "1", "--rounds", "0"]  # fmt: skip
    flags += ["--granularity", "block"]
    flags += ["--projections", "1", "--test-images", "2", "--keep", "--budget", "0.5", "--budget", "0.75"]
    result = CliRunner().invoke(app, [*flags, "-o", str(tmp_path / "plans")])
    assert result.exit_code == 0, result.output
    plans = {b: load_plan(tmp_path / "plans" / b) for b in ("0.75", "0.5")}
    for budget, plan in plans.items():
        assert plan.made.budget == float(budget) and plan.compute_share <= float(budget)
    assert plans["0.75"].native.steps == 6 and plans["0.5"].native.steps == 4
    assert plans["0.75"].compute_share > 0.5

    one_file = CliRunner().invoke(app, [*flags, "-o", str(tmp_path / "plan.json")])
    assert one_file.exit_code == 2 and "Give a folder" in one_file.stderr
    learned = CliRunner().invoke(app, [*flags, "--method", "learned", "-o", str(tmp_path / "plans")])
    assert learned.exit_code == 2 and "sdfp dipgo budget" in learned.stderr
