"""Bridges in the engine: what is drafted is what the offline job computes, and no token of the text changes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from bridged_plans import write_bridged_plan
from engines import assert_identical, engine, runner, spec_counters, tokens, write_plan
from transformers import DynamicCache

from sdfp_vllm.bridge_file import Run
from sdfp_vllm.errors import PlanError
from sdfp_vllm.fit.bridged_stack import bridging
from sdfp_vllm.fit.rollout import Continuations, DraftRollout
from sdfp_vllm.fit.stack import DecoderStack, load_target
from sdfp_vllm.plan import BRIDGE_FILE

pytestmark = pytest.mark.engine
K, NEW = 3, 16
# Of 16 layers: runs between kept layers only; and runs before the first, and before the final norm.
KEPT = {"within": [0, 5, 15], "at both ends": [1, 4, 5, 10, 14]}


def drafts_of(llm: Any, prompts: list[list[int]]) -> tuple[list[list[list[int]]], list[dict[int, list[int]]]]:
    """Greedy answers one request at a time, and per request what was drafted from each start position."""
    drafter = runner(llm).drafter
    propose, seen = drafter.propose, {}

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = inspect.signature(propose).bind(*args, **kwargs).arguments
        last = given.get("token_indices_to_sample")
        if last is None:
            last = given["common_attn_metadata"].query_start_loc[1:] - 1
        out = propose(*args, **kwargs)
        seen[int(given["target_positions"][last][0]) + 1] = out[0].tolist()
        return out

    drafter.propose = spy
    answers, rounds = [], []
    for prompt in prompts:
        seen = {}
        answers += tokens(llm, [prompt], max_tokens=NEW)
        rounds.append(seen)
    drafter.propose = propose
    return answers, rounds


@torch.no_grad()
def draft_offline(stack: DecoderStack, kept: list[int], bridges: Any, ids: list[int]) -> list[int]:
    """K drafts after `ids`, over the full model's K/V of all but the last of them, one token at a time."""
    cache = DynamicCache(config=stack.config)
    stack.model(input_ids=torch.tensor([ids[:-1]]), past_key_values=cache, use_cache=True)
    drafted: list[int] = []
    with bridging(stack, kept, bridges):
        for j in range(K):
            fed = drafted[-1] if drafted else ids[-1]
            out = stack.model(
                input_ids=torch.tensor([[fed]]),
                position_ids=torch.tensor([[len(ids) - 1 + j]]),
                past_key_values=cache,
                use_cache=True,
            )
            drafted.append(int(out.logits[0, -1].argmax()))
    return drafted


@pytest.fixture(scope="module")
def stack(target: Path) -> DecoderStack:
    return DecoderStack(load_target(target, torch.float32))


@pytest.mark.parametrize("fused", [True, False], ids=["in the norm", "as a step"])
@pytest.mark.parametrize("where", KEPT)
def test_drafts_are_the_offline_jobs(
    target, prompts, plain_tokens, stack, tmp_path, monkeypatch, where, fused
):
    from sdfp_vllm.runtime import bridged

    if not fused:
        monkeypatch.setattr(bridged, "_KNOWN_LAYERS", ())
    kept = KEPT[where]
    plan, bridges = write_bridged_plan(target, tmp_path, kept, K)
    some = [p for p in prompts if 8 <= len(p) < 100][:4]
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        answers, rounds = drafts_of(llm, some)
        assert spec_counters(llm)["num_draft_tokens"] > 0
        draft = runner(llm).drafter.model
        held = [m for m in draft.modules() if isinstance(m, bridged._Held)]
        assert len(held) == len(bridges)
        assert any(isinstance(m, bridged.BridgedNorm) for m in held) == (fused or where == "at both ends")
        mine = {id(p) for p in draft.parameters()}
        assert mine <= {id(p) for p in runner(llm).model.parameters()}  # no weight was copied
    want = [plain_tokens[prompts.index(p)] for p in some]
    assert_identical([[a[0]] for a in answers], [[w[0][:NEW]] for w in want])

    different = 0
    for prompt, answer, seen in zip(some, answers, rounds, strict=True):
        text = prompt + answer[0]
        for start, drafted in list(seen.items())[:6]:
            if start < len(text):
                assert drafted == draft_offline(stack, kept, bridges, text[: start + 1])
                different += drafted != draft_offline(stack, kept, None, text[: start + 1])
        check_rollout(stack, kept, bridges, prompt, text, seen)
    assert different > 5


def check_rollout(
    stack: DecoderStack, kept: list[int], bridges: dict[Run, Any], prompt: list[int], text: list[int], seen
) -> None:
    """The estimate that `sdfp plan` makes: as many drafts in a row agree with the text as the engine's did."""
    ids = torch.tensor([text])
    runs = DraftRollout(stack, Continuations(ids, len(prompt), torch.tensor([len(text)]))).run(
        kept, K, bridges=bridges
    )
    for start, drafted in seen.items():
        after = text[start + 1 :]
        if len(after) >= K:
            agree = next((j for j in range(K) if drafted[j] != after[j]), K)
            assert runs.lengths[0, start - len(prompt)] == agree


def test_bridges_are_part_of_the_config_and_its_hash(target, tmp_path):
    from vllm import EngineArgs

    def hash_of(folder: str) -> str:
        settings = {"method": "sdfp", "model": folder}
        config = EngineArgs(str(target), dtype="float32", speculative_config=settings).create_engine_config()
        return config.speculative_config.compute_hash()

    kept = KEPT["within"]
    none = hash_of(write_plan(target, tmp_path / "none", kept, K))
    weak = hash_of(write_bridged_plan(target, tmp_path / "weak", kept, K, strength=0.1)[0])
    strong = hash_of(write_bridged_plan(target, tmp_path / "strong", kept, K)[0])
    assert len({none, weak, strong}) == 3


def test_a_missing_tensor_file_is_refused_before_weights_are_read(target, tmp_path):
    plan, _ = write_bridged_plan(target, tmp_path, KEPT["within"], K)
    (tmp_path / BRIDGE_FILE).unlink()
    with (
        pytest.raises(PlanError, match=r"bridges\.safetensors.*missing"),
        engine(target, {"method": "sdfp", "model": plan}),
    ):
        pass


@pytest.mark.slow
def test_compiled(target, prompts, plain_tokens, tmp_path):
    plan, _ = write_bridged_plan(target, tmp_path, KEPT["within"], K)
    with engine(target, {"method": "sdfp", "model": plan}, enforce_eager=False) as llm:
        assert_identical(tokens(llm, prompts[:24]), plain_tokens[:24])
        assert spec_counters(llm)["num_accepted_tokens"] > 0
        assert not runner(llm).drafter.model.do_not_compile
