"""`vllm serve --data-parallel-size 2`: two ranks of a dense target, each with drafts of its own, behind one address."""

from __future__ import annotations

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import toy
from tests.support import servers
from tests.support.engines import engine, write_plan

pytestmark = [pytest.mark.engine, pytest.mark.more]

PROMPTS = [f"import os\n\n\ndef step_{i}(" for i in range(16)]


def test_both_ranks_draft_and_the_text_is_plain_vllms(tmp_path):
    from openai import OpenAI
    from vllm import SamplingParams

    with engine(toy.MODEL) as llm:
        done = llm.generate(PROMPTS, SamplingParams(max_tokens=32, temperature=0.0), use_tqdm=False)
        want = [d.outputs[0].text for d in done]
    plan = write_plan(toy.MODEL, tmp_path / "plan", [0, 1, 14, 15], k=3)
    log = tmp_path / "server.log"
    flags = ("--served-model-name", "demo", "--max-model-len", "256", "--data-parallel-size", "2")
    # A core and a fixed share of memory for each rank: by default each takes all it finds.
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    process, url = servers.start(log, toy.MODEL, *flags, "--speculative-model", plan, env=own)
    try:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")

        def ask(prompt: str) -> str:
            done = client.completions.create(model="demo", prompt=prompt, max_tokens=32, temperature=0.0)
            return done.choices[0].text

        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(ask, PROMPTS))
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    finally:
        servers.stop(process)
    assert got == want
    accepted = dict(
        re.findall(
            r'^vllm:spec_decode_num_accepted_tokens_total\{.*engine="(\d)".*\} (\S+)$', metrics, re.MULTILINE
        )
    )
    assert set(accepted) == {"0", "1"} and all(float(n) > 0 for n in accepted.values()), accepted
