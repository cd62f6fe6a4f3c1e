"""Rows of several requests at different steps in one denoiser call: each as it would be alone."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.rows import Request, RowSkipping
from sdfp_vllm.errors import SdfpError
from tests.support.tiny_pipelines import tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import gates_of

TIMES = [900.0, 700.0, 500.0, 300.0, 100.0]
WAYS = [("block", "output", 0), ("block", "residual", 1), ("step", "output", 1)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32; sums of a batch of another size


@pytest.fixture(scope="module")
def denoiser():
    return tiny_sampler("dit").denoiser


def planned(denoiser, granularity, reuse, order, seed=1):
    layout = layout_of(denoiser, granularity)
    counting = SimpleNamespace(calls=len(TIMES), rhythm=SimpleNamespace(stages=(0,)))
    gates = gates_of(counting, layout, seed=seed)
    return RowSkipping(denoiser, layout, gates, reuse, order, TIMES), gates, layout


@dataclass
class Record:
    """What a server remembers of a request; `step_index` is its own count of steps."""

    latents: torch.Tensor
    label: int
    step_index: int = 0
    request: Any = None


def record(index, rows=1):
    generator = torch.Generator().manual_seed(index)
    return Record(torch.randn(rows, 2, 8, 8, generator=generator), label=index)


def step(denoiser, skipping, states, branches=1):
    """One step of these requests in a batch; Euler in the simplest form."""
    for state in states:
        state.request = state.request or Request(state)
    rows = [(state.request, len(state.latents)) for state in states]
    batch = torch.cat([state.latents for state in states])
    times = torch.cat([torch.full((len(s.latents),), TIMES[s.step_index]) for s in states])
    for branch in range(branches):
        labels = torch.cat([torch.full((len(s.latents),), s.label + 10 * branch) for s in states])
        with skipping.rows(rows), torch.no_grad():
            out = denoiser(batch, timestep=times, class_labels=labels).sample[:, :2]
    for state, piece in zip(states, out.split([len(s.latents) for s in states]), strict=True):
        state.latents = state.latents - 0.2 * piece
        state.step_index += 1


def alone(denoiser, skipping, index, branches=1, rows=1):
    state = record(index, rows)
    for _ in TIMES:
        step(denoiser, skipping, [state], branches)
    return state.latents


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_rows_at_different_steps_are_as_each_alone(denoiser, way, branches):
    skipping, gates, layout = planned(denoiser, *way)
    with skipping:
        expected = [alone(denoiser, skipping, i, branches, rows=1 + i % 2) for i in range(3)]
        a, b, c = (record(i, rows=1 + i % 2) for i in range(3))
        for states in ([a], [a, b], [b, a], [a, b, c], [a, b, c], [c, b], [c], [c]):
            step(denoiser, skipping, states, branches)
        assert [s.step_index for s in (a, b, c)] == [5, 5, 5]
        for state, latents in zip((a, b, c), expected, strict=True):
            torch.testing.assert_close(state.latents, latents, **CLOSE)
    bare = record(0)
    with torch.no_grad():
        for t in TIMES:
            bare.latents = bare.latents - 0.2 * denoiser(
                bare.latents, timestep=torch.tensor([t]), class_labels=torch.tensor([10 * (branches - 1)])
            ).sample[:, :2]  # fmt: skip
    assert not torch.allclose(bare.latents, expected[0], **CLOSE)  # the plan does leave something out
    assert (~gates).any() and layout.units


def test_alone_is_as_without_rows(denoiser):
    skipping, *_ = planned(denoiser, "block", "residual", 1)
    with skipping:
        expected = alone(denoiser, skipping, 4)
        state = record(4)
        for t in TIMES:
            with torch.no_grad():
                out = denoiser(
                    state.latents, timestep=torch.tensor([t]), class_labels=torch.tensor([4])
                ).sample[:, :2]
            state.latents = state.latents - 0.2 * out
        assert torch.equal(state.latents, expected)


def test_a_unit_runs_for_the_rows_that_need_it_alone(denoiser):
    skipping, gates, layout = planned(denoiser, "block", "residual", 0, seed=2)
    seen = []
    handles = [
        module.ff.register_forward_hook(lambda m, args, out, i=i: seen.append((i, len(args[0]))))
        for i, module in enumerate(layout.modules(denoiser))
    ]
    a, b = record(0), record(1)
    with skipping:
        step(denoiser, skipping, [a])
        for _ in range(4):
            seen.clear()
            at = a.step_index, b.step_index
            step(denoiser, skipping, [a, b])
            expected = {i: int(gates[at[0], i]) + int(gates[at[1], i]) for i in range(len(layout.units))}
            assert dict(seen) == {i: rows for i, rows in expected.items() if rows}
            assert max(Counter(i for i, _ in seen).values()) == 1
    for handle in handles:
        handle.remove()


def test_requests_in_full_run_every_unit_beside_others(denoiser):
    skipping, *_ = planned(denoiser, "block", "output", 0)
    a, b = record(0), record(1)
    b.label = 1
    with skipping:
        step(denoiser, skipping, [a])
        whole = []
        for t in TIMES[1:]:
            batch, times = torch.cat([a.latents, b.latents]), torch.tensor([t, 77.0])
            with skipping.rows([(a.request, 1), (None, 1)]), torch.no_grad():
                out = denoiser(batch, timestep=times, class_labels=torch.tensor([0, 1])).sample[:, :2]
            a.step_index += 1
            whole.append(out[1:])
    with torch.no_grad():
        bare = denoiser(b.latents, timestep=torch.tensor([77.0]), class_labels=torch.tensor([1])).sample[
            :, :2
        ]
    for each in whole:
        torch.testing.assert_close(each, bare, **CLOSE)


def test_a_request_that_was_given_up_is_forgotten(denoiser):
    skipping, *_ = planned(denoiser, "block", "residual", 1)
    with skipping:
        expected = alone(denoiser, skipping, 2)
        for _ in range(8):
            state = record(1)
            step(denoiser, skipping, [state])
            del state
            gc.collect()
        assert len(skipping._clock._under_way) <= 1
        torch.testing.assert_close(alone(denoiser, skipping, 2), expected, **CLOSE)


def test_many_requests_are_under_way_at_once(denoiser):
    skipping, *_ = planned(denoiser, "block", "residual", 1)
    with skipping:
        expected = [alone(denoiser, skipping, i) for i in range(7)]
        states = [record(i) for i in range(7)]
        for _ in TIMES:
            for state in copy.copy(states):  # call by call, in turns
                step(denoiser, skipping, [state])
        for state, latents in zip(states, expected, strict=True):
            assert torch.equal(state.latents, latents)


def test_rows_that_do_not_add_up_are_refused(denoiser):
    skipping, *_ = planned(denoiser, "block", "output", 0)
    state = record(0)
    request = Request(state)
    with skipping, torch.no_grad():
        with (
            skipping.rows([(request, 2)]),
            pytest.raises(SdfpError, match="1 rows and 1 timesteps for 2 rows"),
        ):
            denoiser(state.latents, timestep=torch.tensor([900.0]), class_labels=torch.tensor([0]))
        twice = torch.cat([state.latents] * 2)
        with (
            skipping.rows([(request, 2)]),
            pytest.raises(SdfpError, match="rows of one request are at different timesteps"),
        ):
            denoiser(twice, timestep=torch.tensor([900.0, 700.0]), class_labels=torch.tensor([0, 0]))
        with skipping.rows([(request, 1)]), pytest.raises(SdfpError, match="asks for timestep 700 where"):
            denoiser(state.latents, timestep=torch.tensor([700.0]), class_labels=torch.tensor([0]))
