"""FIT on a real local Ray cluster: the same bits as one process, through deaths of workers and driver."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.planner import ray_fisher
from sdfp_vllm.planner.fisher import fisher_sums
from sdfp_vllm.planner.fisher_sums import Checkpoint, FisherSums, OrderedSums, checkpoint_key
from sdfp_vllm.planner.ray_fisher import FisherJob, FisherWorker, ray_fisher_sums
from sdfp_vllm.planner.stack import DecoderStack, load_target
from sdfp_vllm.ray.cluster import RayOptions, layout, ray_cluster
from tests.support.tiny_models import tiny_ids
from tests.unit.planner.test_job import QUICK, TEXT, save_tiny

ray = pytest.importorskip("ray")
# Workers cannot import this file: its classes travel by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster("local", where="test", cpus=2):
        yield


@pytest.fixture(name="job")
def _job(model) -> FisherJob:
    return FisherJob(str(model), fingerprint(model), tiny_ids(5, 12), None, "test")


def one_process(job: FisherJob) -> FisherSums:
    return fisher_sums(DecoderStack(load_target(job.model)), job.ids)


def test_any_number_of_workers_gives_the_bits_of_one_process(cluster, job, tmp_path):
    expected = one_process(job)
    done = []
    for workers in (1, 2):
        sums = ray_fisher_sums(
            job,
            RayOptions(workers=workers),
            checkpoint=tmp_path / f"{workers}",
            advance=lambda count, title=None: done.append(count),
        )
        assert sums.sequences == 5 and torch.equal(sums.sums, expected.sums)
    assert sum(done) == 10


def test_a_model_placed_by_accelerate_gives_the_same_bits(job):
    """Without GPUs, `auto` places every layer on the CPU: the code path, not the transfers."""
    stack = DecoderStack(load_target(job.model, device="auto"))
    assert torch.equal(fisher_sums(stack, job.ids).sums, one_process(job).sums)


def test_windows_are_added_in_their_own_order_whoever_finishes_first():
    generator = torch.Generator().manual_seed(0)
    windows = [
        FisherSums(1, torch.rand(4, 2, 2, dtype=torch.float64, generator=generator) * 10**i) for i in range(6)
    ]
    expected = FisherSums.zero(4)
    for w in windows:
        expected = expected.merge(w)
    backwards = FisherSums.zero(4)
    for w in reversed(windows):
        backwards = backwards.merge(w)
    assert not torch.equal(backwards.sums, expected.sums), "the example is too tame to tell orders apart"
    sums = OrderedSums(FisherSums.zero(4))
    for i in (5, 0, 3, 1, 3, 4, 0):
        sums.add(i, windows[i])
    assert sums.finished == 5 and sums.missing(6) == [2] and sums.total.sequences == 2
    sums.add(2, windows[2])
    assert sums.missing(6) == [] and torch.equal(sums.total.sums, expected.sums)


class _MortalWorker(FisherWorker):
    """Killed, as by the kernel when memory runs out, the first time one is given a window."""

    def window(self, ids):
        mark = Path(self._model) / "died"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().window(ids)


def test_the_shard_of_a_killed_worker_is_done_by_another(cluster, job, model, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_fisher, "FisherWorker", _MortalWorker)
    sums = ray_fisher_sums(job, RayOptions(workers=1), checkpoint=tmp_path / "sums")
    assert (model / "died").exists()
    assert torch.equal(sums.sums, one_process(job).sums)


class _DoomedWorker(FisherWorker):
    def load(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_keep_dying_are_reported(cluster, job, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_fisher, "FisherWorker", _DoomedWorker)
    with pytest.raises(SdfpError, match="3 workers in turn died at loading the model"):
        ray_fisher_sums(job, RayOptions(workers=1), checkpoint=tmp_path / "sums")


def test_resume_takes_what_is_finished_in_and_out_of_order(cluster, job, tmp_path):
    stack = DecoderStack(load_target(job.model))
    first, fourth = (fisher_sums(stack, job.ids[i : i + 1]) for i in (0, 3))
    key = checkpoint_key(job.ids, stack.num_layers, "torch.float32", job.identity)
    Checkpoint(tmp_path / "sums", key).save(first, {3: fourth})
    done = []
    sums = ray_fisher_sums(
        job,
        RayOptions(workers=1),
        checkpoint=tmp_path / "sums",
        resume=True,
        advance=lambda count, title=None: done.append(count),
    )
    assert [n for n in done if n] == [2, 1, 1, 1]
    assert torch.equal(sums.sums, one_process(job).sums)


def test_a_killed_driver_resumes_with_or_without_ray(model, tmp_path, monkeypatch):
    """SIGKILL to a real `sdfp plan --ray`; one process goes on from its shards and gets the same scores."""
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT * 600)
    out, partial = tmp_path / "out", tmp_path / "out" / ".fisher-partial.pt"
    job = [str(model), "--calibration", str(text), "--sequences", "400", "--length", "16", "--layers", "2"]
    job += ["--draft-tokens", "2", "--score-text", "corpus", *QUICK]
    driver = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sdfp_vllm.cli.app",
            "plan",
            *job,
            "-o",
            str(out),
            "--ray",
            "--address",
            "local",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while driver.poll() is None and not partial.exists():
        time.sleep(0.01)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, driver.stderr.read()
    assert not (out / "plan.json").exists()
    monkeypatch.setenv("COLUMNS", "200")
    for folder, flags in ((out, ["--resume"]), (tmp_path / "fresh", [])):
        result = CliRunner().invoke(app, ["plan", *job, "-o", str(folder), *flags])
        assert result.exit_code == 0, result.output
    assert load_plan(out).scores == load_plan(tmp_path / "fresh").scores


def test_what_a_worker_refuses_reaches_the_user(cluster, job, tmp_path):
    elsewhere = replace(job, model="/nowhere/model")
    with pytest.raises(SdfpError, match=r"worker on .*: model '/nowhere/model'.*every node"):
        ray_fisher_sums(elsewhere, RayOptions(workers=1), checkpoint=tmp_path / "sums")


def test_a_worker_takes_only_the_same_model(job):
    other = job.target.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(SdfpError, match="not the same there: sha256 is"):
        FisherWorker(job.model, other, None).load()


def test_refusals_before_anything_is_started(model, tmp_path, monkeypatch):
    ray.shutdown()
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT * 100)
    plan = ["plan", str(model), "--calibration", str(text), "-o", str(tmp_path / "out")]

    def refusal(*flags: str) -> str:
        result = CliRunner().invoke(app, [*plan, *flags])
        assert result.exit_code == 2, result.output
        return result.stderr.splitlines()[-1]

    assert "Add --ray" in refusal("--workers", "2")
    assert "not a cluster's address" in refusal("--ray", "--address", "somewhere")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, not listening: refuses connections
        assert "no Ray cluster can be reached" in refusal(
            "--ray", "--address", f"127.0.0.1:{s.getsockname()[1]}"
        )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "sdfp-vllm[ray]"' in refusal("--ray")


def node(**resources: float) -> dict:
    return {"Alive": True, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([node(CPU=8)], {}, (1, {"num_cpus": 8})),
        ([node(CPU=8), node(CPU=8), node()], {}, (2, {"num_cpus": 8})),
        ([node(CPU=8), node(CPU=4)], {"workers": 3}, (3, {"num_cpus": 4})),
        ([node(CPU=2)], {"workers": 4}, (4, {"num_cpus": 1})),
        ([node(CPU=8, GPU=4), node(CPU=8, GPU=2)], {}, (6, {"num_gpus": 1, "num_cpus": 1})),
        (
            [node(CPU=8, GPU=4), node(CPU=8, GPU=3)],
            {"gpus_per_worker": 2},
            (3, {"num_gpus": 2, "num_cpus": 1}),
        ),
        ([node(CPU=2), {"Alive": False, "Resources": {"CPU": 64}}], {}, (1, {"num_cpus": 2})),
    ],
)
def test_layout_of_workers(nodes, options, expected):
    assert layout(nodes, RayOptions(**options)) == expected


def test_more_gpus_than_a_node_has_are_refused():
    with pytest.raises(SdfpError, match="largest node has 2"):
        layout([node(CPU=8, GPU=2)], RayOptions(gpus_per_worker=4))
