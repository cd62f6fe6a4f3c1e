"""`sdfp plan ID --revision REVISION`, in the process itself and on Ray's workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.store import default_plan_dir, load_plan
from sdfp_vllm.planner.ray_fisher import FisherWorker
from tests.support.hub import Hub, hub_of_this_process, running
from tests.unit.planner.test_job import SMALL, TEXT, save_tiny

ID = "someone/model"


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_planned_on_ray(model, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    (tmp_path / "text").write_text(TEXT * 600)
    hub = Hub()
    hub.push(ID, model, branch="v2")
    command = [sys.executable, "-m", "sdfp_vllm.cli.app", "plan", ID, "--revision", "v2"]
    command += [
        "--calibration",
        str(tmp_path / "text"),
        *SMALL,
        "--ray",
        "--address",
        "local",
        "--workers",
        "1",
    ]
    with running(hub) as url:
        own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
        own["SDFP_CACHE_DIR"] = str(tmp_path / "cache")
        made = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-4000:]
    assert f"vllm serve {ID} --revision v2 " in made.stdout
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    plan = load_plan(default_plan_dir(fingerprint(model)), fingerprint(model))
    assert (plan.model, plan.revision) == (ID, "v2")


def test_a_worker_loads_the_revision(model, tmp_path):
    with hub_of_this_process(tmp_path / "hub") as hub:
        commit = hub.push(ID, model, branch="v2")
        assert FisherWorker(ID, fingerprint(model), None, revision=commit).load() == "torch.float32"
        with pytest.raises(SdfpError, match="revision 'v9'"):
            FisherWorker(ID, fingerprint(model), None, revision="v9").load()
