"""`sdfp doctor` and the Grafana dashboard against real servers: one that drafts, one that does not."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.engine.metrics import COUNTERS
from sdfp_vllm.engine.serving_health import scrape
from sdfp_vllm.plan.fingerprint import fingerprint
from tests import toy
from tests.support import servers
from tests.support.engines import pacing_by_hand, write_plan

pytestmark = pytest.mark.engine

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"
FLAGS = ("--served-model-name", "demo", "--max-model-len", "512")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A server with a paced plan, its engine in another process than /metrics, and its log."""
    folder = tmp_path_factory.mktemp("served")
    kept = [0, fingerprint(toy.MODEL).num_layers - 1]
    plan = write_plan(toy.MODEL, folder / "plan", kept, k=3, pacing=pacing_by_hand())
    log = folder / "server.log"
    process, url = servers.start(
        log, toy.MODEL, *FLAGS, "--speculative-model", plan, env={"VLLM_LOGGING_LEVEL": "INFO"}
    )
    yield url, log
    servers.stop(process)


def ask(url: str, tokens: int = 200, **fields) -> None:
    body = {"model": "demo", "prompt": "import os\n\n\ndef main(", "max_tokens": tokens, "temperature": 0.0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body | {"ignore_eos": True} | fields).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).read()


def doctor(*words: str):
    return CliRunner().invoke(app, ["doctor", *words])


def watched(url: str, seconds: str = "6", **fields):
    """The doctor's answer while requests run."""
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(lambda: [ask(url, **fields) for _ in range(6)])
        result = doctor(url, "--seconds", seconds)
        asking.result()
    return result


def test_the_log_says_once_that_it_is_on(served):
    lines = [line for line in served[1].read_text().splitlines() if "SDFP is on:" in line]
    assert len(lines) == 1 and "INFO" in lines[0]
    assert "as the traffic pays" in lines[0] and "Drafts run 2 of" in lines[0]
    assert re.search(r"rounded copies and head rows take 0\.0 MB.*/plan expects 1\.10x", lines[0])


def test_counts_cross_the_processes_and_agree_with_vllms(served):
    url, _ = served
    before = scrape(url).samples
    ask(url)
    after = scrape(url).samples
    got = {name: after[f"sdfp:{name}_total"] - before[f"sdfp:{name}_total"] for name in COUNTERS}
    verified = (
        after["vllm:spec_decode_num_draft_tokens_total"] - before["vllm:spec_decode_num_draft_tokens_total"]
    )
    drafted = got["model_draft_tokens"] + got["copied_draft_tokens"]
    assert 0 < verified <= drafted
    assert got["rounds"] > got["paused_rounds"] and got["draft_milliseconds"] > 0


def test_the_doctor_sees_a_server_that_drafts(served):
    result = watched(served[0])
    assert "drafts paced by request" in result.output
    assert re.search(r"acceptance rate\W+\d+%", result.output), result.output
    assert re.search(r"tokens a round\W+\d+\.\d\d", result.output)
    assert result.exit_code == (1 if "Few drafts" in result.output or "Most rounds" in result.output else 0)


def test_the_doctor_says_when_nothing_is_drafted(served):
    result = watched(served[0], "3", vllm_xargs={"sdfp_draft": False})
    assert result.exit_code == 1 and "Nothing was drafted" in result.output


def test_an_idle_server_is_not_ill(served):
    result = doctor(served[0], "--seconds", "0.2")
    assert result.exit_code == 0 and "No tokens were generated" in result.output


def test_every_metric_of_the_dashboard_is_on_a_real_server(served):
    ask(served[0])
    known = set(scrape(served[0]).samples)
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    named = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm|sdfp):\w+", target["expr"])
    }
    assert {f"sdfp:{name}_total" for name in COUNTERS} <= named <= known
    model = dashboard["templating"]["list"][1]["query"]
    assert re.findall(r"sdfp:\w+", model)[0] in known


def test_the_doctor_sees_a_server_without_sdfp(tmp_path):
    process, url = servers.start(tmp_path / "log", toy.MODEL, *FLAGS)
    try:
        result = doctor(url, "--seconds", "0.2")
        assert result.exit_code == 1 and "drafts nothing, not SDFP" in result.output
        assert not [name for name in scrape(url).samples if name.startswith("sdfp:")]
    finally:
        servers.stop(process)
