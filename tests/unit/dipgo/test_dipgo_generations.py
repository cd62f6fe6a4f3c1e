"""Generations that share a denoiser, and those that change on the way: the image of the plan, or one refusal."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback

from sdfp_vllm.dipgo import apply_dipgo
from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.errors import SdfpError
from tests.support.tiny_pipelines import STEPS, scheduler, tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import gates_of, make_plan


def generate(pipe, row=0, steps=STEPS, **arguments):
    """Latents of a pipeline's own call."""
    generator = torch.Generator().manual_seed(row)
    if isinstance(pipe, DiTPipeline):
        told = {"class_labels": [row + 1]}
        pipe.vae.decode = lambda latents: [latents]
    else:
        drawn = torch.randn(2, 1, 4, 12, generator=generator)
        told = {"prompt_embeds": drawn[0], "negative_prompt_embeds": drawn[1], "output_type": "latent"}
    arguments = {"guidance_scale": 3.0, "generator": generator, **told, **arguments}
    return pipe(num_inference_steps=steps, return_dict=False, **arguments)[0]


def sibling(pipe, schedule=None):
    """Another pipeline around the same denoiser, with a scheduler of its own."""
    other = StableDiffusionPipeline(
        **(pipe.components | {"scheduler": schedule or scheduler()}), requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    return other


def step_gates(row):
    return np.array([[c == "1"] for c in row])


def planned(kind="sd", granularity="block", seed=0):
    """A sampler, its plan that skips about half, and the images of it, each of a denoiser of its own."""
    sampler = tiny_sampler(kind)
    gates = gates_of(sampler, layout_of(sampler.denoiser, granularity), seed)
    plan = make_plan(sampler, gates, granularity)
    with apply_dipgo(sampler.pipe, plan):
        images = [generate(sampler.pipe, row) for row in range(2)]
    assert not torch.equal(images[0], generate(sampler.pipe, 0))
    return sampler, plan, images


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


@pytest.mark.parametrize(("row", "reused"), [("11011", True), ("11001", True), ("11101", False)])
def test_guidance_that_ends_is_refused_where_the_plan_reuses_over_its_end(row, reused):
    sampler = tiny_sampler("sd")
    cut = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)}
    full = generate(sampler.pipe, **cut)
    with apply_dipgo(sampler.pipe, make_plan(sampler, step_gates(row), "step")):
        if reused:
            with pytest.raises(SdfpError, match=r"the batch has changed from \(2, 4, 16, 16\) to \(1, 4"):
                generate(sampler.pipe, **cut)
        else:
            image = generate(sampler.pipe, **cut)
            assert image.shape == full.shape and not torch.equal(image, full)


def test_guidance_that_ends_is_refused_with_blocks_too():
    sampler = tiny_sampler("sd")
    gates = np.ones((STEPS, len(layout_of(sampler.denoiser, "block").units)), dtype=bool)
    gates[2, 2] = False
    cut = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)}
    with apply_dipgo(sampler.pipe, make_plan(sampler, gates)):
        with pytest.raises(SdfpError, match="reuses values of call 1 in call 2"):
            generate(sampler.pipe, **cut)
        assert torch.isfinite(generate(sampler.pipe)).all()


def test_rows_at_different_timesteps_are_refused():
    sampler = tiny_sampler("dit")
    times = sampler.scheduler.timesteps
    with apply_dipgo(sampler.pipe, make_plan(sampler)), pytest.raises(SdfpError, match="different timesteps"):
        sampler.denoiser(
            torch.zeros(2, 2, 8, 8), timestep=torch.tensor(times[:2]), class_labels=torch.tensor([1, 2])
        )


