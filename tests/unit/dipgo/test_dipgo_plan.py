"""The diffusion plan file: read back as written, nothing damaged gets through; the command's manners."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.dipgo.fingerprint import PipelineFingerprint, SchedulerFingerprint
from sdfp_vllm.dipgo.layout import Unit
from sdfp_vllm.dipgo.macs import MacCount
from sdfp_vllm.dipgo.plan import PLAN_FILE, DipgoPlan, Provenance, Quality, load_plan
from sdfp_vllm.errors import PlanError, SdfpError


def make_plan(**changes) -> DipgoPlan:
    fields = {
        "pipeline": "some/pipeline",
        "fingerprint": PipelineFingerprint(
            denoiser="DiTTransformer2DModel", config_sha256="a" * 64, probes=[0.1, -0.2]
        ),
        "scheduler": SchedulerFingerprint(
            name="DDIMScheduler", config_sha256="b" * 64, num_inference_steps=3, timesteps=[999.0, 666.0, 333.0]
        ),
        "granularity": "block",
        "reuse": "residual",
        "order": 1,
        "units": [Unit(name="transformer_blocks.0"), Unit(name="transformer_blocks.1", inputs=(0,))],
        "executed": ["11", "01", "10"],
        "macs": MacCount(units=[6 * 10**9, 4 * 10**9], rest=0, rows_per_image=2),
        "quality": Quality(images=4, psnr=31.5, ssim=0.9),
        "scores": [[1.0, 1.0], [0.2, 0.7], [0.6, 0.1]],
        "made": Provenance(
            method="learned", budget=0.7, guidance_scale=2.0, seed=0, iterations=1, search_seconds=1.0,
            created="2030-01-01", sdfp_version="1", torch_version="2", diffusers_version="0",
        ),
    }  # fmt: skip
    return DipgoPlan(**(fields | changes))


def test_a_plan_is_read_back_as_written(tmp_path):
    plan = make_plan()
    assert load_plan(plan.save(tmp_path)) == load_plan(tmp_path) == plan
    assert load_plan(plan.save(tmp_path / "deep" / "other.json")) == plan
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [PLAN_FILE]  # nothing temporary is left
    # (6 + 4) + 4 + 6 of 3 x 10 GMACs, twice for guidance
    assert plan.macs.per_image(plan.gates) == 40 * 10**9 and plan.compute_share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("schema_version", 2, "schema_version"),
        ("executed", ["11", "01"], "2 rows, but scheduler.timesteps has 3"),
        ("executed", ["11", "011", "10"], "one digit for each of the 2 units"),
        ("executed", ["10", "01", "10"], "first call must run every unit"),
        ("executed", ["11", "0x", "10"], "executed.1"),
        ("units", [{"name": "a"}], "one digit for each"),
        ("units", [{"name": "a", "inputs": [1]}, {"name": "b"}], "does not come before"),
        ("scores", [[1.0, 1.0]], "scores must have 3 rows"),
        ("scores", [[1.0, 1.0], [float("nan"), 0.5], [0.5, 0.5]], "scores.1.0"),
        ("order", 2, "order"),
        ("reuse", "magic", "reuse"),
        ("surprise", 1, "surprise"),
        ("macs", {"units": [1], "rest": 0}, "macs.units has 1 entries for 2"),
        ("macs", {"units": [1, 2], "rest": -1}, "macs.rest"),
    ],
)
def test_damage_is_refused_by_name(tmp_path, field, value, reason):
    path = make_plan().save(tmp_path)
    raw = json.loads(path.read_text())
    raw[field] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError) as refused:
        load_plan(path)
    assert str(path) in str(refused.value) and reason in str(refused.value)
    assert "sdfp dipgo search" in str(refused.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_kind_of_error(tmp_path, data):
    text = make_plan().model_dump_json()
    at = data.draw(st.integers(0, len(text) - 1))
    junk = data.draw(st.text(max_size=4))
    path = tmp_path / "damaged.json"
    path.write_text(text[:at] + junk + text[at + data.draw(st.integers(0, 8)) :], encoding="utf-8")
    try:
        load_plan(path)
    except PlanError as e:
        assert e.way_out


def test_files_that_are_no_plans(tmp_path):
    with pytest.raises(PlanError, match="no such plan"):
        load_plan(tmp_path)
    for content, reason in (
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
    ):
        (tmp_path / PLAN_FILE).write_bytes(content)
        with pytest.raises(PlanError, match=reason):
            load_plan(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="cannot be written"):
        make_plan().save(tmp_path / "file" / "x.json")


@pytest.fixture(name="sdfp")
def _sdfp(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *args: CliRunner().invoke(app, ["dipgo", *map(str, args)])


def test_show_says_what_runs_and_draws_it(sdfp, tmp_path):
    path = make_plan().save(tmp_path)
    result = sdfp("show", path, "--png", tmp_path / "new" / "gates.png")
    assert result.exit_code == 0
    for part in (
        "66.7% of the compute",
        "40.00 GMAC of 60.00 GMAC",
        "PSNR 31.5 dB",
        "█·█",
        "██·",
        "learned search",
    ):
        assert part in result.output
    assert (tmp_path / "new" / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_another_budget_from_the_same_search(sdfp, tmp_path):
    path = make_plan().save(tmp_path)
    result = sdfp("budget", path, 0.6, "-o", tmp_path / "other.json")
    assert result.exit_code == 0, result.output
    other = load_plan(tmp_path / "other.json")
    # Highest scores first: 0.7 (4 GMAC) fits, 0.6 (6 GMAC) would make 0.67.
    assert other.executed == ["11", "01", "00"] and other.quality is None and other.made.budget == 0.6
    make_plan(scores=None).save(path)
    result = sdfp("budget", path, 0.6, "-o", tmp_path / "other.json")
    assert result.exit_code == 2 and "no learned scores" in result.output
    make_plan().save(path)
    assert "BUDGET: is 3" in sdfp("budget", path, 3, "-o", tmp_path / "other.json").output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("show", "nowhere"), "no such plan"),
        (("search", "nowhere"), "no model_index.json"),
        (("search", "nowhere", "--budget", "2"), "--budget: is 2"),
        (("search", "nowhere", "--dtype", "int3"), "--dtype: int3 is unknown"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(sdfp, arguments, reason):
    result = sdfp(*arguments)
    assert result.exit_code == 2 and reason in result.output and result.output.count("\n") == 1
    assert not isinstance(result.exception, SdfpError)
