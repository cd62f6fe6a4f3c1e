"""A DiP-GO plan in vLLM-Omni on a GPU: seconds an image and PSNR to the full run, beside native fewer steps.

    python -m benchmarks.gpu.omni MODEL PLAN [--size 1024] [--images 4] [--batches 1 4] [--adapter] [--check]

One GPU with vLLM-Omni 0.30 and sdfp-vllm beside it; MODEL is a folder or a hub's name, PLAN was made with diffusers' pipeline
of the same checkpoint for this size. Each engine runs in a process of its own, in turn, on the same prompts and seeds: the
full run, the plan, the full run again in as many native steps as the plan costs, and, where the pipeline has step-wise
execution, both in batches of requests that begin `--apart` seconds
after one another, and so are at different steps. `--adapter` has diffusers' pipeline inside vLLM-Omni too.

`--check` starts nothing and needs no GPU: it holds the plan against the checkpoint, and says what would run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.published import RESULTS
from benchmarks.gpu.results import write
from sdfp_vllm.dipgo.omni.checkpoint import checkpoint_fingerprint, described, folder_of
from sdfp_vllm.dipgo.plan import DipgoPlan, load_plan

RESULT = RESULTS / "gpu_omni.json"
PROMPTS = (
    "a red bicycle against a white wall",
    "a bowl of oranges on a wooden table, morning light",
    "a lighthouse in a storm, oil painting",
    "a street market at night, neon signs, rain",
    "a portrait of an old fisherman, black and white",
    "a glass teapot with green tea, studio photograph",
    "a fox asleep in autumn leaves",
    "a paper map of an imaginary island, ink and watercolour",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("plan", nargs="?", type=Path)
    parser.add_argument("--size", type=int, default=1024, help="Height and width, as in the search.")
    parser.add_argument("--images", type=int, default=4, help="Prompts, of eight.")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 4], help="Requests at once in step-wise execution."
    )
    parser.add_argument(
        "--apart", type=float, default=0.7, help="Seconds between the starts of requests in a batch."
    )
    parser.add_argument("--adapter", action="store_true", help="Measure diffusion_load_format=diffusers too.")
    parser.add_argument("--check", action="store_true", help="Only hold the plan against the checkpoint.")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine:
        run_here(json.loads(asked.engine.read_text()), asked.engine)
        return
    if asked.model is None or asked.plan is None:
        parser.error("give MODEL and PLAN")
    plan = load_plan(asked.plan)
    check(asked.model, plan)
    engines = engines_of(plan, asked)
    for name, settings in engines:
        print(f"  {name}: {settings}")
    if asked.check:
        return
    with tempfile.TemporaryDirectory(prefix="sdfp-omni-") as folder:
        rows = measure(engines, plan, asked, Path(folder))
        write(asked.out, rows, ("sdfp-vllm", "vllm", "vllm-omni", "torch", "diffusers"))
    print(f"Wrote {asked.out}")


def check(model: str, plan: DipgoPlan) -> None:
    """Says whether the plan is for this checkpoint; ends the script if it is not."""
    folder = folder_of(model)
    if differences := plan.fingerprint.differences(checkpoint_fingerprint(folder, described(folder))):
        sys.exit(f"The plan was made for another model than {model}: {'; '.join(differences)}")
    print(
        f"The plan fits {model}: {plan.scheduler.num_inference_steps} steps of {plan.scheduler.name}, "
        f"{len(plan.units)} units, {100 * plan.compute_share:.1f} % of the compute"
    )


def engines_of(plan: DipgoPlan, asked: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of what is measured; the first is what all others' images are held against."""
    steps = plan.scheduler.num_inference_steps
    fewer = max(1, math.floor(steps * plan.compute_share))
    dipgo = {"cache_backend": "dipgo", "cache_config": {"plan": str(asked.plan.resolve())}}
    engines: list[tuple[str, dict[str, Any]]] = [
        ("full", {"engine": {}, "steps": steps, "at_once": 1}),
        ("plan", {"engine": dipgo, "steps": steps, "at_once": 1}),
        (f"{fewer} native steps", {"engine": {}, "steps": fewer, "at_once": 1}),
    ]
    if asked.adapter:
        adapter = {"diffusion_load_format": "diffusers"}
        engines += [
            ("diffusers, full", {"engine": adapter, "steps": steps, "at_once": 1}),
            ("diffusers, plan", {"engine": adapter | dipgo, "steps": steps, "at_once": 1}),
        ]
    # Of the classes that plans go on, vLLM-Omni 0.30 has step-wise execution for this one.
    if plan.fingerprint.denoiser == "QwenImageTransformer2DModel":
        for count in asked.batches:
            step_wise = {"step_execution": True, "max_num_seqs": count}
            engines += [
                (f"step-wise by {count}, full", {"engine": step_wise, "steps": steps, "at_once": count}),
                (
                    f"step-wise by {count}, plan",
                    {"engine": step_wise | dipgo, "steps": steps, "at_once": count},
                ),
            ]
    return engines


