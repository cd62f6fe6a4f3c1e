"""The cost-scaled copies: made once, keyed by what they are made from, refused with a way out."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdfp_vllm.errors import SdfpError
from tests.toy import scaled as demo


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(demo, "SHAPE", dict(hidden=64, mlp=96, heads=8, kv_heads=2))
    monkeypatch.setattr(demo, "_SPARE_BYTES", 0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_made_once_and_found_again(source, tmp_path):
    cache = tmp_path / "cache"
    first = demo.demo_target(cache, source)
    assert json.loads((first / "config.json").read_text())["hidden_size"] == 64
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert demo.demo_target(cache, source) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert demo.demo_draft(cache, source) != first


def test_other_weights_make_another_copy(source, tmp_path):
    cache = tmp_path / "cache"
    first = demo.demo_target(cache, source)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert demo.demo_target(cache, other) != first


def test_default_place_is_beside_the_plans(monkeypatch, tmp_path):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path))
    assert demo.demo_cache() == tmp_path / "demo"


def test_missing_package_data_is_refused(tmp_path):
    with pytest.raises(SdfpError, match="not in this checkout"):
        demo.demo_target(tmp_path / "cache", tmp_path / "nothing")
    assert not (tmp_path / "cache").exists()


def test_full_disk_is_refused_before_writing(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(SdfpError, match="Free some space"):
        demo.demo_target(tmp_path / "cache", source)
    assert list((tmp_path / "cache").iterdir()) == []


def test_unusable_cache_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SdfpError, match="SDFP_CACHE_DIR"):
        demo.demo_target(tmp_path / "file" / "cache", source)
