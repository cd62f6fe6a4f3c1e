"""Runs a pipeline on given seeds up to its latents, through the pipeline's own call, with gradients if asked."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.dipgo.fingerprint import SchedulerFingerprint
from sdfp_vllm.dipgo.halves import is_guided
from sdfp_vllm.dipgo.layout import WHOLE, Granularity, Layout, denoisers_of
from sdfp_vllm.dipgo.rehearsal import Call, rehearse
from sdfp_vllm.dipgo.rhythm import Rhythm
from sdfp_vllm.dipgo.signature import check_layout, units_of
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
    def __init__(self, latents: Tensor, further: tuple = ()):
        self.latents, self.further = latents, further


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
        return Conditions(_with_negative(pipe, list(PROMPTS)))
    try:
        lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise SdfpError(f"--prompts {prompts}", f"cannot be read ({e})", "Give a text file.") from e
    if not lines:
        raise SdfpError(f"--prompts {prompts}", "is empty", "Give a prompt per line.")
    return Conditions(_with_negative(pipe, lines))


def _with_negative(pipe: Any, prompts: list[str]) -> dict[str, Sequence[Any] | Tensor]:
    """The prompts; for pipelines that are guided only if a negative prompt is given (Qwen-Image), an empty one with each."""
    values: dict[str, Sequence[Any] | Tensor] = {"prompt": prompts}
    if _guidance_name(pipe) == "true_cfg_scale":
        values["negative_prompt"] = [" "] * len(prompts)
    return values


def _guidance_name(pipe: Any) -> str | None:
    """The argument of the pipeline's call that says how strongly it is guided, if there is one."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    true = parameters.get("true_cfg_scale")
    # Flux has it too, switched off by its default of 1: its guidance is an input of the network.
    if true is not None and isinstance(true.default, int | float) and true.default > 1:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in parameters else None


