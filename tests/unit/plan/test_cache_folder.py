"""The per-user folder of plans, also for a container's users, who have no home folder or somebody else's."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.store import find_plan, plans_root
from tests import toy
from tests.support.engines import write_plan

MODEL = toy.MODEL
VARIABLES = ("SDFP_CACHE_DIR", "XDG_CACHE_HOME", "HOME")


@pytest.fixture(autouse=True)
def _no_home(monkeypatch):
    """A user whose number no file of users knows, without HOME."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"SDFP_CACHE_DIR": "/cache"}, "/cache/plans"),
        ({"SDFP_CACHE_DIR": "~/cache", "HOME": "/home/u"}, "/home/u/cache/plans"),
        ({"XDG_CACHE_HOME": "~/x", "HOME": "/home/u"}, "/home/u/x/sdfp/plans"),
        ({"SDFP_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/home/u"}, "/home/u/.cache/sdfp/plans"),
        ({"HOME": "/"}, "/.cache/sdfp/plans"),
    ],
)
def test_where_plans_lie(monkeypatch, settings, folder):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert plans_root() == Path(folder)


@pytest.mark.parametrize(
    "settings", [{}, {"SDFP_CACHE_DIR": "~/cache"}, {"SDFP_CACHE_DIR": "~nobody-of-that-name/x"}]
)
def test_without_a_home_folder_the_variable_is_named(monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SdfpError, match=r"^cache folder ~.*Set SDFP_CACHE_DIR"):
        find_plan(str(MODEL))


@pytest.mark.parametrize(
    "command",
    [
        ["plan", MODEL],
        ["show", MODEL],
        ["generate", MODEL, "--prompt", "x"],
        ["batch", "in.jsonl", "out.jsonl", MODEL],
    ],
    ids=lambda c: c[0],
)
def test_every_command_says_it_in_a_line(command):
    result = CliRunner().invoke(app, [str(c) for c in command])
    assert result.exit_code == 2, result.output
    assert "SDFP_CACHE_DIR" in result.stderr and result.stderr.count("\n") == 1


def test_a_plan_that_is_named_needs_no_home_folder(tmp_path):
    folder = write_plan(MODEL, tmp_path, [0, 5, 15], k=3)
    assert find_plan(str(MODEL), folder).plan.num_speculative_tokens == 3
    shown = CliRunner().invoke(app, ["show", folder])
    assert shown.exit_code == 0, shown.output


def test_a_folder_into_which_the_user_may_not_look_is_named(monkeypatch):
    monkeypatch.setenv(
        "HOME", "/" + "x" * 300
    )  # refused by the system to root as well, unlike /root to others
    with pytest.raises(SdfpError, match="Set SDFP_CACHE_DIR"):
        plans_root()
