"""LoRA adapters in model families of other shapes, and on a server that loads them as it runs: what `make test` leaves out."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sdfp_vllm.plan.view import DraftView
from tests.engine_v1.test_architectures import _CHANGES, _PROMPTS, _SIZES, as_it_was
from tests.support.adapters import adapted_tokens, adapter, plain_answers, write_adapter
from tests.support.engines import assert_identical, engine, spec_counters, write_plan
from tests.support.servers import start, stop
from tests.support.tiny_models import tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.more]

LORA: dict[str, Any] = dict(enable_lora=True, max_loras=2, max_lora_rank=8)
# Biases, multipliers in a decoder that is run by its own forward, fused linears, vLLM's Transformers backend. Tiny random
# models of Gemma's kind say one token for ever, whatever an adapter does.
FAMILIES = ["qwen2", "granite", "phi3", "transformers"]
_LINEARS = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_and_full_acceptance(family, tmp_path):
    backend = {"model_impl": "transformers"} if family == "transformers" else {}
    architecture = "llama" if backend else family
    changes = _SIZES | dict(max_position_embeddings=256) | _CHANGES.get(architecture, {})
    made = tiny_model(architecture, seed=0, **changes)
    made.save_pretrained(tmp_path / "model")
    layers = made.config.num_hidden_layers
    linears = _LINEARS.get(family)
    kind: dict[str, Any] = dict(modules=linears) if linears else {}
    mixed = [
        None,
        *(
            adapter(f"a{i}", i, write_adapter(tmp_path / "model", tmp_path / f"a{i}", seed=i, **kind))
            for i in (1, 2)
        ),
    ]
    settings = dict(max_model_len=192, skip_tokenizer_init=True, **backend, **LORA)
    full = write_plan(tmp_path / "model", tmp_path / "full", range(layers), k=3)
    int8 = write_plan(tmp_path / "model", tmp_path / "int8", DraftView.at(range(layers), "int8"), k=3)
    with as_it_was(type(made.base_model)):
        with engine(tmp_path / "model", **settings) as llm:
            base = adapted_tokens(llm, _PROMPTS, [None])
            want = plain_answers(llm, _PROMPTS, mixed)
            assert want != base
        for plan, bound in ((full, 0.97), (int8, 0.3)):
            with engine(
                tmp_path / "model", {"method": "sdfp", "model": plan, "adapters": "own"}, **settings
            ) as llm:
                assert_identical(adapted_tokens(llm, _PROMPTS, mixed), want)
                counters = spec_counters(llm)
            assert counters["num_accepted_tokens"] >= bound * counters["num_draft_tokens"]


def ask(url: str, path: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def completion(url: str, model: str, prompt: list[int]) -> list[int]:
    body = dict(
        model=model, prompt=prompt, max_tokens=16, temperature=0, ignore_eos=True, return_token_ids=True
    )
    return json.loads(ask(url, "/v1/completions", body))["choices"][0]["token_ids"]


def counted(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}_total"))


def test_a_server_that_loads_and_unloads_adapters(target: Path, prompts, tmp_path):
    folders = {
        name: write_adapter(target, tmp_path / name, seed=i)
        for i, name in enumerate(("one", "two", "three"), 1)
    }
    some = prompts[:3]
    with engine(target, **LORA) as llm:
        want = {
            name: adapted_tokens(llm, some, [adapter(name, i, folder)], max_tokens=16)
            for i, (name, folder) in enumerate(folders.items(), 1)
        }
    plan = write_plan(target, tmp_path / "plan", range(16), k=3)
    flags = [
        "--max-model-len", "512", "--enable-lora", "--max-loras", "1", "--max-cpu-loras", "1",
        "--lora-modules", f"one={folders['one']}",
        "--speculative-config", json.dumps({"method": "sdfp", "model": plan, "adapters": "own"}),
    ]  # fmt: skip
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    server, url = start(tmp_path / "log", target, *flags, env=env)
    try:
        assert [completion(url, "one", p) for p in some] == want["one"]
        for name in ("two", "three"):
            ask(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folders[name]})
            assert [completion(url, name, p) for p in some] == want[name]
            ask(url, "/v1/unload_lora_adapter", {"lora_name": name})
        assert [completion(url, "one", p) for p in some] == want["one"]
        drafted, accepted = (counted(url, f"spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
        assert accepted > 0.95 * drafted > 50
    finally:
        stop(server)
