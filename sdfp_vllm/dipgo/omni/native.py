"""vLLM-Omni's own pipelines: whether a plan made with diffusers fits one, and the hooks on its denoisers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sdfp_vllm.dipgo.layout import Layout, denoisers_of
from sdfp_vllm.dipgo.omni.checkpoint import checkpoint_fingerprint, described, folder_of
from sdfp_vllm.dipgo.plan import DipgoPlan
from sdfp_vllm.dipgo.rows import Request, RowSkipping
from sdfp_vllm.dipgo.runtime import put_on, units_for
from sdfp_vllm.errors import PlanError, SdfpError

# vLLM-Omni's classes whose blocks have the names, the order and the outputs of diffusers', as tests/omni holds them to.
TRIED = {
    "QwenImageTransformer2DModel": "vllm_omni.diffusion.models.qwen_image.qwen_image_transformer",
    "FluxTransformer2DModel": "vllm_omni.diffusion.models.flux.flux_transformer",
    "SD3Transformer2DModel": "vllm_omni.diffusion.models.sd3.sd3_transformer",
    "SDXLUNet2DConditionModel": "vllm_omni.diffusion.models.sdxl.sdxl_unet",
}
_ELSE = 'Load the model with diffusion_load_format="diffusers", or choose another cache_backend.'
_REQUEST = "sdfp_dipgo"


def put_on_native(pipeline: Any, plan: DipgoPlan) -> RowSkipping:
    """Puts a plan on one of vLLM-Omni's own pipelines, whose weights are loaded.

    Raises:
        SdfpError: If its denoisers are of a class that was not tried, or the plan is for another model.
    """
    where = f"DiP-GO plan for {plan.pipeline}"
    own = denoisers_of(pipeline)
    for denoiser in own.values():
        _refuse_untried(pipeline, denoiser)
    config = pipeline.od_config
    if any(
        getattr(config, name, False)
        for name in ("enable_layerwise_offload", "enable_distributed_layerwise_offload")
    ):
        raise SdfpError(
            'cache_backend="dipgo"',
            "leaves blocks out, and layer-wise offloading fetches each from the one before it",
            "Leave layer-wise offloading off, or choose another cache_backend.",
        )
    if any(unit.branch or unit.guidance for unit in plan.units):
        raise PlanError(
            f"{where}: field units",
            "has attention, MLP or guidance by itself, which was not tried on vLLM-Omni's modules",
            'Search with --granularity block or step, or load the model with diffusion_load_format="diffusers".',
        )
    folder = folder_of(config.model, getattr(config, "revision", None))
    modules = described(folder)
    if differences := plan.fingerprint.differences(checkpoint_fingerprint(folder, modules)):
        raise PlanError(
            where, f"was made for another model than {config.model}: " + "; ".join(differences), _ELSE
        )
    names = plan.rhythm.denoisers or tuple(modules)[:1]
    layout = units_for(plan, [modules[name] for name in names], where)
    for name in names:
        _refuse_other_blocks(layout, own.get(name), where)
        own[name].get_submodule(layout.units[0].name).register_forward_pre_hook(_unpacked, with_kwargs=True)
    return put_on(pipeline, plan, [own[name] for name in names], layout, RowSkipping)


def _refuse_untried(pipeline: Any, denoiser: nn.Module) -> None:
    if not any(TRIED.get(c.__name__) == c.__module__ for c in type(denoiser).__mro__):
        raise SdfpError(
            'cache_backend="dipgo"',
            f"{type(pipeline).__name__} is one of vLLM-Omni's own pipelines, and plans were not tried on its "
            f"{type(denoiser).__name__} (tried: {', '.join(TRIED)})",
            _ELSE,
        )


def _refuse_other_blocks(layout: Layout, denoiser: nn.Module | None, where: str) -> None:
    """Every unit must be there, and no further block beside those in the lists that units are from."""
    there = dict(denoiser.named_modules()) if denoiser is not None else {}
    names = {unit.name for unit in layout.units}
    lists = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2].isdigit()}
    for part in lists:
        names |= {f"{part}.{i}" for i in range(len(list(there[part].children())) if part in there else 0)}
    if odd := sorted(names - ({unit.name for unit in layout.units} & set(there))):
        raise PlanError(f"{where}: field units", f"and vLLM-Omni's module differ in {odd[0]}", _ELSE)


def _unpacked(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Takes what a linear layer of vLLM gave out of the pair with its bias, as SD3's first block does with its text.

    So hooks find a tensor. It stays when the plan is taken off, for it changes nothing.
    """
    text = kwargs.get("encoder_hidden_states")
    return args, kwargs | {"encoder_hidden_states": text[0]} if isinstance(text, tuple) else kwargs


def watch_steps(pipeline: Any, skipping: RowSkipping, in_full: Callable[[int], bool]) -> None:
    """Tells the plan whose rows a step has, where vLLM-Omni batches requests at different steps (step-wise execution).

    Args:
        in_full: Whether a request for so many steps runs in full. May refuse it: by itself then, before it joins a batch.
    """
    prepare, denoise = pipeline.prepare_encode, pipeline.denoise_step

    @functools.wraps(prepare)
    def prepare_encode(state: Any, **kwargs: Any) -> Any:
        prepared = prepare(state, **kwargs)
        state.extra[_REQUEST] = None if in_full(state.total_steps) else Request(state)
        return prepared

    @functools.wraps(denoise)
    def denoise_step(input_batch: Any, **kwargs: Any) -> Any:
        with skipping.rows(_rows(input_batch.states)):
            return denoise(input_batch, **kwargs)

    pipeline.prepare_encode, pipeline.denoise_step = prepare_encode, denoise_step


def _rows(states: Sequence[Any]) -> list[tuple[Request | None, int]]:
    return [(state.extra[_REQUEST], len(state.latents)) for state in states]
