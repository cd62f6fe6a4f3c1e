"""docs/reference/upstream.md lists what the code imports, and vLLM and vLLM-Omni are imported nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "sdfp_vllm"


def vllm_imports(path: Path, package: str = "vllm") -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            found += [(node.module or "", a.name) for a in node.names]
        elif isinstance(node, ast.Import):
            found += [(a.name, a.name) for a in node.names if a.name.split(".")[0] == package]
    return found


def test_internals_are_imported_in_the_engine_package_only():
    for path in PACKAGE.rglob("*.py"):
        if "engine" in path.parts:
            continue
        for module, name in vllm_imports(path):
            # The public interface (LLM, SamplingParams, the version, documented settings) may be used anywhere.
            assert module in ("vllm", "vllm.envs"), f"{path}: {module}.{name}"


def test_every_symbol_is_on_the_page():
    page = (ROOT / "docs" / "reference" / "upstream.md").read_text()
    for path in (PACKAGE / "engine").rglob("*.py"):
        for module, name in vllm_imports(path):
            if module == "vllm":
                continue  # its public interface
            shown = name if name[0] != "_" and name != module else module
            assert f"`{shown}`" in page or shown in page, (
                f"{shown} ({path.name}) is not in docs/reference/upstream.md"
            )


def test_vllm_omni_is_touched_in_its_package_only_and_what_is_touched_is_on_the_page():
    page = (ROOT / "docs" / "reference" / "upstream.md").read_text().split("## vLLM-Omni")[1]
    for path in PACKAGE.rglob("*.py"):
        here = path.parent.name == "omni"
        for module, name in vllm_imports(path, "vllm_omni"):
            assert here, f"{path}: {module}.{name}"
            assert f"`{name}`" in page and f"`{module}`" in page, (
                f"{module}.{name} is not in docs/reference/upstream.md"
            )
        # Modules that are imported by their name in a string, to be patched.
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and str(node.value).startswith("vllm_omni."):
                assert here and f"`{node.value}`" in page, (
                    f"{node.value} ({path.name}) is not in docs/reference/upstream.md"
                )


def test_transformers_imports_from_the_repository_root():
    """A top-level package named `kernels` here would shadow the one transformers probes for."""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", "import transformers, sdfp_vllm"], cwd=ROOT, check=True)