@pytest.mark.parametrize("granularity", ["block", "step"])
def test_pipelines_in_threads_give_their_own_images(granularity):
    sampler, plan, images = planned(granularity=granularity)
    with apply_dipgo(sampler.pipe, plan):
        pipes = [sampler.pipe, sibling(sampler.pipe)]
        at_once, wrong = threading.Barrier(2), []

        def work(row):
            try:
                for _ in range(4):
                    # They meet in every step, so that each comes in between the other's calls.
                    image = generate(pipes[row], row, callback_on_step_end=meet)
                    if not torch.equal(image, images[row]):
                        wrong.append(row)
            except Exception as e:
                wrong.append(e)
                at_once.abort()

        def meet(pipe, step, t, values):
            at_once.wait(60)
            return values

        threads = [threading.Thread(target=work, args=(row,)) for row in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_generation_inside_another_leaves_it_alone_finished_or_not():
    sampler, plan, images = planned()
    with apply_dipgo(sampler.pipe, plan):
        other = sibling(sampler.pipe)
        seen = []

        def preview(pipe, step, t, values):
            seen.append(generate(other, 1))
            with pytest.raises(Stop):
                generate(other, 1, callback_on_step_end=stop)
            return values

        assert torch.equal(generate(sampler.pipe, 0, callback_on_step_end=preview), images[0])
        assert len(seen) == STEPS and all(torch.equal(image, images[1]) for image in seen)


def test_a_cancelled_generation_is_not_gone_on_with_by_another_pipeline():
    sampler, plan, images = planned()
    later = DDIMScheduler(num_train_timesteps=800, steps_offset=1, clip_sample=False)
    other = sibling(sampler.pipe, later)
    later.set_timesteps(STEPS - 1)
    assert later.timesteps.tolist() == sampler.scheduler.timesteps[1:]  # it begins where the first goes on
    with apply_dipgo(sampler.pipe, plan):
        with pytest.raises(Stop):
            generate(sampler.pipe, 1, callback_on_step_end=stop)
        with pytest.raises(SdfpError, match="the settings of DDIMScheduler differ"):
            generate(other, 0, STEPS - 1)
        assert torch.equal(generate(sampler.pipe, 0), images[0])


def test_the_scheduler_that_counts_is_that_of_the_pipeline_that_runs():
    sampler, plan, images = planned()
    with apply_dipgo(sampler.pipe, plan):
        assert torch.equal(generate(sampler.pipe, 0), images[0])
        with pytest.raises(SdfpError, match="the settings of DDIMScheduler differ"):
            generate(sibling(sampler.pipe, scheduler(beta_end=0.03)), 0)  # the same timesteps
        assert torch.equal(generate(sibling(sampler.pipe), 1), images[1])


def test_cancelled_generations_are_forgotten():
    sampler, plan, _ = planned()
    with apply_dipgo(sampler.pipe, plan) as handle:

        def cancel(pipe):
            with pytest.raises(Stop):
                generate(pipe, 1, callback_on_step_end=stop)

        for _ in range(5):
            cancel(sampler.pipe)
        thread = threading.Thread(target=cancel, args=(sibling(sampler.pipe),))
        thread.start()
        thread.join()
        generate(sampler.pipe, 0)
        assert not handle._clock._under_way and not handle._clock._inside


def test_loops_of_ones_own_take_turns():
    sampler = tiny_sampler("dit")
    layout = layout_of(sampler.denoiser, "block")
    gates = gates_of(sampler, layout)

    def loop(seed):
        """A hand-written generation, a step at a time."""
        schedule = scheduler()
        schedule.set_timesteps(STEPS)
        sample = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        for t in schedule.timesteps:
            label = torch.tensor([seed])
            with torch.no_grad():
                noise = sampler.denoiser(sample, timestep=t.expand(1), class_labels=label).sample
            sample = schedule.step(noise, t, sample).prev_sample
            yield sample

    with Skipping(sampler.denoiser, layout, gates, "residual", 1, sampler.scheduler.timesteps) as handle:
        alone = [list(loop(seed))[-1] for seed in (1, 2)]
        for first, second in zip(loop(1), loop(2), strict=True):  # noqa: B007
            pass
        assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])
        for _ in range(20):
            next(loop(3))
        assert len(handle._clock._under_way) <= 4
