"""What `sdfp plan` refuses at its start: nothing is loaded, nothing is asked, one line says what and the way out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OlmoConfig, OlmoForCausalLM
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.families import FAMILIES, Family
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.planner import job
from sdfp_vllm.planner.admission import admit
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.stack import load_target
from tests.support.tiny_models import ALL_ARCHITECTURES, IN_ENGINE, tiny_model
from tests.unit.planner.test_job import QUICK, save_tiny

DOCS = Path(__file__).parents[3] / "docs" / "use"


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(name="copied")
def _copied(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture(name="refusal")
def _refusal(tmp_path, monkeypatch):
    """What a command says that has to end before it loads a model, in a line."""
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(job, "load_target", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question was asked"))

    def refusal(*arguments) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    return refusal


def _change(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# ---------------------------------------------------------------- families
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_every_family_on_the_list_is_taken(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path)
    admit(tmp_path, PlanOptions())
    assert fingerprint(tmp_path).architecture in FAMILIES


def test_the_list_is_what_is_tried_here():
    names = {type(tiny_model(a)).__name__ for a in ALL_ARCHITECTURES}
    assert names == set(FAMILIES)


def test_the_documented_families_are_those_of_the_list():
    page = (DOCS / "compatibility.md").read_text()
    rows = re.findall(
        r"^\| ([^|]+) \| `(\w+)`(?: \*)? \| ([^|]+) \| (yes|no) \| (yes|no) \|$", page, re.MULTILINE
    )
    calls = {"one by one": "layers", "own forward": "forward"}
    read = {a: Family(name, calls[call], branches == "yes") for name, a, call, branches, _ in rows}
    assert read == FAMILIES
    assert all((bridges == "yes") == (FAMILIES[a].call == "layers") for _, a, _, _, bridges in rows)
    assert {a for _, a in re.findall(r"^\| ([^|]+) \| `(\w+)` \* \|", page, re.MULTILINE)} == {
        type(tiny_model(a)).__name__ for a in IN_ENGINE
    }


def test_other_layers_are_refused_by_name(model, copied, refusal):
    shape = dict(vocab_size=300, num_hidden_layers=2, num_attention_heads=2, hidden_size=16)
    for other in (
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2)),
        OlmoForCausalLM(OlmoConfig(**shape, intermediate_size=16, pad_token_id=0)),
    ):
        other.save_pretrained(copied)
        said = refusal("plan", copied, *QUICK)
        assert type(other).__name__ in said and "docs/use/compatibility.md" in said


def test_an_untried_architecture_is_refused_unless_asked_for_anyway(copied, refusal):
    _change(copied, architectures=["HomemadeForCausalLM"])
    said = refusal("plan", copied, *QUICK)
    assert "HomemadeForCausalLM" in said and "--anyway" in said
    admit(copied, PlanOptions(anyway=True))


def test_bridges_are_refused_where_the_engine_has_no_place_for_them(tmp_path):
    tiny_model("granite").save_pretrained(tmp_path)
    with pytest.raises(SdfpError, match=r"--bridge affine: .*Granite"):
        admit(tmp_path, PlanOptions(bridge="affine"))


# ---------------------------------------------------------------- quantised weights
@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        *(
            ("config.json", {"quantization_config": {"quant_method": method}}, method)
            for method in ("gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes", "mxfp4", "modelopt")
        ),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ("config.json", {"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "quantize_config.json"),
        ("quant_config.json", {"w_bit": 4, "version": "GEMM"}, "quant_config.json"),
    ],
)
def test_quantised_checkpoints_are_refused_by_name(copied, refusal, file, content, named):
    if file == "config.json":
        _change(copied, **content)
        if "text_config" in content:
            _change(copied, text_config=json.loads((copied / file).read_text()) | content["text_config"])
    else:
        (copied / file).write_text(json.dumps(content))
    said = refusal("plan", copied, *QUICK)
    assert "quantised weights" in said and named in said and "--precision int8" in said


@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_gguf_is_refused_by_name(copied, refusal, config):
    (copied / "model.safetensors").unlink()
    (copied / "weights-Q4_K_M.gguf").write_bytes(b"GGUF")
    if not config:
        (copied / "config.json").unlink()
    assert "GGUF" in refusal("plan", copied, *QUICK)


def test_weights_of_another_kind_are_refused_where_no_file_says_so(tmp_path):
    """Of the loaded model, since a file may say nothing: integers have no gradients."""
    from safetensors.torch import load_file, save_file

    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _change(tmp_path, dtype="float8_e4m3fn")
    with pytest.raises(SdfpError, match=r"quantised weights|cannot be loaded"):
        load_target(tmp_path)


# ---------------------------------------------------------------- code that comes with a model
_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
open({ran!r}, "w").close()

class HomemadeConfig(LlamaConfig):
    model_type = "homemade"

class HomemadeForCausalLM(LlamaForCausalLM):
    config_class = HomemadeConfig

class HomemadeTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(name="homemade")
def _homemade(copied, tmp_path, monkeypatch) -> Path:
    """A model that only its own code can load; running it leaves a file "ran" beside the folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copied / "homemade.py").write_text(_CODE.format(ran=str(tmp_path / "ran")))
    auto = {"AutoConfig": "homemade.HomemadeConfig", "AutoModelForCausalLM": "homemade.HomemadeForCausalLM"}
    _change(copied, model_type="homemade", architectures=["HomemadeForCausalLM"], auto_map=auto)
    return copied


def test_code_that_comes_with_a_model_is_run_only_when_trusted(homemade, refusal, tmp_path):
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"prompt": "a"}\n')
    for command in (
        ("plan", homemade, *QUICK),
        ("generate", homemade, "--prompt", "a", "--plan", tmp_path),
        ("batch", requests, tmp_path / "out.jsonl", homemade),
    ):
        said = refusal(*command)
        assert "code of its own" in said and "--trust-remote-code" in said
    assert not (tmp_path / "ran").exists()
    admit(homemade, PlanOptions(trust_remote_code=True, anyway=True))
    assert (tmp_path / "ran").exists()
    assert type(load_target(homemade, trust_remote_code=True)).__name__ == "HomemadeForCausalLM"


def test_so_is_code_that_comes_with_a_tokenizer(copied, refusal, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copied / "homemade.py").write_text(_CODE.format(ran=str(tmp_path / "ran")))
    file = copied / "tokenizer_config.json"
    changes = {
        "tokenizer_class": "HomemadeTokenizer",
        "auto_map": {"AutoTokenizer": [None, "homemade.HomemadeTokenizer"]},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert "--trust-remote-code" in refusal("plan", copied, *QUICK)
    assert not (tmp_path / "ran").exists()