def measure(
    engines: list[tuple[str, dict[str, Any]]], plan: DipgoPlan, asked: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    reference = None
    for name, settings in engines:
        spec = folder / f"{len(rows)}.json"
        common = {
            "model": asked.model, "size": asked.size, "images": asked.images,
            "apart": asked.apart if settings["at_once"] > 1 else 0.0, "guidance": plan.made.guidance_scale, 
            "negative": plan.rhythm.branches > 1,
        }  # fmt: skip
        spec.write_text(json.dumps(settings | common))
        command = [sys.executable, "-m", "benchmarks.gpu.omni", "--engine", str(spec)]
        if subprocess.run(command, env=dict(os.environ)).returncode:
            rows.append({"engine": name, "failed": True})
            print(f"  {name}: failed, see above")
            continue
        made = np.load(spec.with_suffix(".npz"))
        images = made["images"].astype(np.float64)
        if reference is None:
            reference = images
        row = {
            "engine": name,
            "seconds_an_image": float(made["seconds"]),
            "psnr": psnr(images, reference),
        }
        rows.append(row)
        full = rows[0].get("seconds_an_image", math.nan)
        print(
            f"  {name:28} {row['seconds_an_image']:7.2f} s an image  {row['seconds_an_image'] / full:5.2f} of full"
            f"  {row['psnr']:5.1f} dB"
        )
    return rows


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean over images, in dB; an image that is the same counts with 100."""
    errors = ((images - reference) ** 2).mean(axis=(1, 2, 3))
    return statistics.mean(100.0 if e == 0 else 10 * math.log10(255**2 / e) for e in errors)


def run_here(spec: dict[str, Any], place: Path) -> None:
    """One engine: generates each prompt once to warm up and once for the clock."""
    asyncio.run(_run_here(spec, place))


async def _run_here(spec: dict[str, Any], place: Path) -> None:
    from vllm_omni import AsyncOmni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    omni = AsyncOmni(model=spec["model"], **spec["engine"])
    prompts = [
        {"prompt": text} | ({"negative_prompt": " "} if spec["negative"] else {})
        for text in PROMPTS[: spec["images"]]
    ]

    async def image(number: int, run: str, slots: asyncio.Semaphore) -> Any:
        await asyncio.sleep(number * spec["apart"])
        params = OmniDiffusionSamplingParams(
            num_inference_steps=spec["steps"], seed=number, height=spec["size"], width=spec["size"],
            guidance_scale=spec["guidance"], guidance_scale_provided=True, true_cfg_scale=spec["guidance"],
        )  # fmt: skip
        async with slots:
            outputs = omni.generate(
                prompts[number], request_id=f"{run}-{number}", sampling_params_list=[params]
            )
            return [output async for output in outputs][-1].images[0]

    async def all_images(run: str) -> list[Any]:
        slots = asyncio.Semaphore(spec["at_once"])
        return await asyncio.gather(*(image(i, run, slots) for i in range(len(prompts))))

    await all_images("warm-up")
    start = time.perf_counter()
    images = await all_images("timed")
    seconds = (time.perf_counter() - start) / len(images)
    np.savez(
        place.with_suffix(".npz"),
        images=np.stack([np.asarray(image.convert("RGB")) for image in images]),
        seconds=seconds,
    )
    omni.shutdown()


if __name__ == "__main__":
    main()
