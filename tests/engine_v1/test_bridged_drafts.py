"""Bridges in the engine: what is drafted is what the offline job computes, and no token of the text changes."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan.parcel import BRIDGE_FILE
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests.support.bridged_plans import write_bridged_plan
from tests.support.engines import assert_identical, engine, runner, spec_counters, tokens, write_plan
from tests.support.offline_drafts import NEW, K, assert_drafts_are_offline, drafts_of

pytestmark = pytest.mark.engine
# Of 16 layers: runs between kept layers only; and runs before the first, and before the final norm.
KEPT = {"within": [0, 5, 15], "at both ends": [1, 4, 5, 10, 14]}


@pytest.fixture(scope="module")
def stack(target: Path) -> DecoderStack:
    return DecoderStack(load_target(target, torch.float32))


@pytest.mark.parametrize("fused", [True, False], ids=["in the norm", "as a step"])
@pytest.mark.parametrize("where", KEPT)
def test_drafts_are_the_offline_jobs(
    target, prompts, plain_tokens, stack, tmp_path, monkeypatch, where, fused
):
    from sdfp_vllm.engine.draft import bridged

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

    assert_drafts_are_offline(stack, kept, bridges, some, answers, rounds, other_than=(kept, None))


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


def test_nobody_reads_the_folder_once_the_configuration_is_built(target, tmp_path):
    """As an engine's other processes get it: pickled, and perhaps on a node without that disk."""
    from vllm import EngineArgs

    plan, bridges = write_bridged_plan(target, tmp_path / "plan", KEPT["within"], K)
    settings = {"method": "sdfp", "model": plan}
    args = EngineArgs(str(target), dtype="float32", speculative_config=settings)
    config = args.create_engine_config().speculative_config
    sent = pickle.dumps(config)
    shutil.rmtree(plan)
    for held in (config, pickle.loads(sent)):
        assert held.view == config.view and held.compute_hash() == config.compute_hash()
        there = held.parcel.bridges()
        assert there.keys() == bridges.keys()
        for run, bridge in bridges.items():
            for name, tensor in bridge.tensors().items():
                assert torch.equal(there[run].tensors()[name], tensor)


@pytest.mark.slow
def test_compiled(target, prompts, plain_tokens, tmp_path):
    plan, _ = write_bridged_plan(target, tmp_path, KEPT["within"], K)
    with engine(target, {"method": "sdfp", "model": plan}, enforce_eager=False) as llm:
        assert_identical(tokens(llm, prompts[:24]), plain_tokens[:24])
        assert spec_counters(llm)["num_accepted_tokens"] > 0
        assert not runner(llm).drafter.model.do_not_compile
