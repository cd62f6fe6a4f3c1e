"""`sdfp batch` on a local Ray cluster with a real engine: equal to plain vLLM, through deaths of engine and driver."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil
import pytest

from sdfp_vllm.plan.store import load_parcel
from sdfp_vllm.ray.batch.engine import BROKEN, BatchEngine
from tests import toy
from tests.support.engines import engine, write_plan

pytest.importorskip("ray.data")
pytestmark = pytest.mark.engine

MODEL = toy.MODEL
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 8}
ENGINE |= {"distributed_executor_backend": "uni"}
ROWS = [{"id": f"row {i}", "prompt": f"def function_{i}(", "max_tokens": 8 + i % 5} for i in range(24)]


@pytest.fixture(scope="module")
def plain() -> list[str]:
    from vllm import SamplingParams

    with engine(MODEL) as llm:
        params = [SamplingParams(max_tokens=r["max_tokens"], temperature=0.0) for r in ROWS]
        return [o.outputs[0].text for o in llm.generate([r["prompt"] for r in ROWS], params, use_tqdm=False)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> str:
    return write_plan(MODEL, tmp_path_factory.mktemp("plan"), [0, 5, 15], k=3)


def engines(driver: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.more
def test_killed_engine_killed_driver_then_resumed(plain, plan, tmp_path):
    """A row that has no answer yet is mended in between."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    partial = output.with_name("out.jsonl.partial")
    command = [
        sys.executable,
        "-m",
        "sdfp_vllm.cli.app",
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

    have = {
        json.loads(line)["id"] for line in partial.read_bytes().splitlines(True)[1:] if line.endswith(b"\n")
    }
    mended = next(i for i, row in reversed(list(enumerate(ROWS))) if row["id"] not in have)
    rows = [row | {"max_tokens": 3} if i == mended else row for i, row in enumerate(ROWS)]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))

    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert f"Wrote {len(ROWS)} answers" in again.stdout
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["id"] for a in answers] == [r["id"] for r in ROWS]
    assert answers[mended]["completion_tokens"] == 3
    assert plain[mended].startswith(answers[mended].pop("text"))
    assert [a.get("text", plain[mended]) for a in answers] == plain
    assert {a["finish_reason"] for a in answers} <= {"length", "stop"}
    assert not partial.exists()


def block(*asked: tuple[list[int], dict]) -> dict:
    ids, sampling = zip(*asked, strict=True)
    return {
        "index": range(len(asked)),
        "prompt_token_ids": ids,
        "sampling": [json.dumps({"max_tokens": 8, "temperature": 0.0} | s) for s in sampling],
    }


def test_a_row_that_fails_in_the_engine_alone_has_no_text(plain, plan):
    """One that the engine refuses, and one that ends it: on a CPU, a seed with a prompt that is computed in chunks."""
    from sdfp_vllm.common.checkpoint import load_tokenizer
    from sdfp_vllm.engine.engine_end import end_engine, free_engine

    tokenizer = load_tokenizer(MODEL)
    good = [(tokenizer.encode(r["prompt"]), {"max_tokens": r["max_tokens"]}) for r in ROWS[:4]]
    empty, ends = ([], {}), (tokenizer.encode("import os\n" * 100), {"temperature": 1.0, "seed": 1})
    settings = ENGINE | {"max_model_len": 512, "max_num_batched_tokens": 128}
    actor = BatchEngine(str(MODEL), load_parcel(plan), settings)
    try:
        found = [json.loads(a) for a in actor(block(good[0], empty, good[1], ends, good[2]))["answer"]]
        assert [a["index"] for a in found] == [0, 1, 2, 3, 4]
        assert [a.get("text") for a in found] == [plain[0], None, plain[1], None, plain[2]]
        assert "prompt" in found[1]["error"] and "offset" in found[3]["error"]
        (later,) = actor(block(good[3]))["answer"]
        assert json.loads(later)["text"] == plain[3]
    finally:
        end_engine(actor._llm)
        del actor
        free_engine()


def test_an_engine_that_does_not_start_says_why(plan):
    actor = BatchEngine(str(MODEL), load_parcel(plan), {"dtype": "float99"})
    for _ in range(2):
        (answer,) = actor(block(([1], {}), ([2], {})))["answer"]
        assert "float99" in json.loads(answer)[BROKEN]
