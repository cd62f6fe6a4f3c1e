"""What README and docs say can be followed: links lead somewhere, commands parse, make targets and settings exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
from typer.core import TyperGroup

from sdfp_vllm.cli.app import app
from sdfp_vllm.engine.config import SETTINGS

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
)
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
REFUSED = typer.BadParameter.__mro__[2]  # typer carries a click of its own
FENCED = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = page if not path else (page.parent / path)
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    assert not broken


def headings(page: Path) -> set[str]:
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


def commands(page: Path, name: str) -> list[list[str]]:
    """Command lines in a page's blocks that begin with `name`, comments and continuations joined."""
    lines = "\n".join(FENCED.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for part in re.split(r"&&|\|(?!\w)", line.split(" #")[0].strip()):
            if part.strip().startswith(f"{name} "):
                found.append(shlex.split(part))
    return found


def parsed(words: list[str]) -> None:
    """Parses an `sdfp` command line as the shell's would be, and runs nothing."""
    # A synopsis: [--option VALUE] may be left out, a|b|c is any of them.
    words = [re.sub(r"^[A-Z]$", "1", re.sub(r"^\[|\]$", "", w).split("|")[0]) for w in words]
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="sdfp")
    rest = words[1:]
    while isinstance(command, TyperGroup):
        _, command, rest = command.resolve_command(context, rest)
        context = command.context_class(command, info_name=command.name, parent=context)
    if rest != ["--help"]:
        command.parse_args(context, rest)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_sdfp_commands_parse(page):
    for words in commands(page, "sdfp"):
        if words[1:] in (["--version"], ["COMMAND", "--help"]):
            continue
        try:
            parsed(words)
        except REFUSED as e:
            pytest.fail(f"{shlex.join(words)}: {e.format_message()}")


def test_a_wrong_command_does_not_parse():
    with pytest.raises(REFUSED):
        parsed(["sdfp", "plan", "MODEL", "--no-such-option"])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(r"(?:`|^)make (?:DEVICE=\w+ )?([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert named <= targets


def test_every_setting_is_documented():
    page = (ROOT / "docs" / "use" / "settings.md").read_text(encoding="utf-8")
    assert not [s for s in SETTINGS - {"method"} if f"`{s}`" not in page]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=[*NAMES, "Makefile"])
def test_modules_that_are_to_be_run_exist(page):
    """`python -m benchmarks.x` names a file, or a package with a `__main__`."""
    for module in re.findall(
        r"(?:python|\$\(PY\)) -m ((?:benchmarks|examples|tests|sdfp_vllm)[\w.]*\w)", page.read_text()
    ):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
