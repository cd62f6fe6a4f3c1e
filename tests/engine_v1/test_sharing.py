"""SDFP copies no weight and no K/V, and takes no cache blocks from the target."""

from __future__ import annotations

import pytest

from tests.support.engines import engine, runner, tokens

pytestmark = pytest.mark.engine


def blocks(llm) -> int:
    return llm.llm_engine.vllm_config.cache_config.num_gpu_blocks


def test_draft_is_made_of_the_targets_own_tensors(target, plan, kept, prompts):
    with engine(target) as llm:
        plain_blocks = blocks(llm)
        plain_kv = sum(t.numel() * t.element_size() for t in runner(llm).kv_caches)
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        tokens(llm, prompts[:4])
        r = runner(llm)
        draft, model = r.drafter.model, r.model
        owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        used = {t.untyped_storage().data_ptr() for t in [*draft.parameters(), *draft.buffers()]}
        assert used and used <= owned
        assert [m is model.model.layers[i] for m, i in zip(draft.kept, kept, strict=True)] == [True] * len(
            kept
        )
        # Every attention layer of the draft reads and writes the cache tensor of the target's layer.
        context = r.compilation_config.static_forward_context
        assert len(context) == len(model.model.layers), "the draft registered attention layers of its own"
        assert r.drafter._draft_attn_layer_names < set(context)
        assert blocks(llm) == plain_blocks
        assert sum(t.numel() * t.element_size() for t in r.kv_caches) == plain_kv
