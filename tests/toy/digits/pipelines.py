"""The digits pipelines, toys for tests and for the diffusion demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

# diffusers takes a component's class only from a module that was imported before.
import tests.toy.digits.identity_vae  # noqa: F401
from sdfp_vllm.dipgo.pipelines import load_pipeline

Name = Literal["dit", "unet", "flow"]


def digits_folder(name: Name) -> Path:
    return Path(__file__).parent / name


def digits_pipeline(name: Name) -> Any:
    """A DiTPipeline ("dit") or StableDiffusionPipeline ("unet") of digits, or a StableDiffusion3Pipeline ("flow") of pictures of four, in float32."""
    return load_pipeline(digits_folder(name))
