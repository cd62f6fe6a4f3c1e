"""The two-stream flow-matching toy: it draws what the text says, can be searched, and skips what a plan leaves out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console

from sdfp_vllm.common.progress import stages
from sdfp_vllm.dipgo.job import SearchOptions, find
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.dipgo.task import task_of
from tests.toy.digits.data import CLASSES, PLACES, cut, digits, pictures
from tests.toy.digits.flow import TEXTS, conditions
from tests.toy.digits.judge import judge
from tests.toy.digits.pipelines import digits_folder, digits_pipeline
from tests.unit.dipgo.test_dipgo_runtime import count_executions

STEPS = 8


@pytest.fixture(scope="module")
def sampler():
    pipe = digits_pipeline("flow")
    return Sampler(pipe, load_conditions(pipe, digits_folder("flow")), STEPS, 4.0)


def test_it_draws_the_digits_of_the_text_in_their_places(sampler):
    assert len(sampler.conditions) == TEXTS
    seeds = list(range(12))
    classes = sampler.conditions.of(seeds)["prompt_embeds"][..., : CLASSES + 1].argmax(-1)
    assert classes.shape == (12, PLACES) and classes.max() < CLASSES
    made = sampler.latents(seeds)
    assert made.shape == (12, 1, 16, 16)
    asked = classes.flatten().tolist()
    assert judge().accuracy(made, asked) >= 0.75
    elsewhere = classes.roll(1, 1).flatten().tolist()
    assert judge().accuracy(made, elsewhere) < 0.5  # so places count
    assert judge().fid(made) < judge().fid(torch.randn(12, 1, 16, 16))


def test_texts_of_the_file_are_those_of_the_script(sampler):
    for name, values in conditions().items():
        assert torch.equal(sampler.conditions.values[name], values)


def test_pictures_are_cut_where_they_were_joined():
    images, _ = digits()
    four = images[:24].reshape(6, PLACES, 1, 8, 8)
    assert torch.equal(cut(pictures(four)), images[:24]) and torch.equal(cut(images[:24]), images[:24])
    assert torch.equal(pictures(four)[0, 0, :8, 8:], four[0, 1, 0])  # the second digit is at the top right


def test_a_search_ends_in_gates_that_can_be_run(sampler):
    options = SearchOptions(
        steps=STEPS, budget=0.6, guidance_scale=4.0, images=1, projections=1, rounds=1, granularity="block"
    )
    with stages(Console(quiet=True)) as progress:
        found = find(sampler, options, progress)
    assert found.gates[0].all() and not found.gates.all()
    assert found.task.cost.share(found.gates) <= 0.6
    assert torch.isfinite(found.task.run(found.gates, [1, 2], found.forecasts)).all()


@pytest.mark.parametrize(
    ("granularity", "reuse"), [("block", "residual"), ("block", "output"), ("step", "output")]
)
def test_closed_units_do_not_run(sampler, granularity, reuse):
    task = task_of(sampler, granularity, reuse, 1, 1.0)
    gates = np.random.default_rng(0).random((STEPS, len(task.layout.units))) < 0.6
    gates[0] = True
    gates = task.layout.closure(gates, reuse)
    ran, handles = count_executions(sampler, task.layout)
    try:
        made = task.run(gates, [1, 2])
    finally:
        for handle in handles:
            handle.remove()
    assert [ran[i] for i in range(len(task.layout.units))] == gates.sum(0).tolist()
    assert torch.isfinite(made).all() and not torch.equal(made, sampler.latents([1, 2]))
