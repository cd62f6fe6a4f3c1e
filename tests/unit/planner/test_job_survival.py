"""The offline job under what a machine does to it: killed at any moment, no room, no right to write."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.planner.job import make_plan
from tests.support.killed_jobs import OPTIONS
from tests.unit.planner.test_job import QUICK, TEXT, save_tiny

ROOT = Path(__file__).parents[3]
PARTIAL = ".fisher-partial.pt"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 600)
    return path


@pytest.fixture(scope="module")
def undisturbed(model, text, tmp_path_factory):
    return make_plan(str(model), calibration=str(text), out=tmp_path_factory.mktemp("plan"), **OPTIONS)


def test_killed_before_every_step_on_the_disk(model, text, undisturbed, tmp_path):
    """There is no plan or a whole one, the partial sums only grow, and the end is the undisturbed run's."""
    folder = tmp_path / "out"
    driver = [sys.executable, "-m", "tests.support.killed_jobs", model, text, folder]
    done = subprocess.run(driver, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *killed, survivor = json.loads(done.stdout.splitlines()[-1])
    assert len(killed) >= 4 and all(run["killed"] for run in killed)
    windows = [run["windows"] for run in killed if PARTIAL in run["files"]]
    assert windows == sorted(windows) and windows[0] == 8 and windows[-1] == OPTIONS["sequences"]
    # A plan appears in one step, and nothing of a run that died is taken for one.
    assert all(
        name == "plan.json" or name.startswith((".fisher-", ".plan-", ".writable"))
        for run in [*killed, survivor]
        for name in run["files"]
    )
    assert not killed[0]["files"] or "plan.json" not in killed[0]["files"]
    plan = load_plan(folder)
    assert plan.scores == undisturbed.scores and plan.view == undisturbed.view
    assert PARTIAL not in survivor["files"]


@pytest.mark.parametrize(
    ("room", "fails_at"), [(200, PARTIAL), (1200, "plan.json")], ids=["for nothing", "for the sums only"]
)
def test_no_room_ends_with_one_line_and_resume_goes_on(model, text, undisturbed, tmp_path, room, fails_at):
    """Files may grow to `room` bytes: the kernel writes a part, then refuses, as on a full disk."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "sdfp_vllm.cli.app", "plan", model, "--calibration", text, "-o", folder]
    command += ["--sequences", "24", "--length", "16", "--layers", "2", "--draft-tokens", "2"]
    command += ["--score-text", "corpus", *QUICK]
    done = subprocess.run(
        [str(part) for part in command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ") and "Traceback" not in done.stderr
    assert f"{folder / fails_at}: cannot be written (File too large)" in last and "Free space" in last
    assert [f.name for f in folder.iterdir()] == ([PARTIAL] if fails_at == "plan.json" else [])
    plan = make_plan(str(model), calibration=str(text), out=folder, resume=True, **OPTIONS)
    assert plan.scores == undisturbed.scores
    assert [f.name for f in folder.iterdir()] == ["plan.json"]


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """An empty folder that every user may reach (pytest's own are closed to others)."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextlib.contextmanager
def as_a_user_whom_rights_stop() -> Iterator[None]:
    root = os.geteuid() == 0  # root may write anywhere
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def readable(folder: Path) -> str:
    """A calibration text that every user may read."""
    text = folder / "text.txt"
    lines = (f"line {i} of a text that is long enough" for i in range(4000))
    text.write_text("\n".join(lines), encoding="utf-8-sig")  # loads the codec, which that user may not
    text.chmod(0o644)
    return str(text)


def test_read_only_folder_is_refused_before_the_model_is_loaded(open_to_all):
    model, folder = save_tiny(open_to_all / "model"), open_to_all / "plans"
    weights = model / "model.safetensors"
    weights.write_bytes(b"")  # loading it would fail otherwise
    weights.chmod(0o644)
    folder.mkdir(mode=0o555)
    text = readable(open_to_all)  # written while one still may
    for out in (folder, folder / "new"):
        with (
            as_a_user_whom_rights_stop(),
            pytest.raises(SdfpError, match=r"output folder .* cannot be written \(Permission denied\).* -o"),
        ):
            make_plan(str(model), calibration=text, out=out)
    assert not list(folder.iterdir())


def test_weights_that_may_not_be_read_are_named(open_to_all):
    model = save_tiny(open_to_all / "model")
    (model / "model.safetensors").chmod(0o200)
    text = readable(open_to_all)
    with (
        as_a_user_whom_rights_stop(),
        pytest.raises(SdfpError, match=r"model\.safetensors: cannot be read \(Permission denied\)"),
    ):
        make_plan(str(model), calibration=text, out=open_to_all / "plans")
