"""Rotary positions of draft steps with M-RoPE: a place in the sequence plus the request's delta, in every row, never below 0."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sdfp_vllm.engine.v1.positions import RotaryPositions as V1
from sdfp_vllm.engine.v2.positions import RotaryPositions as V2


def test_of_the_v1_runner():
    rows = torch.full((3, 9), 77)
    rotary = V1(rows)
    requests = {
        name: SimpleNamespace(mrope_position_delta=delta) for name, delta in {"a": -5, "b": 0, "c": 3}.items()
    }
    rotary.begin(requests, ["c", "a"])
    rotary.follow(torch.tensor([10, 20]))
    first = rotary.first(2)
    assert first.tolist() == [[13, 15]] * 3 and first.data_ptr() == rows.data_ptr()
    rotary.begin(requests, ["a", "b", "c"])  # another batch, another order
    rotary.follow(torch.tensor([2, 20, 30]))
    assert rotary.first(4).tolist() == [[0, 20, 33, 77]] * 3  # what lies behind the batch is padding


def test_of_the_v2_runner():
    rotary = V2(3, 8, torch.device("cpu"))
    state = SimpleNamespace(prefill_delta=SimpleNamespace(gpu=torch.tensor([0, -5, 3], dtype=torch.int32)))
    rotary.begin(state, torch.tensor([2, 1, -1], dtype=torch.int32))
    at = rotary.at(torch.tensor([10, 20, 0, 0]))
    assert at.shape == (3, 4) and at[:, :2].tolist() == [[13, 15]] * 3
    again = rotary.at(torch.tensor([11, 21]))  # the next step of a captured round
    assert again.tolist() == [[14, 16]] * 3 and again.data_ptr() == at.data_ptr()
    state.prefill_delta.gpu = torch.tensor([-9, -9, -9], dtype=torch.int32)  # vLLM's buffer moves
    assert rotary.at(torch.tensor([12, 22])).tolist() == [[15, 17]] * 3
    rotary.begin(state, torch.tensor([0]))
    assert rotary.at(torch.tensor([3])).tolist() == [[0]] * 3
