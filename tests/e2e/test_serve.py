"""`vllm serve MODEL --speculative-model sdfp`, as a user starts it, answered to the `openai` client."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.store import default_plan_dir
from tests import toy
from tests.support import servers
from tests.support.engines import write_plan

pytestmark = pytest.mark.engine

MODEL = toy.MODEL
PROMPT = "import os\n\n\ndef main("
COMMON = dict(model="demo", prompt=PROMPT, max_tokens=48, temperature=0.0)


def start(log: Path, cache: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """Starts the server by its console script and waits until it answers; returns it and its URL."""
    flags = ("--served-model-name", "demo", "--max-model-len", "512", *flags)
    return servers.start(log, MODEL, *flags, env={"SDFP_CACHE_DIR": str(cache)})


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(cache, tmp_path_factory) -> Iterator[str]:
    target = fingerprint(MODEL)
    os.environ["SDFP_CACHE_DIR"] = str(cache)
    folder = default_plan_dir(target)
    del os.environ["SDFP_CACHE_DIR"]
    write_plan(MODEL, folder, [0, target.num_layers - 1], k=3)
    log = tmp_path_factory.mktemp("log") / "server.log"
    process, url = start(log, cache, "--speculative-model", "sdfp", "--num-speculative-tokens", "4")
    yield url
    servers.stop(process)


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server}/v1", api_key="none")


@pytest.fixture(scope="module")
def plain() -> str:
    from vllm import SamplingParams

    from tests.support.engines import engine

    with engine(MODEL) as llm:
        out = llm.generate(PROMPT, SamplingParams(max_tokens=48, temperature=0.0), use_tqdm=False)
        return out[0].outputs[0].text


def test_completion_equals_plain_vllm(client, plain):
    assert client.completions.create(**COMMON).choices[0].text == plain


def test_streaming_gives_the_same_text_in_pieces(client, plain):
    pieces = [c.choices[0].text for c in client.completions.create(**COMMON, stream=True) if c.choices]
    assert "".join(pieces) == plain
    assert len(pieces) > 3


def test_concurrent_streams(client, plain):
    from concurrent.futures import ThreadPoolExecutor

    def stream(_):
        return "".join(
            c.choices[0].text for c in client.completions.create(**COMMON, stream=True) if c.choices
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stream, range(12))) == [plain] * 12


def test_a_request_limits_its_drafts_and_a_wrong_field_is_its_own_fault(client, server, plain):
    from openai import BadRequestError

    def drafted() -> float:
        text = urllib.request.urlopen(f"{server}/metrics").read().decode()
        return float(re.search(r"^vllm:spec_decode_num_draft_tokens_total\{.*\} (\S+)$", text, re.M)[1])  # type: ignore[index]

    def ask(**fields):
        return client.completions.create(**COMMON, extra_body={"vllm_xargs": fields}).choices[0].text

    ask()
    before = drafted()
    assert ask(sdfp_draft=False) == ask(sdfp_max_draft_tokens=0) == plain
    assert drafted() == before
    assert ask(sdfp_draft=True) == plain
    assert drafted() > before
    for wrong in ({"sdfp_draft": "no"}, {"sdfp_max_draft_tokens": -1}, {"sdfp_drafts": True}):
        with pytest.raises(BadRequestError, match=next(iter(wrong))):
            ask(**wrong)


def test_metrics_are_vllms_own(client, server):
    client.completions.create(**COMMON)
    text = urllib.request.urlopen(f"{server}/metrics").read().decode()
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        value = re.search(rf"^vllm:spec_decode_{name}_total\{{.*\}} (\S+)$", text, re.M)
        assert value and float(value[1]) > 0, name
    assert 'position="3"' in text, "--num-speculative-tokens 4 did not arrive"


def test_no_plan_is_a_clear_start_up_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"has no plan yet.*sdfp plan"):
        process, _ = start(tmp_path / "log", tmp_path / "empty", "--speculative-model", "sdfp")
        servers.stop(process)
