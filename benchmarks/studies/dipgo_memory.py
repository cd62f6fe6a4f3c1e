"""Peak memory of DiP-GO's searches.

    python -m benchmarks.studies.dipgo_memory --out benchmarks/results/dipgo_memory.json

Two parts. One iteration of the learned search on the digits DiT, with and without gradient checkpointing. And a recording of the
default search on a U-Net and a decoder of Stable Diffusion 1.5's size (random weights, bfloat16): as one graph with the
activations of all calls, which is how it was before there was a limit, and call by call with several limits.

Each case is a process of its own; the figure is the growth of its peak resident memory over that after one plain generation of
the same images. Pages of files that the system keeps cached are not in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.common.results_file import save_results

MIB = 1 << 20
STABLE_DIFFUSION_LIMITS = (None, 1024)  # MiB


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def learned(checkpointed: bool, images: int, steps: int) -> dict[str, float]:
    """One iteration on the digits DiT."""
    import torch

    from sdfp_vllm.dipgo.families import layout_of
    from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
    from sdfp_vllm.dipgo.supernet import SuperNet
    from tests.toy.digits.pipelines import digits_folder, digits_pipeline

    torch.set_num_threads(1)
    pipe = digits_pipeline("dit")
    sampler = Sampler(pipe, load_conditions(pipe, digits_folder("dit")), steps, 2.0)
    layout = layout_of(sampler.denoiser, "block")
    seeds = list(range(images))
    sampler.latents(seeds)
    before = peak_mib()
    gates = torch.ones(sampler.calls, len(layout.units), requires_grad=True)
    began = time.process_time()
    with SuperNet(sampler, layout, "residual", checkpointed) as net:
        net.latents(seeds, gates).square().sum().backward()
    return {"growth_mib": peak_mib() - before, "cpu_seconds": time.process_time() - began}


def stable_diffusion(steps: int, latent_size: int) -> Any:
    """A sampler of a pipeline of Stable Diffusion 1.5's size on random weights, in bfloat16."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from sdfp_vllm.dipgo.sampling import Conditions, Sampler

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # so that no float32 copy of the weights is in the peak
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=latent_size, cross_attention_dim=768),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    texts = {name: torch.randn(2, 77, 768).bfloat16() for name in ("prompt_embeds", "negative_prompt_embeds")}
    return Sampler(pipe, Conditions(texts), steps, 7.5)


def recording(way: str, images: int, steps: int, latent_size: int, projections: int) -> dict[str, Any]:
    """One recording; `way` is "graph" for one graph of everything, else the limit in MiB or "None"."""
    import torch

    from sdfp_vllm.dipgo import surrogate
    from sdfp_vllm.dipgo.room import room_for
    from sdfp_vllm.dipgo.spill import Spill

    torch.set_num_threads(1)
    sampler = stable_diffusion(steps, latent_size)
    layout, seeds = sampler.layout("block"), list(range(images))
    with torch.no_grad():
        sampler.decode(sampler.latents(seeds))
    before, began = peak_mib(), time.process_time()
    found: dict[str, Any] = {}
    if way == "graph":
        # What requires gradients from the first unit on: every activation of every call is saved.
        sampler.denoiser.conv_in.register_forward_hook(lambda _, __, output: output.requires_grad_())
        seen = surrogate.seen(sampler, sampler.latents(seeds))
        seen.square().sum().backward()
    else:
        spills: list[Spill] = []

        class Noted(Spill):
            def __init__(self, *args: Any):
                super().__init__(*args)
                spills.append(self)

        surrogate.Spill = Noted  # type: ignore[misc]
        sampler.memory = None if way == "None" else int(way) * MIB
        if sampler.memory is not None:
            found["images_together"], spare = room_for(sampler, layout, False, projections, images)
            found["gradients_of_a_call_mib"] = spare / found["images_together"] / MIB
        surrogate.record(sampler, layout, "output", 1, seeds, projections)
        found["held_mib"] = max(s.most_held for s in spills) / MIB
        found["files_mib"] = max(s.most_stored for s in spills) / MIB
    return {"growth_mib": peak_mib() - before, "cpu_seconds": time.process_time() - began, **found}


def in_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.studies.dipgo_memory", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(*arguments, found, flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path)
    p.add_argument("--images", type=int, default=8, help="of the digits")
    p.add_argument("--steps", type=int, default=20, help="of the digits")
    p.add_argument("--sd-images", type=int, default=1)
    p.add_argument("--sd-steps", type=int, default=3)
    p.add_argument("--sd-latent-size", type=int, default=64, help="an eighth of the image")
    p.add_argument("--sd-projections", type=int, default=1)
    p.add_argument("--case", help=argparse.SUPPRESS)
    a = p.parse_args()
    sd = ("--sd-images", a.sd_images, "--sd-steps", a.sd_steps, "--sd-latent-size", a.sd_latent_size,
          "--sd-projections", a.sd_projections)  # fmt: skip
    if a.case in ("on", "off"):
        print(json.dumps(learned(a.case == "on", a.images, a.steps)))
        return
    if a.case:
        print(json.dumps(recording(a.case, a.sd_images, a.sd_steps, a.sd_latent_size, a.sd_projections)))
        return
    ways = ("graph", *STABLE_DIFFUSION_LIMITS)
    content = {
        "settings": {k: str(v) for k, v in vars(a).items() if k != "case"},
        "learned_by_checkpointing": {
            name: in_process("--case", name, "--images", a.images, "--steps", a.steps)
            for name in ("on", "off")
        },
        "recording_by_limit_mib": {str(way): in_process("--case", way, *sd) for way in ways},
        "provenance": provenance(),
    }
    if a.out:
        save_results(a.out, content)


if __name__ == "__main__":
    main()
