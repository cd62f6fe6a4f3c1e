"""Where an engine takes a model from: a hub, another cache or revision, with a plan; and what is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.errors import PlanError, SdfpError
from tests.engine_v1.test_refusals import configure, model_folder, refused
from tests.support.engines import engine, tokens
from tests.support.hub import Hub, hub_of_this_process, running

pytestmark = pytest.mark.engine

ID = "someone/model"


@pytest.fixture(autouse=True)
def no_plans_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(target, tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "target", target)


@pytest.fixture(scope="module")
def repository(target, tmp_path_factory) -> Path:
    """The target as repositories hold it: other forms of its weights, and what training left."""
    folder = shutil.copytree(target, tmp_path_factory.mktemp("repository") / "model")
    for name in ("pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(b"something else")
    return folder


def test_a_fresh_node_serves_an_id_at_a_revision_from_a_cache_of_its_own(
    target, repository, plan, prompts, tmp_path
):
    hub = Hub()
    hub.push(ID, repository, branch="v2")
    hub.push(ID, model_folder(tmp_path / "main", target))  # no weights here: whoever looks at main fails
    some = [p[:32] for p in prompts[:4]]
    settings = {
        "model": ID,
        "prompts": some,
        "speculative_config": {"method": "sdfp", "model": plan},
        "revision": "v2",
        "download_dir": str(tmp_path / "weights"),
    }
    with running(hub) as url:
        there = subprocess.run(
            [sys.executable, "-m", "tests.support.fresh_node", json.dumps(settings)],
            env=os.environ
            | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
            | {
                "PYTHONPATH": os.pathsep.join(
                    [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""), *sys.path]
                )
            },
            capture_output=True,
            text=True,
        )
    assert there.returncode == 0, there.stderr[-4000:]
    told = json.loads(there.stdout.splitlines()[-1])
    assert told["drafted"] > 0
    assert hub.fetched.count("model.safetensors") == 1 and "pytorch_model.bin" not in hub.fetched
    with engine(repository) as llm:
        assert told["answers"] == tokens(llm, some)


# ---------------------------------------------------------------- refused by name
@pytest.mark.parametrize(
    ("flags", "where", "way_out"),
    [
        *(
            (["--load-format", name], "--load-format", "auto")
            for name in ("sharded_state", "tensorizer", "npcache", "pt", "ipc_cache", "PT", "of_a_plugin")
        ),
        (["--hf-config-path", "elsewhere"], "--hf-config-path", "Put a config.json"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else None,
)
def test_weights_from_elsewhere(model, target, plan, tmp_path, flags, where, way_out):
    if "elsewhere" in flags:
        flags = [flags[0], str(model_folder(tmp_path / "elsewhere", target))]
    error = refused(model, *flags, "--speculative-model", plan)
    assert error.where == where and way_out in error.way_out


def test_weights_in_an_object_store(model, plan):
    """What vLLM makes of a model named s3://..., once it has fetched the config to a folder."""
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "sdfp", "model": plan}
    args = EngineArgs(str(model), model_weights="s3://bucket/model", speculative_config=speculative)
    with pytest.raises(SdfpError, match=r"object store.*Copy it to a folder"):
        args.create_engine_config()


@pytest.mark.parametrize("name", ["auto", "hf", "safetensors", "fastsafetensors", "dummy", "SAFETENSORS"])
def test_load_formats_of_the_same_files_are_taken(target, plan, name):
    config = configure(target, "--load-format", name, "--speculative-model", plan)
    assert config.speculative_config.method == "sdfp"


def test_a_folder_with_other_files_beside_the_weights_is_the_same_model(repository, plan):
    assert configure(repository, "--speculative-model", plan).speculative_config.method == "sdfp"


# ---------------------------------------------------------------- the other commands
def test_every_command_looks_at_the_revision_and_prints_it(target, tmp_path):
    pytest.importorskip("ray")
    from sdfp_vllm.ray.serving import app as serving

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "import os"}\n')
    says = f"has no plan yet .*`sdfp plan {ID} --revision v2`"
    with hub_of_this_process(tmp_path / "hub") as hub:
        hub.push(ID, target, branch="v2")
        for command in (
            ["generate", ID, "--prompt", "import os", "--revision", "v2"],
            ["batch", rows, tmp_path / "out", ID, "--revision", "v2"],
            ["batch", rows, tmp_path / "out", ID, "--engine", '{"revision": "v2"}'],
        ):
            said = CliRunner().invoke(app, list(map(str, command)))
            assert said.exit_code == 2
            assert re.search(says, said.stderr), said.output
        with pytest.raises(PlanError, match=says):
            serving({"model": ID, "engine": {"revision": "v2"}})
        twice = ["batch", rows, tmp_path / "out", ID, "--revision", "v2", "--engine", '{"revision": "v2"}']
        assert "also given in --engine" in CliRunner().invoke(app, list(map(str, twice))).stderr
