"""`sdfp batch` on a local Ray cluster with a real engine: equal to plain vLLM, through deaths of engine and driver."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from engines import engine, write_plan

import sdfp_vllm.demo

pytest.importorskip("ray.data")
pytestmark = pytest.mark.engine

MODEL = Path(sdfp_vllm.demo.__file__).parent / "model"
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 8}
ENGINE |= {"distributed_executor_backend": "uni"}
ROWS = [{"id": f"row {i}", "prompt": f"def function_{i}(", "max_tokens": 8 + i % 5} for i in range(24)]


@pytest.fixture(scope="module")
def plain() -> list[str]:
    from vllm import SamplingParams

    with engine(MODEL) as llm:
        params = [SamplingParams(max_tokens=r["max_tokens"], temperature=0.0) for r in ROWS]
        return [o.outputs[0].text for o in llm.generate([r["prompt"] for r in ROWS], params, use_tqdm=False)]


def engines(driver: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_killed_engine_killed_driver_then_resumed(plain, tmp_path):
    plan = write_plan(MODEL, tmp_path / "plan", [0, 5, 15], k=3)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    partial = output.with_name("out.jsonl.partial")
    command = [
        sys.executable,
        "-m",
        "sdfp_vllm.cli",
        "batch",
        str(source),
        str(output),
        str(MODEL),
        "--plan",
        plan,
    ]
    command += ["--batch-size", "2", "--workers", "1", "--max-model-len", "512", "--address", "local"]
    command += ["--engine", json.dumps(ENGINE)]

    def answered() -> int:
        return max(partial.read_bytes().count(b"\n") - 1, 0) if partial.exists() else 0

    def wait_for(count: int) -> None:
        while answered() < count:
            assert driver.poll() is None, driver.stderr.read()
            time.sleep(0.01)

    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(2)
        (victim,) = engines(driver)
        victim.kill()
        wait_for(answered() + 4)  # of a new engine
        driver.kill()
        driver.wait()
    finally:
        driver.kill()
    done = answered()
    assert 6 <= done < len(ROWS) and not output.exists()

    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert f"Wrote {len(ROWS)} answers" in again.stdout
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["id"] for a in answers] == [r["id"] for r in ROWS]
    assert [a["text"] for a in answers] == plain
    assert {a["finish_reason"] for a in answers} <= {"length", "stop"}
    assert not partial.exists()
