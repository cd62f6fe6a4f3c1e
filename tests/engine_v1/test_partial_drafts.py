"""Single branches of layers in the engine: what is drafted is what the offline job computes."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.engine.draft.branches import AttentionBranch, MlpBranch
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests.support.engines import assert_identical, engine, runner, spec_counters, write_plan
from tests.support.offline_drafts import NEW, K, assert_drafts_are_offline, drafts_of

pytestmark = pytest.mark.engine
# Of 16 layers: a lone branch first (no residual yet) and last (the final norm adds it).
KEEP = KeepSet(layers=(2, 14), attention=(0, 5, 8), mlp=(4, 15))


def test_drafts_are_the_offline_jobs(target, prompts, plain_tokens, tmp_path):
    stack = DecoderStack(load_target(target, torch.float32))
    plan = write_plan(target, tmp_path, KEEP, K, curve=[])
    some = [p for p in prompts if 8 <= len(p) < 100][:4]
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        answers, rounds = drafts_of(llm, some)
        assert spec_counters(llm)["num_draft_tokens"] > 0
        drafter = runner(llm).drafter
        kinds = [type(step) for step in drafter.model.kept]
        assert kinds.count(AttentionBranch) == 3 and kinds.count(MlpBranch) == 2 and len(kinds) == 7
        assert {int(n.split(".")[2]) for n in drafter._draft_attn_layer_names} == {0, 2, 5, 8, 14}
        mine = {id(p) for p in drafter.model.parameters()}
        assert mine <= {id(p) for p in runner(llm).model.parameters()}  # no weight was copied
    want = [plain_tokens[prompts.index(p)] for p in some]
    assert_identical([[a[0]] for a in answers], [[w[0][:NEW]] for w in want])

    assert_drafts_are_offline(stack, KEEP, {}, some, answers, rounds, other_than=(KeepSet(KEEP.layers), None))


def test_the_keep_set_is_part_of_the_config_its_hash_and_its_repr(target, tmp_path):
    from vllm import EngineArgs

    def config_of(name: str, keep: KeepSet):
        plan = write_plan(target, tmp_path / name, keep, K, curve=[])
        settings = {"method": "sdfp", "model": plan}
        args = EngineArgs(str(target), dtype="float32", speculative_config=settings)
        return args.create_engine_config().speculative_config

    whole, attention = config_of("whole", KeepSet((2, 14))), config_of("attention", KeepSet((2, 14), (5,)))
    mlp, both = config_of("mlp", KeepSet((2, 14), mlp=(5,))), config_of("both", KEEP)
    rounded = config_of("rounded", DraftView.at(KEEP, {("attention", 5): "int8"}))
    assert len({c.compute_hash() for c in (whole, attention, mlp, both, rounded)}) == 5
    assert both.view == KEEP and "view='2 14, attention of 0 5 8, MLP of 4 15'" in repr(both)
    assert rounded.view.keep == KEEP and "in full but for attention 5 int8'" in repr(rounded)


def test_a_draft_without_attention_is_refused(target, tmp_path):
    plan = write_plan(target, tmp_path, KeepSet(mlp=(0, 15)), K, curve=[])
    with (
        pytest.raises(SdfpError, match=r"keeps no attention \(MLP of 0 15\)"),
        engine(target, {"method": "sdfp", "model": plan}),
    ):
        pass
