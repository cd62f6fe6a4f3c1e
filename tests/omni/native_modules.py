"""vLLM-Omni's own denoisers on a CPU: the wheel's classes at tiny width, with the weights of diffusers' ones.

vLLM-Omni has no CPU platform, so one is made here: native layers, and attention by torch. Its pipelines load tokenizers and
text encoders, so only their denoising loops are taken from their source, into classes without the rest.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm_omni.platforms
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import model_parallel_is_initialized
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.platforms.interface import UnspecifiedOmniPlatform

from sdfp_vllm.dipgo.sampling import Conditions, Sampler
from tests.support.tiny_pipelines import STEPS, tiny_sampler
from tests.toy.digits.identity_vae import IdentityVae


class CpuImpl(SDPAImpl):
    forward = SDPAImpl._forward_impl


class CpuBackend(SDPABackend):
    @staticmethod
    def get_impl_cls() -> type[CpuImpl]:
        return CpuImpl


class CpuPlatform(UnspecifiedOmniPlatform):
    @classmethod
    def get_diffusion_attn_backend_cls(cls, *_: Any, **__: Any) -> str:
        return f"{__name__}.CpuBackend"


vllm_omni.platforms._current_omni_platform = CpuPlatform()

from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin  # noqa: E402
from vllm_omni.diffusion.forward_context import set_forward_context  # noqa: E402
from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel  # noqa: E402
from vllm_omni.diffusion.models.qwen_image.cfg_parallel import QwenImageCFGParallelMixin  # noqa: E402
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import (  # noqa: E402
    QwenImageTransformer2DModel,
)
from vllm_omni.diffusion.models.sd3.sd3_transformer import SD3Transformer2DModel  # noqa: E402
from vllm_omni.diffusion.models.sdxl import sdxl_unet  # noqa: E402

PARALLEL = DiffusionParallelConfig()
GUIDANCE = 3.0


@contextmanager
def world() -> Iterator[None]:
    """A world of one, which vLLM's parallel layers ask for, and vLLM-Omni's context of a forward."""
    config = VllmConfig()
    settings = SimpleNamespace(parallel_config=PARALLEL)
    with set_forward_context(vllm_config=config, omni_diffusion_config=settings):
        if not model_parallel_is_initialized():
            place = Path(tempfile.mkdtemp(prefix="sdfp-omni-"), "store")
            init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
            initialize_model_parallel()
        yield


class TinySdxl(sdxl_unet.SDXLUNet2DConditionModel):
    """vLLM-Omni's SDXL U-Net, whose sizes are fixed, with two levels of 32 and 64 channels. Its forward is its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        time, text = 128, {"num_attention_heads": 2, "cross_attention_dim": 12}
        self.in_channels = self.out_channels = 4
        self.time_proj_dim = 32
        self.conv_in = nn.Conv2d(4, 32, 3, padding=1)
        self.time_embedding = sdxl_unet.SDXLTimestepEmbedding(32, time)
        self.add_embedding = sdxl_unet.SDXLAddTimestepEmbedding(256, 10, time)
        self.down_blocks = nn.ModuleList([
            sdxl_unet.SDXLDownBlock2D(32, 32, time, num_layers=1),
            sdxl_unet.SDXLCrossAttnDownBlock2D(32, 64, time, num_layers=1, add_downsample=False, **text),
        ])  # fmt: skip
        self.mid_block = sdxl_unet.SDXLUNetMidBlock2DCrossAttn(
            64, time, transformer_layers_per_block=1, **text
        )
        self.up_blocks = nn.ModuleList([
            sdxl_unet.SDXLCrossAttnUpBlock2D(
                64, 64, 64, time, num_layers=2, resnet_in_channels_list=[64 + 64, 64 + 32], **text
            ),
            sdxl_unet.SDXLUpBlock2D(
                64, 32, 32, time, num_layers=2, add_upsample=False, resnet_in_channels_list=[64 + 32, 32 + 32]
            ),
        ])  # fmt: skip
        self.conv_norm_out = nn.GroupNorm(32, 32, eps=1e-5)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(32, 4, 3, padding=1)


