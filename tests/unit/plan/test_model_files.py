"""A model is what the engine loads: which files those are, and that an id leads to all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.errors import PlanError, SdfpError
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.model_files import INDEX, resolve_model_dir, weight_files
from sdfp_vllm.plan.show import serve_command
from sdfp_vllm.plan.store import default_plan_dir, find_plan, save_plan
from tests.support.hub import Hub, hub_of_this_process
from tests.support.plans import write_model
from tests.support.tiny_models import tiny_config
from tests.unit.cli.test_cli import make

ID = "someone/model"


@pytest.fixture(name="hub")
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "plans"))
    with hub_of_this_process(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(name="model")
def _model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def index(folder: Path, *names: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}}))


# ---------------------------------------------------------------- which files
@pytest.mark.parametrize(
    "beside",
    [
        "training_args.bin",
        "step-100-optimizer.bin",
        "pytorch_model.bin",
        "scheduler.pt",
        "model.pt",
        "consolidated.safetensors",
        "consolidated.00.safetensors",
        "original/consolidated.safetensors",
        "onnx/model.safetensors",
        "model.gguf",
        "README.md",
    ],
)
def test_what_the_engine_does_not_load_is_no_part_of_the_model(model, beside):
    alone = fingerprint(model)
    (model / beside).parent.mkdir(exist_ok=True)
    (model / beside).write_bytes(b"something else")
    assert fingerprint(model) == alone


@pytest.mark.parametrize(
    ("names", "loaded"),
    [
        (["model.safetensors", "extra.safetensors", "pytorch_model.bin"], ["extra.safetensors", "model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "model.pt"], ["pytorch_model.bin"]),
        (["model.pt", "optimizer.pt"], ["model.pt"]),
        (["consolidated.safetensors", "pytorch_model.bin"], ["consolidated.safetensors"]),
        (["training_args.bin", "model.gguf"], []),
    ],
)  # fmt: skip
def test_one_form_of_weights_is_loaded(tmp_path, names, loaded):
    for name in names:
        (tmp_path / name).touch()
    assert [f.name for f in weight_files(tmp_path)] == loaded


def test_an_index_says_which_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "old.safetensors"):
        (tmp_path / name).touch()
    index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    assert [f.name for f in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(SdfpError, match=r"a\.safetensors: is not there, though .*index\.json names it"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"w": 1, "v": "x"}}']
)
def test_a_damaged_index_is_named(model, content):
    (model / INDEX).write_text(content)
    with pytest.raises(SdfpError, match=r"index\.json: cannot be read"):
        fingerprint(model)


def test_the_files_chosen_are_the_ones_that_vllm_chooses(tmp_path):
    """On every mix of files, vLLM's default loader with `--load-format hf`, which knows no form of Mistral's own."""
    from itertools import combinations

    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig(load_format="hf"))
    names = ["model.safetensors", "a.safetensors", INDEX, "pytorch_model.bin", "training_args.bin", "model.pt", "scaler.pt"]  # fmt: skip
    compared = 0
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            if INDEX in chosen and "model.safetensors" not in chosen:
                continue  # an index of what is not there: both refuse
            folder = tmp_path / str(compared)
            folder.mkdir()
            for name in chosen:
                (folder / name).touch()
            if INDEX in chosen:
                index(folder, "model.safetensors")
            try:
                theirs = sorted(loader._prepare_weights(str(folder), None, None, True, None)[1])
            except RuntimeError:
                theirs = []
            if theirs or {"training_args.bin", "scaler.pt"}.isdisjoint(chosen):
                assert list(map(str, weight_files(folder))) == theirs, chosen
            compared += 1
    assert compared > 60


# ---------------------------------------------------------------- ids
def test_an_id_of_which_only_the_config_is_cached_is_fetched_whole(hub, model):
    """What every fresh node has when the plan is looked for: vLLM reads the config first."""
    (model / "tokenizer.json").write_text("{}")
    (model / "merges.txt").write_text("")
    hub.push(ID, model)
    hf_hub_download(ID, "config.json")
    folder = resolve_model_dir(ID)
    assert {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"} <= {
        f.name for f in folder.iterdir()
    }
    assert fingerprint(folder) == fingerprint(model)
    save_plan(make(fingerprint=fingerprint(model)), default_plan_dir(fingerprint(model)))
    assert find_plan(ID).plan.fingerprint == fingerprint(model)


def test_one_form_of_weights_is_fetched(hub, model):
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "training_args.bin",
        "onnx/model.safetensors",
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"large")
    hub.push(ID, model)
    assert fingerprint(resolve_model_dir(ID)) == fingerprint(model)
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
    resolve_model_dir(ID)
    assert len(hub.fetched) == 2  # nothing twice


def test_shards_are_fetched_by_the_index(hub, model):
    shutil.copy(model / "model.safetensors", model / "a.safetensors")
    (model / "old.safetensors").write_bytes(b"large")
    index(model, "a.safetensors", "model.safetensors")
    hub.push(ID, model)
    assert fingerprint(resolve_model_dir(ID)) == fingerprint(model)
    assert "old.safetensors" not in hub.fetched


def test_what_can_be_refused_is_refused_before_weights_are_fetched(hub, model):
    tiny_config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(model)
    hub.push(ID, model)
    refused = CliRunner().invoke(app, ["plan", ID, "--layers", "99"])
    assert refused.exit_code == 2 and "layers" in refused.stderr, refused.output
    assert "config.json" in hub.fetched and "model.safetensors" not in hub.fetched


def test_an_id_follows_its_branch(hub, model):
    """As the engine does; a cache that is behind would make the plan of a model that is no longer served."""
    hub.push(ID, model)
    old = fingerprint(resolve_model_dir(ID))
    hub.push(ID, write_model(model, weights=b"weightz"))
    assert fingerprint(resolve_model_dir(ID)) == fingerprint(model) != old


def test_without_the_hub_the_cache_does_if_it_is_whole(hub, model, monkeypatch):
    hub.push(ID, model)
    folder = resolve_model_dir(ID)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert resolve_model_dir(ID) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model_dir(ID) == resolve_model_dir(ID, fetch=False) == folder
    (folder / "model.safetensors").unlink()
    for name in (ID, str(folder)):  # offline, vLLM makes the one of the other
        with pytest.raises(SdfpError, match=rf"model '{name}': has no weights in .*`hf download`"):
            resolve_model_dir(name)
    (folder / "config.json").unlink()
    with pytest.raises(SdfpError, match=r"has no config\.json and no weights in"):
        resolve_model_dir(ID)


def test_a_shard_that_never_came_is_named(hub, model, monkeypatch):
    index(model, "a.safetensors", "b.safetensors")
    (model / "model.safetensors").rename(model / "a.safetensors")
    hub.push(ID, model)
    with pytest.raises(SdfpError, match=r"has no b\.safetensors in"):
        resolve_model_dir(ID)


def test_show_looks_into_the_cache_alone(hub, model):
    hub.push(ID, model)
    shown = CliRunner().invoke(app, ["show", ID])
    assert shown.exit_code == 2 and "neither a plan nor a model" in shown.stderr and not hub.fetched
    save_plan(make(fingerprint=fingerprint(model)), default_plan_dir(fingerprint(model)))
    resolve_model_dir(ID)
    assert CliRunner().invoke(app, ["show", ID]).exit_code == 0
    hub.push(ID, model, branch="v2")
    assert CliRunner().invoke(app, ["show", ID, "--revision", "v2"]).exit_code == 2  # not in the cache
    resolve_model_dir(ID, "v2")
    assert CliRunner().invoke(app, ["show", ID, "--revision", "v2"]).exit_code == 0


def test_a_cache_of_its_own(hub, model, tmp_path):
    hub.push(ID, model)
    snapshot_download(ID, cache_dir=tmp_path / "other", allow_patterns="model.safetensors")
    hub.fetched.clear()
    folder = resolve_model_dir(ID, download_dir=str(tmp_path / "other"))
    assert folder.is_relative_to(tmp_path / "other") and fingerprint(folder) == fingerprint(model)
    assert hub.fetched == ["config.json"] and not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- revisions
def test_a_refusal_names_the_revision_and_the_cache_that_were_looked_at(hub, model, tmp_path):
    hub.push(ID, model, branch="v2")
    with pytest.raises(PlanError, match=rf"has no plan yet .*`sdfp plan {ID} --revision v2`"):
        find_plan(ID, revision="v2")
    other = save_plan(make(), tmp_path / "plan")
    with pytest.raises(PlanError, match=r"made for another model: .*`sdfp plan MODEL --revision v2`"):
        find_plan(ID, other, revision="v2")
    cache = tmp_path / "other"
    with pytest.raises(PlanError, match=rf"`HF_HUB_CACHE={cache} sdfp plan {ID} --revision v2`"):
        find_plan(ID, revision="v2", download_dir=str(cache))


def test_no_revision_is_named_where_none_was_asked_for(hub, model):
    from huggingface_hub import HfApi

    hub.push(ID, model)
    resolved = HfApi().resolve_revision(ID)  # what vLLM hands on
    assert resolved == "main"
    with pytest.raises(PlanError, match=rf"`sdfp plan {ID}`"):
        find_plan(ID, revision=resolved)


def test_a_revision_that_is_not_there_is_named(hub, model):
    hub.push(ID, model)
    with pytest.raises(SdfpError, match=rf"model '{ID}' at revision 'v9': .*RevisionNotFoundError"):
        resolve_model_dir(ID, "v9")


def test_the_command_to_serve_with_names_the_revision(tmp_path):
    plan = make(model=ID, revision="v2")
    assert serve_command(plan, tmp_path).startswith(f"vllm serve {ID} --revision v2 ")
    assert serve_command(make(model=ID), tmp_path).startswith(f"vllm serve {ID} --spec")


# ---------------------------------------------------------------- from elsewhere
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s3://bucket/model", "object store"),
        ("gs://bucket/model", "object store"),
        ("az://store/model", "object store"),
        ("someone/model-GGUF:Q4_K_M", "GGUF"),
        ("nowhere/model.gguf", "GGUF"),
        ("nowhere/at/all", "neither a folder nor"),
        ("nobody/model", "RepositoryNotFoundError"),
    ],
)
def test_other_places_are_refused_by_name(hub, name, says):
    with pytest.raises(SdfpError, match=says) as caught:
        resolve_model_dir(name)
    assert repr(name) in caught.value.where and "\n" not in str(caught.value) and not hub.fetched


def test_modelscope_is_refused_by_name_and_a_folder_is_taken(hub, model, monkeypatch):
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "true")
    with pytest.raises(SdfpError, match="VLLM_USE_MODELSCOPE"):
        resolve_model_dir(ID)
    assert resolve_model_dir(str(model)) == model


def test_a_file_is_no_model(model):
    with pytest.raises(SdfpError, match=r"is a file\..*Give the folder"):
        resolve_model_dir(str(model / "model.safetensors"))
