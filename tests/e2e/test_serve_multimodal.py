"""`vllm serve VLM --speculative-model sdfp` asked with pictures by the `openai` client, and the plan that it serves made before."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.store import default_plan_dir, load_plan
from tests.support import servers, vision
from tests.support.engines import write_plan
from tests.support.tiny_multimodal import pictures, save_tiny_multimodal

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not vision.usable(), reason="no torchvision; `make` installs packaging/vision.txt"),
]


def png(picture: Any) -> str:
    """A `data:` URL of a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat(text: str, *urls: str) -> list[Any]:
    """Messages of the OpenAI API: pictures, then a text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory) -> Path:
    return save_tiny_multimodal("qwen2_vl", tmp_path_factory.mktemp("model"))


@pytest.mark.more
def test_pictures_in_and_the_same_text_out(model, tmp_path, monkeypatch):
    from openai import OpenAI

    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path))
    write_plan(model, default_plan_dir(fingerprint(model)), [0, 1, 3], k=3)
    flags = ("--served-model-name", "vlm", "--max-model-len", "512", "--speculative-model", "sdfp")
    server, url = servers.start(tmp_path / "log", model, *flags)
    try:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        a, b, c = map(png, pictures(3))
        chats = [
            chat("What is in the picture?", a),
            chat("What is in the picture?", b),
            chat("Compare.", a, b, c),
            chat("Only words."),
        ]

        def answer(messages: list[Any], drafts: bool = True) -> str:
            asked = client.chat.completions.create(
                model="vlm",
                messages=messages,
                temperature=0.0,
                max_tokens=40,
                extra_body={"ignore_eos": True, "vllm_xargs": {"sdfp_draft": drafts}},
            )
            return asked.choices[0].message.content or ""

        plain = [answer(messages, drafts=False) for messages in chats]
        drafted = re.search(rb"\nvllm:spec_decode_num_draft_tokens_total\S* ([\d.]+)", scrape(url))
        assert drafted is None or float(drafted[1]) == 0
        assert len(set(plain)) == len(plain), "pictures that do not matter show nothing"
        assert [answer(messages) for messages in chats] == plain
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(answer, chats * 2)) == plain * 2
        found = re.search(rb"\nvllm:spec_decode_num_accepted_tokens_total\S* ([\d.]+)", scrape(url))
        assert found and float(found[1]) > 0
    finally:
        servers.stop(server)


def scrape(url: str) -> bytes:
    return urllib.request.urlopen(f"{url}/metrics").read()


@pytest.mark.slow
def test_one_command_plans_and_its_check_runs_on_the_engine(model, tmp_path, monkeypatch):
    """The engines of the check are given no picture, and load no encoder."""
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n\n" * 600)
    env = {**os.environ, "SDFP_CACHE_DIR": str(tmp_path), "COLUMNS": "200"}
    command = ["sdfp", "plan", model, "--dtype", "float32", "--calibration", text, "--eager", "--anyway"]
    command += ["--sequences", "3", "--length", "32", "--selector", "fit"]
    sdfp = Path(sys.executable).parent / "sdfp"
    done = subprocess.run([str(sdfp), *map(str, command[1:])], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The check failed" not in done.stdout, done.stdout
    assert f"vllm serve {model}" in done.stdout
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path))
    plan = load_plan(default_plan_dir(fingerprint(model)), expected=fingerprint(model))
    assert plan.costs and plan.costs.engine == "eager"  # what an engine adds was measured on one
    assert plan.check and plan.check.identical == plan.check.prompts
