"""The house: parts import only what lies below them, and every path that a text names is there."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# From the ground up; a part may import those before it.
PARTS = (
    "errors",
    "common",
    "pacing",
    "plan",
    "kernels",
    "engine.upstream",
    "engine.draft",
    "engine",
    "measure",
    "ray",
    "planner",
    "demo",
    "dipgo",
    "cli",
)
# Paths that exist only where something was run, or in a user's own tree.
MADE = ("benchmarks/results/",)


def modules() -> dict[str, Path]:
    found = {}
    for path in [*(ROOT / "sdfp_vllm").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "sdfp_vllm" else ("sdfp_vllm", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def part(module: str) -> str:
    inner = module.removeprefix("sdfp_vllm.")
    return max((p for p in PARTS if inner == p or inner.startswith(p + ".")), key=len)


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module
                for a in node.names
            }
    return {m for m in found if m in MODULES and m != "sdfp_vllm"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"sdfp_vllm"}))
def test_imports_go_down(module):
    mine = PARTS.index(part(module))
    assert not [m for m in imported(MODULES[module]) if PARTS.index(part(m)) > mine]


def test_dipgo_knows_only_common():
    for module, path in MODULES.items():
        if module != "sdfp_vllm" and part(module) == "dipgo":
            assert {part(m) for m in imported(path)} <= {"dipgo", "common", "errors"}, module


def test_no_module_imports_itself_in_a_circle():
    left = {m: imported(p) - {m} for m, p in MODULES.items()}
    while free := [m for m, needs in left.items() if not needs & left.keys()]:
        for m in free:
            del left[m]
    assert not left


def texts() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [
        f
        for f in listed.stdout.split()
        if f.endswith((".py", ".md", ".toml", ".yaml", "Makefile")) and not f.startswith(MADE)
    ]


def test_named_paths_exist():
    """`sdfp_vllm/...`, `kernels/...`, `tests/...`, `benchmarks/...`, `docs/...` in any text of the project."""
    named = re.compile(
        r"(?<![\w/.-])((?:sdfp_vllm|kernels|tests|benchmarks|docs|examples|packaging)/[\w/.-]*\w)"
    )
    missing = []
    for name in texts():
        for path in named.findall((ROOT / name).read_text(encoding="utf-8")):
            source = path.replace("sdfp_vllm/kernels", "kernels")  # installed under another name
            if not (ROOT / source).exists() and not path.startswith(MADE):
                missing.append((name, path))
    assert not missing


def documented(node: ast.ClassDef) -> set[str]:
    """Names in the `Attributes:` section of a class's docstring."""
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
    if not section:
        return set()
    lines = re.findall(r"^    (\w[\w, ]*):", section[1], re.MULTILINE)
    return {name.strip() for line in lines for name in line.split(",")}


def attributes(node: ast.ClassDef) -> set[str]:
    """Fields and properties of a class, and what its methods set on `self`."""
    found = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    for n in ast.walk(node):
        targets = (
            n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
        )
        for target in targets:
            for t in target.elts if isinstance(target, ast.Tuple) else [target]:
                found.add(t.id if isinstance(t, ast.Name) else t.attr if isinstance(t, ast.Attribute) else "")
    return found


def test_documented_attributes_exist():
    seen = 0
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = documented(node)
                seen += len(names)
                assert not names - attributes(node), f"{module}.{node.name}: {names - attributes(node)}"
    assert seen > 100


# Packages that are not always there: other projects' methods, and what only a GPU's or vLLM-Omni's machine has.
OPTIONAL = {"DeepCache", "arctic_inference", "cache_dit", "datasets", "triton", "vllm_omni"}


def test_every_import_leads_somewhere():
    lost = set()
    for name in (f for f in texts() if f.endswith(".py")):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for root in {m.split(".")[0] for m in modules} - OPTIONAL:
                if importlib.util.find_spec(root) is None:
                    lost.add((name, root))
    assert not lost
