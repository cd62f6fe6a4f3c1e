"""The script for a GPU, as far as it goes without one: its help, and the check of a plan against a checkpoint."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.gpu import omni as script
from sdfp_vllm.dipgo.plan import load_plan
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import make_plan


def test_help_names_what_it_takes():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.omni", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--check" in done.stdout and "--adapter" in done.stdout


def test_check_fits_a_plan_to_its_checkpoint_and_says_what_would_run(tmp_path, monkeypatch, capsys):
    sampler = tiny_sampler("qwen")
    sampler.denoiser.save_pretrained(tmp_path / "model" / "transformer")
    plan = make_plan(sampler).save(tmp_path / "plan")
    asked = ["omni", str(tmp_path / "model"), str(plan), "--check", "--adapter", "--batches", "3"]
    monkeypatch.setattr(sys, "argv", asked)
    script.main()
    said = capsys.readouterr().out
    assert "The plan fits" in said
    for engine in ("full", "plan", "native steps", "diffusers, plan", "step-wise by 3, plan"):
        assert f"{engine}: " in said

    other = load_plan(plan)
    other = other.model_copy(
        update={"fingerprint": other.fingerprint.model_copy(update={"probes": [9.0] * 32})}
    )
    with pytest.raises(SystemExit, match="another model"):
        script.check(str(tmp_path / "model"), other)