class Sampler:
    """Makes the latents of given seeds with given settings.

    Image i of a call depends on seed i alone, but for noise that a scheduler draws without a generator.

    Args:
        arguments: Further arguments of every call of the pipeline.

    Attributes:
        rhythm: How the pipeline calls its denoiser in a generation.
        calls: Steps of a generation (more than `steps` for some schedulers).
        denoisers: The denoisers of its stages; most pipelines have one, which is `denoiser`.
        first_calls: Of every stage, the arguments of the denoiser calls of its first step, for one image.
        units: A description of the denoiser's blocks to use in place of what is known of its class.
        memory: Bytes that a recording of generations may hold beside the model; None: as many as it takes.
        at_once: The most images that generations without gradients make together; None: all that are asked for.

    Raises:
        SdfpError: If the pipeline cannot be called like this, or calls its denoiser in a way that cannot be planned.
    """

    def __init__(
        self, pipe: Any, conditions: Conditions, steps: int, guidance_scale: float, **arguments: Any
    ):
        self.pipe, self.conditions, self.steps, self.guidance_scale = pipe, conditions, steps, guidance_scale
        self.units: Layout | None = None
        self.memory: int | None = None
        self.at_once: int | None = None
        self._given = arguments
        self._further: tuple[Any, ...] = ()  # what the decoder is told beside the latents
        self._layouts: dict[Granularity, Layout] = {}
        parameters = inspect.signature(type(pipe).__call__).parameters
        if unknown := [name for name in arguments if name not in parameters]:
            raise SdfpError(
                f"--set {unknown[0]}", f"no argument of {type(pipe).__name__}", "Name it as its call does."
            )
        guidance = _guidance_name(pipe)
        self._arguments = {**({guidance: guidance_scale} if guidance else {}), **arguments}
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        # `__call__` is wrapped in torch.no_grad(); search needs what is inside.
        self._call = inspect.unwrap(type(pipe).__call__)
        denoisers = denoisers_of(pipe)
        try:
            found = rehearse(pipe, denoisers, lambda: self.latents([0]))
        except (TypeError, ValueError, AttributeError) as e:
            raise SdfpError(
                f"{type(pipe).__name__}, {steps} steps",
                f"cannot be called with what the search has ({e})",
                "Give another number of --steps, what it asks for with --set NAME=VALUE, or conditions.safetensors in its folder.",
            ) from e
        self.rhythm: Rhythm = found.rhythm
        self.scheduler: SchedulerFingerprint = found.scheduler
        self.first_calls: list[list[Call]] = found.calls
        self.calls = len(self.rhythm.timesteps)
        self.denoisers = [denoisers[name] for name in self.rhythm.denoisers]
        self.denoiser = self.denoisers[0]

    def with_steps(self, steps: int) -> Sampler:
        """The same with another number of steps."""
        other = Sampler(self.pipe, self.conditions, steps, self.guidance_scale, **self._given)
        other.memory, other.at_once = self.memory, self.at_once
        return other

    def weights(self) -> Iterator[Tensor]:
        """The parameters and buffers of all of the pipeline's models."""
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):
                yield from component.parameters()
                yield from component.buffers()

    @cached_property
    def guided(self) -> bool:
        """Whether guidance is in one batch, so that half of it can be left out."""
        return all(map(is_guided, self.denoisers, self.first_calls))

    def layout(self, granularity: Granularity) -> Layout:
        """The units of its denoisers.

        Raises:
            SdfpError: If they cannot be told from the class nor from a call, or are not the same in all stages.
        """
        if granularity == "step":
            return WHOLE
        if granularity not in self._layouts:
            if self.units is not None and granularity == "block":
                for denoiser, calls in zip(self.denoisers, self.first_calls, strict=True):
                    check_layout(self.units, denoiser, *calls[0])
                self._layouts[granularity] = self.units
            else:
                first, *others = (
                    units_of(denoiser, granularity, *calls[0])
                    for denoiser, calls in zip(self.denoisers, self.first_calls, strict=True)
                )
                if any(other != first for other in others):
                    raise SdfpError(
                        type(self.pipe).__name__,
                        f"has other blocks in {' and '.join(self.rhythm.denoisers)}",
                        "Use --granularity step.",
                    )
                if granularity == "guidance" and not self.guided:
                    raise SdfpError(
                        "--granularity guidance",
                        f"is for pipelines that ask {type(self.denoiser).__name__} with and without the condition in one "
                        "batch, whose halves do not depend on each other, and this one does not",
                        "Use another granularity, or a guidance scale above 1 where it has none.",
                    )
                self._layouts[granularity] = first
        return self._layouts[granularity]

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Final latents (images, channels, height, width), as the decoder would get them; of videos with frames among them."""
        if parts := self._parts(len(seeds)):
            return torch.cat([self.latents(seeds[part]) for part in parts])
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
                self._further = reached.further
                return reached.latents
        raise SdfpError(type(self.pipe).__name__, "never called its VAE", "Use a latent diffusion pipeline.")

    def decode(self, latents: Tensor) -> Tensor:
        """Images (images, channels, height, width), or videos (videos, channels, frames, height, width), about [-1, 1]."""
        if parts := self._parts(len(latents)):
            return torch.cat([self.decode(latents[part]) for part in parts])
        # Some decoders are told a timestep (LTX-Video), the same for every row.
        further = [
            x[:1].expand(len(latents), *x.shape[1:]) if isinstance(x, Tensor) and x.dim() else x
            for x in self._further
        ]
        return self.pipe.vae.decode(latents, *further, return_dict=False)[0]

    def _parts(self, images: int) -> list[slice]:
        """What to make one after the other, where all of it together is too much."""
        if self.at_once is None or images <= self.at_once or torch.is_grad_enabled():
            return []
        return [slice(i, i + self.at_once) for i in range(0, images, self.at_once)]

    def first_call(self) -> Call:
        """Arguments of the denoiser's first call for one image, for counting MACs."""
        return self.first_calls[0][0]


@contextmanager
def _stop_at_decoder(pipe: Any) -> Iterator[None]:
    def reached(latents: Tensor, *further: Any, **_: Any) -> None:
        raise _AtDecoder(latents, further)

    pipe.vae.decode = reached
    try:
        yield
    finally:
        del pipe.vae.decode  # the instance's attribute; the class's method is back
