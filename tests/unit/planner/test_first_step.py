"""The smooth judge of one draft step: against distributions computed by hand and finite differences."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.planner.first_step import FirstStep, gates_of
from sdfp_vllm.planner.rollout import DraftRollout
from sdfp_vllm.planner.shared_attention import rollout_attention
from tests.unit.planner.test_rollout import _text, _tiny

KEEP = KeepSet(layers=(3,), attention=(0,), mlp=(1,))


@pytest.fixture(params=["llama", "gemma3_text", "qwen3"], name="rollout", scope="module")
def _rollout(request) -> DraftRollout:
    stack = _tiny(request.param)
    return DraftRollout(stack, _text(stack))


@torch.no_grad()
def distributions(rollout: DraftRollout, keep: KeepSet | None) -> torch.Tensor:
    rows = rollout.all_rows()
    ids = rollout.text.ids[rows.sequence, rows.start]
    whole = KeepSet(tuple(range(rollout.stack.num_layers)))
    with rollout.stack.keeping(keep or whole), rollout_attention(rollout.stack):
        return rollout.stack.head(rollout.hidden(ids, rows.start, rows)).softmax(-1)


def test_overlap_and_divergence_are_those_of_the_distributions(rollout):
    first, p, q = FirstStep(rollout), distributions(rollout, None), distributions(rollout, KEEP)
    assert first.overlap(KEEP) == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), abs=1e-5)
    loss, _ = first.divergence(gates_of(KEEP, 4))
    assert loss == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert first.overlap(KEEP) < 0.99 and loss > 0.01
    ones = torch.ones(4, 2)
    assert first.overlap(KeepSet((0, 1, 2, 3))) == pytest.approx(1.0, abs=1e-5)
    assert first.divergence(ones)[0] == pytest.approx(0.0, abs=1e-5)


def test_the_derivative_is_the_loss_s_slope_also_where_a_gate_is_shut(rollout):
    first, gates = FirstStep(rollout), gates_of(KEEP, 4)
    _, slope = first.divergence(gates)
    step = 1e-2
    for i, j in ((0, 0), (0, 1), (2, 0), (2, 1), (3, 1)):
        change = torch.zeros(4, 2)
        change[i, j] = step
        rise = first.divergence(gates + change)[0] - first.divergence(gates - change)[0]
        assert slope[i, j].item() == pytest.approx(rise / (2 * step), rel=0.05, abs=2e-3)


def test_a_part_of_the_text():
    stack = _tiny()
    rollout = DraftRollout(stack, _text(stack, sequences=4))
    few = FirstStep(rollout, sequences=2)
    again = FirstStep(DraftRollout(stack, rollout.text.split(2)[0]))
    assert few.overlap(KEEP) == pytest.approx(again.overlap(KEEP), abs=1e-6)
    assert few.overlap(KEEP) != pytest.approx(FirstStep(rollout).overlap(KEEP), abs=1e-6)
    assert stack.model.model.layers is stack.layers


def test_overlaps_resumed_from_a_center_are_those_from_the_start(rollout):
    """Drops, additions, swaps and splits at the first, a middle and the last layer."""
    center = KeepSet(layers=(0, 1, 3))
    others = [
        center,
        KeepSet((0, 1)),
        KeepSet((1, 3)),
        KeepSet((0, 1, 2, 3)),
        KeepSet((0, 2, 3)),
        KeepSet(layers=(0, 3), attention=(1,)),
        KeepSet(layers=(0, 1), mlp=(3,)),
        KeepSet((2,)),
    ]
    for middle in (center, KEEP):
        resumed = FirstStep(rollout)
        resumed.center(middle)
        for keep in others:
            assert resumed.overlap(keep) == pytest.approx(FirstStep(rollout).overlap(keep), abs=1e-6)
    first, layers = FirstStep(rollout), _Counted(rollout.stack)
    first.center(center)
    with layers:
        first.overlap(KeepSet((0, 1)))
        assert layers.run == []
        first.overlap(KeepSet((0, 1, 2, 3)))
        assert layers.run == [2, 3]
        first.overlap(center)
        assert layers.run == [2, 3]


class _Counted:
    """While open, notes the layers that run."""

    def __init__(self, stack):
        self.stack, self.run = stack, []

    def __enter__(self):
        self.hooks = [
            layer.register_forward_hook(lambda *_, i=i: self.run.append(i))
            for i, layer in enumerate(self.stack.layers)
        ]

    def __exit__(self, *exc):
        for hook in self.hooks:
            hook.remove()
