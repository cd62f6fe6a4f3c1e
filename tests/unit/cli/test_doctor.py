"""`sdfp doctor` without a server: what is installed and planned, each advice at its threshold, refusals of addresses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.engine.serving_health import Traffic
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.store import default_plan_dir
from tests import toy
from tests.support.engines import pacing_by_hand, write_plan
from tests.support.servers import free_port

HEALTHY = Traffic(
    running=1, generated=300, rounds=100, drafted=250, accepted=200, paced=110, paused=10, model=200,
    copied=60, draft_ms=500,
)  # fmt: skip


def doctor(*words: str):
    return CliRunner().invoke(app, ["doctor", *words])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return tmp_path


@pytest.fixture
def planned(cache):
    folder = default_plan_dir(fingerprint(toy.MODEL))
    write_plan(toy.MODEL, folder, [0], k=3, pacing=pacing_by_hand())
    return folder


def test_an_installation_in_order(cache):
    result = doctor()
    assert result.exit_code == 0, result.output
    assert "0.32.0, tried" in result.output and "registered" in result.output and "int8" in result.output
    assert "No plans in the default place" in result.output


def test_a_plugin_that_vllm_leaves_out_is_named(cache, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    result = doctor()
    assert result.exit_code == 1 and "Add sdfp to VLLM_PLUGINS" in result.output


def test_plans_are_listed_with_the_versions_that_differ(planned):
    result = doctor()
    assert result.exit_code == 0, result.output
    assert "by hand" in result.output and "1.10x" in result.output and "torch test" in result.output


def test_a_damaged_plan_is_named(planned):
    (planned / "plan.json").write_text("{")
    result = doctor()
    assert result.exit_code == 1 and "plan.json" in result.output


def test_a_model_with_a_plan_is_accepted(planned):
    result = doctor("--model", str(toy.MODEL))
    assert result.exit_code == 0 and "accepted" in result.output, result.output


def test_a_model_without_a_plan_is_told_the_command(cache):
    result = doctor("--model", str(toy.MODEL))
    assert result.exit_code == 1 and "sdfp plan" in result.output


def test_without_vllm_it_says_so_and_goes_on(planned):
    """In a process where vLLM cannot be found."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'vllm' else find(name, *a); sys.modules['vllm'] = None\n"
        "from sdfp_vllm.cli.app import app; app(['doctor'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "Install one of vllm>=" in ended.stdout and "1.10x" in ended.stdout


@pytest.mark.parametrize("url", ["nonsense", "127.0.0.1:8000", "ftp://host", "http://"])
def test_a_wrong_address_is_refused(url):
    result = doctor(url)
    assert result.exit_code == 2 and "http://HOST:PORT" in result.output


def test_an_address_where_nothing_listens_is_refused():
    result = doctor(f"http://127.0.0.1:{free_port()}", "--seconds", "0.1")
    assert result.exit_code == 2 and "does not answer" in result.output


def test_healthy_traffic_gets_no_advice():
    assert HEALTHY.advice() == []


@pytest.mark.parametrize(
    "change, says",
    [
        ({"accepted": 99}, "--calibration"),
        ({"accepted": 124, "model": 0, "copied": 0}, "--calibration"),  # fixed lengths: nothing was copied
        ({"rounds": 0, "drafted": 0, "accepted": 0}, "Nothing was drafted"),
        ({"paused": 56}, "Most rounds drafted nothing"),
        ({"running": 8}, "batch is large"),
    ],
)
def test_poor_traffic_gets_one_advice(change, says):
    advice = replace(HEALTHY, **change).advice()
    assert len(advice) == 1 and says in advice[0]


def test_copies_that_were_wrong_do_not_speak_against_the_plan():
    assert replace(HEALTHY, accepted=101, drafted=400, copied=200).advice() == []


def test_figures_are_quotients_of_what_was_counted():
    rows = dict(HEALTHY.rows(seconds=10))
    assert rows["acceptance rate"] == "80%" and rows["tokens a round"] == "3.00"
    assert rows["draft tokens a round"] == "2.50" and rows["drafts that were copied"] == "23%"
    idle = Traffic(*[0.0] * 10)
    assert dict(idle.rows(1))["acceptance rate"] == "-"