def sampler_of(kind: str) -> Sampler:
    """A tiny diffusers pipeline of this kind; SDXL with what vLLM-Omni's has fixed (32 groups, linear projections)."""
    if kind != "sdxl":
        return tiny_sampler(kind, guidance=GUIDANCE)
    torch.manual_seed(7)
    net = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=6 * 256 + 10,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        unet=net, vae=IdentityVae(), scheduler=EulerDiscreteScheduler(steps_offset=1), add_watermarker=False,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )  # fmt: skip
    names = ("prompt_embeds", "negative_prompt_embeds")
    conditions = {name: torch.randn(3, 4, 12) for name in names}
    conditions |= {f"{name[:-13]}pooled_{name[-13:]}": torch.randn(3, 10) for name in names}
    return Sampler(pipe, Conditions(conditions), STEPS, GUIDANCE)


def own_denoiser(kind: str, net: nn.Module) -> nn.Module:
    """vLLM-Omni's denoiser with the weights of diffusers' `net`, through its own `load_weights`."""
    if kind == "sdxl":
        own: Any = TinySdxl()
    elif kind == "sd3":
        config = SimpleNamespace(**net.config)
        own = SD3Transformer2DModel(SimpleNamespace(parallel_config=PARALLEL, tf_model_config=config))
    else:
        cls = {"qwen": QwenImageTransformer2DModel, "flux": FluxTransformer2DModel}[kind]
        settings = SimpleNamespace(parallel_config=PARALLEL) if kind == "qwen" else None
        taken = inspect.signature(cls.__init__).parameters
        own = cls(settings, **{k: v for k, v in net.config.items() if k in taken})
    loaded = own.load_weights(net.state_dict().items())
    missing = set(dict(own.named_parameters())) - loaded
    assert not missing, missing
    for module in own.modules():
        if (method := getattr(module, "quant_method", None)) is not None:
            method.process_weights_after_loading(module)
    return own.requires_grad_(False).eval()


def _methods(path: str, name: str, *wanted: str) -> dict[str, Any]:
    """Methods of a pipeline class of the wheel, whose module would load tokenizers and encoders."""
    source = Path(sys.modules["vllm_omni"].__path__[0], "diffusion", "models", path)
    tree = ast.parse(source.read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    methods = [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    assert {m.name for m in methods} == set(wanted)
    future = ast.parse("from __future__ import annotations").body
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([*future, *methods], []), str(source), "exec"), names)
    return {m.name: names[m.name] for m in methods}


class _Pipeline(nn.Module):
    interrupt = False
    device = torch.device("cpu")
    attention_kwargs = joint_attention_kwargs = None

    def __init__(self, name: str, denoiser: nn.Module, scheduler: Any, model: Path):
        super().__init__()
        setattr(self, name, denoiser)
        self.scheduler = scheduler
        self.od_config = SimpleNamespace(
            model=str(model), step_execution=False, dtype=torch.float32, cache_backend="dipgo"
        )

    def forward(self, *args: Any) -> torch.Tensor:
        """As the runner calls it: one frame of a generation around the loop."""
        with torch.inference_mode():
            return self.diffuse(*args)


class QwenPipeline(_Pipeline, QwenImageCFGParallelMixin):
    _progress_bar_config = {"disable": True}  # noqa: RUF012
    vars().update(
        _methods(
            "qwen_image/pipeline_qwen_image.py", "QwenImagePipeline", "denoise_step", "step_scheduler",
            "_build_denoise_kwargs",
        )
    )  # fmt: skip

    def prepare_encode(self, state: Any, **_: Any) -> Any:
        """In place of the wheel's, which encodes prompts: what it would find is in the request's prompt."""
        for name, value in state.prompt.items():
            setattr(state, name, value)
        state.scheduler = fresh(self.scheduler)
        state.scheduler.set_begin_index(0)
        state.timesteps = state.scheduler.timesteps
        state.sampling.cfg_normalize = True
        return state


