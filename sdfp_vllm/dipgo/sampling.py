"""Runs a pipeline on given seeds up to its latents, through the pipeline's own call, with gradients if asked."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.dipgo.fingerprint import SchedulerFingerprint, scheduler_fingerprint
from sdfp_vllm.dipgo.layout import denoiser_of
from sdfp_vllm.errors import SdfpError

CONDITIONS_FILE = "conditions.safetensors"
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a bowl of fruit on a wooden table, oil painting",
    "a street in the rain at night, neon signs",
    "a portrait of an old fisherman",
    "a fox in a snowy forest",
    "a small house by a lake in the mountains",
    "an isometric drawing of a city block",
    "a cat asleep on a stack of books",
)


class _AtDecoder(Exception):
    def __init__(self, latents: Tensor):
        self.latents = latents


@dataclass(frozen=True)
class Conditions:
    """What images are made of: for each named argument of the pipeline's call, one value per condition."""

    values: dict[str, Sequence[Any] | Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def of(self, seeds: Sequence[int]) -> dict[str, Any]:
        """The arguments for one image per seed; which condition an image has follows from its seed."""
        rows = [random.Random(seed).randrange(len(self)) for seed in seeds]
        return {
            name: values[rows] if isinstance(values, Tensor) else [values[r] for r in rows]
            for name, values in self.values.items()
        }


def load_conditions(pipe: Any, folder: Path, prompts: Path | None = None) -> Conditions:
    """The conditions to search on: class labels for a DiT, else prompts, else `conditions.safetensors` of `folder`.

    Args:
        prompts: A text file with a prompt per line; without it a few built-in ones.

    Raises:
        SdfpError: If the file is unreadable or empty, or the pipeline can take neither.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "class_labels" in parameters:
        labels = sorted(set(pipe.labels.values())) or range(pipe.transformer.config.num_embeds_ada_norm)
        return Conditions({"class_labels": list(labels)})
    if prompts is None and (folder / CONDITIONS_FILE).is_file():
        from safetensors.torch import load_file

        try:
            tensors = load_file(folder / CONDITIONS_FILE)
        except Exception as e:
            raise SdfpError(
                str(folder / CONDITIONS_FILE), f"cannot be read ({e})", "Write it with safetensors."
            ) from e
        if unknown := set(tensors) - set(parameters):
            raise SdfpError(
                str(folder / CONDITIONS_FILE),
                f"{', '.join(sorted(unknown))}: no argument of {type(pipe).__name__}",
                "Name its tensors as the arguments are named.",
            )
        return Conditions(dict(tensors))
    if getattr(pipe, "tokenizer", None) is None:
        raise SdfpError(
            type(pipe).__name__,
            "has no tokenizer to read prompts with",
            f"Put prompt embeddings into {CONDITIONS_FILE} in the pipeline's folder.",
        )
    if prompts is None:
        return Conditions({"prompt": list(PROMPTS)})
    try:
        lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise SdfpError(f"--prompts {prompts}", f"cannot be read ({e})", "Give a text file.") from e
    if not lines:
        raise SdfpError(f"--prompts {prompts}", "is empty", "Give a prompt per line.")
    return Conditions({"prompt": lines})


class Sampler:
    """Makes the latents of given seeds with given settings.

    Image i of a call depends on seed i alone, but for noise that a scheduler draws without a generator.

    Args:
        arguments: Further arguments of every call of the pipeline.

    Attributes:
        calls: Denoiser calls of a generation (more than `steps` for some schedulers).
    """

    def __init__(
        self, pipe: Any, conditions: Conditions, steps: int, guidance_scale: float, **arguments: Any
    ):
        self.pipe, self.conditions, self.steps = pipe, conditions, steps
        self._arguments = {"guidance_scale": guidance_scale, **arguments}
        pipe.set_progress_bar_config(disable=True)
        _, self.denoiser = denoiser_of(pipe)
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        try:
            pipe.scheduler.set_timesteps(steps)
        except (TypeError, ValueError) as e:
            raise SdfpError(
                f"--steps {steps}", f"the scheduler refuses it ({e})", "Give another number."
            ) from e
        self.scheduler: SchedulerFingerprint = scheduler_fingerprint(pipe.scheduler)
        self.calls = len(self.scheduler.timesteps)
        # `__call__` is wrapped in torch.no_grad(); search needs what is inside.
        self._call = inspect.unwrap(type(pipe).__call__)

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Final latents (images, channels, height, width), as the decoder would get them."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with _stop_at_decoder(self.pipe), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds[0])  # schedulers that add noise without being given a generator
            try:
                self._call(
                    self.pipe,
                    num_inference_steps=self.steps,
                    generator=generators,
                    **self.conditions.of(seeds),
                    **self._arguments,
                )
            except _AtDecoder as reached:
                return reached.latents
        raise SdfpError(type(self.pipe).__name__, "never called its VAE", "Use a latent diffusion pipeline.")

    def decode(self, latents: Tensor) -> Tensor:
        """Images (images, channels, height, width), values about [-1, 1]."""
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def first_call(self) -> tuple[tuple, dict[str, Any]]:
        """Arguments of the denoiser's first call for one image, for counting MACs."""
        seen: list[tuple[tuple, dict[str, Any]]] = []

        def note(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _AtDecoder(torch.empty(0))

        handle = self.denoiser.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with torch.no_grad():
                self.latents([0])
        finally:
            handle.remove()
        return seen[0]


@contextmanager
def _stop_at_decoder(pipe: Any) -> Iterator[None]:
    def reached(latents: Tensor, *_: Any, **__: Any) -> None:
        raise _AtDecoder(latents)

    pipe.vae.decode = reached
    try:
        yield
    finally:
        del pipe.vae.decode  # the instance's attribute; the class's method is back
