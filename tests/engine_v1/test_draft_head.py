"""A draft head over a part of the vocabulary, in the engine: the text is the target's, every draft in the part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdfp_vllm.engine.draft.head import DraftHead
from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan.parcel import HEAD_FILE
from sdfp_vllm.planner.head import RolledHead
from sdfp_vllm.planner.rollout import Continuations, DraftRollout
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests.engine_v1.test_sampling import LENGTH, SEQUENCES, draw
from tests.support.bigram import VOCAB, bigram, exact, z_score  # noqa: F401
from tests.support.engines import assert_identical, engine, runner, spec_counters, tokens, write_plan
from tests.support.exact_sampling import THRESHOLD
from tests.support.offline_drafts import drafts_of
from tests.support.restricted_plans import write_restricted_plan
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.engine
K, NEW = 3, 16


@pytest.fixture(scope="module")
def part(plain_tokens) -> list[int]:
    """Two thirds of the tokens that the target writes, so that drafts are right, wrong and missing."""
    written = sorted({t for answer in plain_tokens for t in answer[0]})
    return [t for i, t in enumerate(written) if i % 3]


@pytest.fixture(scope="module")
def restricted(target, kept, part, tmp_path_factory) -> str:
    return write_restricted_plan(target, tmp_path_factory.mktemp("restricted"), kept, K, part)


def test_greedy_text_is_the_targets_and_drafts_are_the_offline_jobs(
    target, prompts, plain_tokens, kept, part, restricted
):
    with engine(target, {"method": "sdfp", "model": restricted}) as llm:
        head = runner(llm).drafter.model._head
        assert isinstance(head, DraftHead) and head.tokens.tolist() == part
        held = {id(p) for p in runner(llm).model.parameters()}
        assert {id(p) for p in runner(llm).drafter.model.parameters()} <= held
        assert_identical(tokens(llm, prompts), plain_tokens)
        counters = spec_counters(llm)
        some = [p for p in prompts if 8 <= len(p) < 100][:6]
        answers, rounds = drafts_of(llm, some)
    assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]
    stack = DecoderStack(load_target(target, torch.float32))
    checked = 0
    for prompt, answer, seen in zip(some, answers, rounds, strict=True):
        text = prompt + answer[0]
        for drafted in seen.values():
            assert set(drafted) <= set(part)
        ids = torch.tensor([text])
        rollout = DraftRollout(stack, Continuations(ids, len(prompt), torch.tensor([len(text)])))
        runs = rollout.run(kept, K, head=RolledHead(stack, torch.tensor(part)))
        for start, drafted in seen.items():
            after = text[start + 1 :]
            if len(after) >= K:
                agree = next((j for j in range(K) if drafted[j] != after[j]), K)
                assert runs.lengths[0, start - len(prompt)] == agree
                checked += 1
    assert checked > 20


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=0.7, top_k=5, top_p=0.8),
        pytest.param(dict(temperature=1.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sampled_text_follows_the_exact_distribution(bigram, exact, tmp_path, params):  # noqa: F811
    """25,344 draws, of which the draft can propose 5 of 8 tokens."""
    assert SEQUENCES * (LENGTH - 1) == 25_344
    plan = write_restricted_plan(bigram, tmp_path, [0, 3], K, [1, 2, 4, 5, 7])
    settings = {"method": "sdfp", "model": plan}
    with engine(bigram, settings, max_model_len=128, max_num_seqs=256, skip_tokenizer_init=True) as llm:
        drafter, proposed = runner(llm).drafter, set()
        propose = drafter.propose

        def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = propose(*args, **kwargs)
            proposed.update(out.flatten().tolist())
            return out

        drafter.propose = spy
        ids = draw(llm, **params)
        counters = spec_counters(llm)
    assert proposed == {1, 2, 4, 5, 7}
    assert set(ids.flatten().tolist()) == set(range(VOCAB))
    assert 0.05 < counters["num_accepted_tokens"] / counters["num_draft_tokens"] < 0.95
    z = z_score(ids, exact, **params)
    print(f"{params}: z {z:.2f}")
    assert z < THRESHOLD


def test_soft_cap_and_tied_embeddings_are_the_targets_own(tmp_path):
    """Gemma 3, embeddings scaled and tied: with all layers kept, logits inside the part are the target's."""
    sizes = dict(
        hidden_size=64, intermediate_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1
    )
    model = tmp_path / "model"
    changes = dict(max_position_embeddings=256, query_pre_attn_scalar=32, final_logit_softcapping=2.0)
    tiny_model("gemma3_text", seed=0, **sizes, **changes).save_pretrained(model)
    part = list(range(0, 61, 2))
    plan = write_restricted_plan(model, tmp_path / "plan", range(4), K, part)
    with engine(model, {"method": "sdfp", "model": plan}, max_model_len=192, skip_tokenizer_init=True) as llm:
        target, draft = runner(llm).model, runner(llm).drafter.model
        assert isinstance(draft._head, DraftHead)
        hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            whole, got = target.compute_logits(hidden), draft.compute_logits(hidden)
    assert whole.abs().max() <= 2.0 and got.shape == whole.shape == (5, 61)
    torch.testing.assert_close(got[:, part], whole[:, part], atol=1e-5, rtol=1e-5)
    assert (got[:, 1::2] == -torch.inf).all()


@pytest.mark.parametrize("broken", ["quantised", pytest.param("other logits", marks=pytest.mark.slow)])
def test_where_rows_cannot_be_gathered_the_full_head_drafts_and_says_so(
    target, restricted, prompts, plain_tokens, monkeypatch, broken
):
    from vllm.model_executor.models.llama import LlamaForCausalLM

    from sdfp_vllm.engine.draft import head

    said: list[str] = []
    monkeypatch.setattr(head.logger, "warning", lambda text, *args: said.append(text % args))
    if broken == "quantised":
        monkeypatch.setattr(head, "UnquantizedEmbeddingMethod", int)
    else:  # logits that no row of the head knows of
        compute = LlamaForCausalLM.compute_logits

        def lifted(self: Any, hidden: torch.Tensor) -> torch.Tensor:
            logits = compute(self, hidden)
            return logits + torch.arange(logits.shape[1])

        monkeypatch.setattr(LlamaForCausalLM, "compute_logits", lifted)
    with engine(target, {"method": "sdfp", "model": restricted}) as llm:
        assert not isinstance(runner(llm).drafter.model._head, DraftHead)
        if broken == "quantised":
            assert_identical(tokens(llm, prompts[:4]), plain_tokens[:4])
    (line,) = said
    assert "full head" in line and ("quantised" in line) == (broken == "quantised")


def test_the_head_is_part_of_the_config_and_its_hash(target, kept, part, restricted, plan, tmp_path):
    from vllm import EngineArgs

    def hash_of(folder: str) -> str:
        settings = {"method": "sdfp", "model": folder}
        config = EngineArgs(str(target), dtype="float32", speculative_config=settings).create_engine_config()
        return config.speculative_config.compute_hash()

    other = write_restricted_plan(target, tmp_path / "other", kept, K, part[1:])
    full = write_plan(target, tmp_path / "full", kept, K)
    assert len({hash_of(full), hash_of(restricted), hash_of(other)}) == 3


def test_a_missing_token_file_is_refused_before_weights_are_read(target, kept, part, tmp_path):
    plan = write_restricted_plan(target, tmp_path, kept, K, part)
    (tmp_path / HEAD_FILE).unlink()
    with (
        pytest.raises(PlanError, match=r"head\.safetensors.*missing"),
        engine(target, {"method": "sdfp", "model": plan}),
    ):
        pass
