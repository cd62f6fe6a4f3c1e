"""What a plan's hooks cost where nothing is skipped, and whether a plan's time is its share of the compute.

    python -m benchmarks.studies.dipgo_overhead --out benchmarks/results/dipgo_overhead.json

The digits models, and two random pipelines with the hidden sizes of real ones and few blocks: PixArt (width 1152, two blocks) and
FLUX (width 3072, one double block and one single). One image, one thread, CPU time; the plain pipeline, the hooks with every gate
open, and the plans take turns, and medians are compared. `hooks_direct` is the time spent in the hooks themselves, measured around
them and inside them, over the plain pipeline's: differences of whole generations are too noisy to tell one percent apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.digits import GUIDANCE
from sdfp_vllm.common.machine import processor
from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.dipgo.clock import Clock
from sdfp_vllm.dipgo.layout import Gates, Layout
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.sampling import Conditions, Sampler, load_conditions
from sdfp_vllm.dipgo.task import macs_of
from tests.support.tiny_families import _vae
from tests.toy.digits.identity_vae import IdentityVae
from tests.toy.digits.pipelines import digits_folder, digits_pipeline

TOY_STEPS, WIDE_STEPS = 20, 12
NO_TEXT = {"text_encoder": None, "tokenizer": None}


def digits(name: str) -> Sampler:
    pipe = digits_pipeline(name)  # type: ignore[arg-type]
    return Sampler(pipe, load_conditions(pipe, digits_folder(name)), TOY_STEPS, GUIDANCE)  # type: ignore[arg-type]


def pixart() -> Sampler:
    """256 tokens."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    net = PixArtTransformer2DModel(
        num_layers=2, sample_size=32, caption_channels=4096, use_additional_conditions=False
    )
    pipe = PixArtAlphaPipeline(
        transformer=net, vae=IdentityVae(), scheduler=DDIMScheduler(clip_sample=False), **NO_TEXT
    )
    texts = {name: torch.randn(2, 120, 4096) for name in ("prompt_embeds", "negative_prompt_embeds")}
    texts |= {
        name.replace("embeds", "attention_mask"): torch.ones(2, 120, dtype=torch.int64) for name in texts
    }
    return Sampler(
        pipe, Conditions(texts), WIDE_STEPS, 4.5, negative_prompt=None, use_resolution_binning=False
    )


def flux() -> Sampler:
    """64 tokens of the image, 32 of the text."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    net = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, guidance_embeds=True)
    pipe = FluxPipeline(
        transformer=net, vae=_vae(shift_factor=0.06), text_encoder_2=None, tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), **NO_TEXT,
    )  # fmt: skip
    texts = {"prompt_embeds": torch.randn(2, 32, 4096), "pooled_prompt_embeds": torch.randn(2, 768)}
    return Sampler(pipe, Conditions(texts), WIDE_STEPS, 3.5, height=16, width=16)


PIPELINES: dict[str, Callable[[], Sampler]] = {
    "digits DiT": lambda: digits("dit"),
    "digits U-Net": lambda: digits("unet"),
    "PixArt, 2 x 1152": pixart,
    "FLUX, 1 + 1 x 3072": flux,
}


def plans(steps: int, units: int) -> dict[str, Gates]:
    """Gates by name; the first two steps run, as for a straight line."""
    t, i = np.ogrid[:steps, :units]
    found = {
        "nothing closed": np.ones((steps, units), bool),
        "every fourth closed": (t + i) % 4 != 3,
        "every second closed": (t + i) % 2 == 0,
        "two of three closed": (t + i) % 3 == 0,
        "every second step closed": (t + 0 * i) % 2 == 0,
    }
    for gates in found.values():
        gates[:2] = True
    return found


def in_hooks(sampler: Sampler, layout: Layout, reuse: str, seeds: list[int]) -> float:
    """Seconds in the hooks of a generation with every gate open: in the clock's, and in the units' less the units."""
    spent = 0.0

    def timed(call: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent += sign * (time.perf_counter() - began)

        run.__module__ = __name__
        return run

    everything = plans(sampler.calls, len(layout.units))["nothing closed"]
    modules = [m for denoiser in sampler.denoisers for m in layout.modules(denoiser)]
    originals = Clock.enter, Clock.leave
    for module in modules:
        module.forward = timed(module.forward, -1)  # type: ignore[method-assign]
    try:
        with Skipping(sampler.denoisers, layout, everything, reuse, 1, sampler.rhythm):
            under = [module.forward for module in modules]
            for module in modules:
                module.forward = timed(module.forward, 1)  # type: ignore[method-assign]
            Clock.enter, Clock.leave = (timed(each, 1) for each in originals)  # type: ignore[method-assign]
            sampler.latents(seeds)
            for module, forward in zip(modules, under, strict=True):
                module.forward = forward  # type: ignore[method-assign]
    finally:
        Clock.enter, Clock.leave = originals  # type: ignore[method-assign]
        for module in modules:
            vars(module).pop("forward", None)
    return spent


def rows(name: str, sampler: Sampler, repeats: int) -> list[dict[str, Any]]:
    layout, seeds = sampler.layout("block"), [5]
    reuse = "residual" if layout.residual else "output"
    macs = macs_of(sampler, layout)
    gates: dict[str, Gates | None] = {"plain": None, **plans(sampler.calls, len(layout.units))}
    seconds: dict[str, list[float]] = {each: [] for each in gates}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for each, some in gates.items():
                began = time.thread_time()
                if some is None:
                    sampler.latents(seeds)
                else:
                    closed = layout.closure(some, reuse)
                    with Skipping(sampler.denoisers, layout, closed, reuse, 1, sampler.rhythm):
                        sampler.latents(seeds)
                if repeat:  # the first warms up
                    seconds[each].append(time.thread_time() - began)
        direct = statistics.median(in_hooks(sampler, layout, reuse, seeds) for _ in range(5))
    plain = statistics.median(seconds["plain"])
    found = []
    for each, some in gates.items():
        if some is not None:
            found.append({
                "pipeline": name, "plan": each, "reuse": reuse, "steps": sampler.calls,
                "compute": macs.share(layout.closure(some, reuse)),
                "time": statistics.median(seconds[each]) / plain,
                "plain_seconds": plain, "seconds": seconds[each],
            })  # fmt: skip
            print({k: v for k, v in found[-1].items() if k != "seconds"}, flush=True)
    found[0]["hooks_direct"] = direct / plain
    print(f"{name}: hooks {direct * 1e3:.2f} ms of {plain * 1e3:.0f} ms, {direct / plain:.2%}", flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--only", choices=list(PIPELINES), nargs="*", default=list(PIPELINES))
    a = p.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    found = [row for name in a.only for row in rows(name, PIPELINES[name](), a.repeats)]
    content = {
        "settings": {"repeats": a.repeats, "machine": processor()},
        "rows": found,
        "provenance": provenance(),
        "wall_seconds": time.time() - began,
    }
    if a.out:
        save_results(a.out, content)


if __name__ == "__main__":
    sys.exit(main())
