"""Greedy output with SDFP is plain vLLM's, token for token, in float32."""

from __future__ import annotations

import pytest

from tests.support.engines import assert_identical, engine, metric, spec_counters, tokens, write_plan

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llm(target, plan):
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        yield llm


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_same_tokens_at_every_batch_size(llm, prompts, plain_tokens, batch):
    before = spec_counters(llm)
    assert_identical(tokens(llm, prompts, batch=batch), plain_tokens)
    after = spec_counters(llm)
    drafted = after["num_draft_tokens"] - before["num_draft_tokens"]
    accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    # Both outcomes were exercised: a draft that is always right or always wrong proves little.
    assert 0.05 * drafted < accepted < 0.99 * drafted


def test_more_requests_than_seats(llm, prompts, plain_tokens):
    assert_identical(tokens(llm, prompts), plain_tokens)


def test_requests_of_different_length_leave_one_by_one(llm, target, prompts, plain_tokens):
    from vllm import SamplingParams

    lengths = [1 + 5 * (i % 7) for i in range(16)]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    out = llm.generate([{"prompt_token_ids": p} for p in prompts[:16]], params, use_tqdm=False)
    got = [list(o.outputs[0].token_ids) for o in out]
    assert_identical(got, [answer[0][:n] for answer, n in zip(plain_tokens[:16], lengths, strict=True)])


def test_stop_string_cuts_where_plain_does(llm, target, prompts):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=64, stop=["\n\n", "self"])

    def texts(engine):
        out = engine.generate([{"prompt_token_ids": p} for p in prompts[:24]], params, use_tqdm=False)
        return [(o.outputs[0].text, o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in out]

    got = texts(llm)
    with engine(target) as plain:
        want = texts(plain)
    assert_identical(got, want)
    assert any(reason == "stop" for _, reason, _ in want)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_draft_lengths(target, plan, prompts, plain_tokens, k):
    with engine(target, {"method": "sdfp", "model": plan, "num_speculative_tokens": k}) as llm:
        assert_identical(tokens(llm, prompts[:16]), plain_tokens[:16])
        assert len(spec_counters(llm)["num_accepted_tokens_per_pos"]) == k


def test_all_layers_kept_accepts_everything(target, prompts, plain_tokens, tmp_path):
    from sdfp_vllm.plan.fingerprint import fingerprint

    everything = write_plan(target, tmp_path, range(fingerprint(target).num_layers), k=4)
    with engine(target, {"method": "sdfp", "model": everything}) as llm:
        assert_identical(tokens(llm, prompts), plain_tokens)
        counters = spec_counters(llm)
    # Only what is drafted past a request's last token is never looked at.
    assert counters["num_accepted_tokens"] >= 0.99 * counters["num_draft_tokens"]


def test_chunked_prefill(target, plan, prompts, plain_tokens):
    with engine(target, {"method": "sdfp", "model": plan}, max_num_batched_tokens=40) as llm:
        assert_identical(tokens(llm, prompts[:32]), plain_tokens[:32])


def test_prefix_caching_on_a_shared_prefix(target, plan, prompts):
    shared = (prompts[0] + prompts[1] + prompts[2] + prompts[3])[:160]
    family = [shared + p[:20] for p in prompts[:16]]
    with engine(target) as llm:
        want = tokens(llm, family, batch=1)
    with engine(target, {"method": "sdfp", "model": plan}, enable_prefix_caching=True) as llm:
        got = tokens(llm, family, batch=1) + tokens(llm, family)
        hits = metric(llm, "prefix_cache_hits")
    assert_identical(got, want + want)
    assert hits > 0


def test_preemption(target, plan, prompts, plain_tokens):
    """A KV cache too small for the batch: requests are thrown out and computed again."""
    with engine(
        target, {"method": "sdfp", "model": plan}, num_gpu_blocks_override=7, max_model_len=256
    ) as llm:
        assert_identical(tokens(llm, prompts[:24]), plain_tokens[:24])
        preempted = metric(llm, "num_preemptions")
    assert preempted > 0


def test_up_to_the_last_position(target, plan, prompts):
    """Prompts that end 0 to 5 positions before max_model_len, each with a short one beside it."""
    limit = 96
    long = prompts[0] + prompts[1] + prompts[2]
    batches = [[long[: limit - 1 - room], prompts[5][:10]] for room in range(6)]
    with engine(target, max_model_len=limit) as llm:
        want = [tokens(llm, batch, max_tokens=limit) for batch in batches]
    with engine(target, {"method": "sdfp", "model": plan}, max_model_len=limit) as llm:
        for batch, answers in zip(batches, want, strict=True):
            assert_identical(tokens(llm, batch, max_tokens=limit), answers)