class FluxPipeline(_Pipeline, CFGParallelMixin):
    vars().update(_methods("flux/pipeline_flux.py", "FluxPipeline", "diffuse"))


class Sd3Pipeline(_Pipeline, CFGParallelMixin):
    vars().update(_methods("sd3/pipeline_sd3.py", "StableDiffusion3Pipeline", "diffuse"))


class SdxlPipeline(_Pipeline, CFGParallelMixin):
    vars().update(_methods("sdxl/pipeline_sdxl.py", "StableDiffusionXLPipeline", "diffuse", "predict_noise"))


def own_pipeline(kind: str, sampler: Sampler, model: Path) -> Any:
    """vLLM-Omni's denoiser and denoising loop, beside a checkpoint of the sampler's denoiser in `model`."""
    cls, name = {
        "qwen": (QwenPipeline, "transformer"),
        "flux": (FluxPipeline, "transformer"),
        "sd3": (Sd3Pipeline, "transformer"),
        "sdxl": (SdxlPipeline, "unet"),
    }[kind]
    sampler.denoiser.save_pretrained(model / name)
    return cls(name, own_denoiser(kind, sampler.denoiser), fresh(sampler.pipe.scheduler), model)


def fresh(scheduler: Any) -> Any:
    """The scheduler as its `set_timesteps` left it; for a pipeline of its own."""
    scheduler = copy.deepcopy(scheduler)
    scheduler._step_index = scheduler._begin_index = None
    return scheduler


def theirs(sampler: Sampler) -> torch.Tensor:
    """The latents of the same image through diffusers' pipeline, as its loop leaves them."""
    return sampler.pipe(
        num_inference_steps=STEPS, generator=[torch.Generator().manual_seed(0)], output_type="latent",
        **sampler.conditions.of([0]), **sampler._arguments,
    ).images  # fmt: skip


def generate(kind: str, pipeline: Any, sampler: Sampler, guided: bool = True) -> torch.Tensor:
    """The latents of one image through vLLM-Omni's loop, from what diffusers gave its denoiser in the first step."""
    pipeline.scheduler = fresh(pipeline.scheduler)
    pipeline.scheduler.timesteps = pipeline.scheduler.timesteps.clone()  # each generation makes its own
    times = pipeline.scheduler.timesteps
    calls = [call for _, call in sampler.first_calls[0]]
    if kind == "qwen":
        (yes, no), masks = calls, "encoder_hidden_states_mask"
        return pipeline(
            yes["encoder_hidden_states"], yes[masks], no["encoder_hidden_states"], no[masks], yes["hidden_states"],
            yes["img_shapes"], [yes["encoder_hidden_states"].shape[1]], [no["encoder_hidden_states"].shape[1]], times,
            guided, None, GUIDANCE,
        )  # fmt: skip
    call = calls[0]
    if kind == "flux":
        return pipeline(
            call["encoder_hidden_states"], call["pooled_projections"], None, None, call["hidden_states"],
            call["img_ids"], call["txt_ids"], None, times, False, call["guidance"], 1.0,
        )  # fmt: skip
    if kind == "sd3":
        no, yes = call["encoder_hidden_states"].chunk(2)
        pooled_no, pooled_yes = call["pooled_projections"].chunk(2)
        return pipeline(call["hidden_states"][:1], times, yes, pooled_yes, no, pooled_no, guided, GUIDANCE)
    first = pipeline.scheduler.sigmas[0]
    latents = sampler.first_calls[0][0][0][0][:1] * (first**2 + 1) ** 0.5  # Euler's scaling taken back
    no, yes = call["encoder_hidden_states"].chunk(2)
    added_no, added_yes = ({k: v.chunk(2)[i] for k, v in call["added_cond_kwargs"].items()} for i in (0, 1))
    return pipeline(latents, times, yes, added_yes, no, added_no, guided, GUIDANCE)
