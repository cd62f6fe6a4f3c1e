"""A user installs a wheel, not a checkout: built, put into an environment of its own, and used away from the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from sdfp_vllm import __version__
from tests import toy
from tests.support import servers

pytestmark = [pytest.mark.engine, pytest.mark.more]

ROOT = Path(__file__).parents[2]
MOST_BYTES = 1 << 20  # code and two dozen questions


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside the sources
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "out", "build", "*.egg-info")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel; vLLM and the rest are those that the tests run with."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    where = subprocess.run(
        [str(python), "-c", "import sdfp_vllm; print(sdfp_vllm.__file__)"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert where.stdout.startswith(str(site)), "the checkout would be tested"
    return python


def run(python: Path, *words: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(python), "-m", "sdfp_vllm.cli.app", *words],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_it_holds_the_package_and_no_toy(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "sdfp_vllm/demo/questions.jsonl" in names and "sdfp_vllm/kernels/draft_step.py" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/")) or "toy" in n]
    assert wheel.stat().st_size < MOST_BYTES


def test_it_says_its_version(python, tmp_path):
    assert run(python, "--version", cwd=tmp_path).strip() == f"sdfp-vllm {__version__}"


def test_it_plans_and_serves(python, tmp_path):
    shutil.copytree(toy.MODEL, tmp_path / "model")
    env = {"SDFP_CACHE_DIR": str(tmp_path / "cache")}
    few = (
        "--sequences",
        "2",
        "--length",
        "64",
        "--no-check",
        "--anyway",
        "--dtype",
        "float32",
        "--precision",
        "full",
    )
    assert "Plan:" in run(python, "plan", "model", *few, cwd=tmp_path, **env)
    vllm = (str(python), "-m", "vllm.entrypoints.cli.main")
    flags = ("--speculative-model", "sdfp", "--max-model-len", "256")
    env |= {"VLLM_LOGGING_LEVEL": "INFO"}
    log = tmp_path / "log"
    server, url = servers.start(log, "model", *flags, vllm=vllm, env=env, cwd=tmp_path)
    try:
        body = b'{"model": "model", "prompt": "def main(", "max_tokens": 8, "temperature": 0}'
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        assert b'"text"' in urllib.request.urlopen(request).read()
        assert "SDFP is on" in log.read_text()
    finally:
        servers.stop(server)
