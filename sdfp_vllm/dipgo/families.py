"""The architectures whose units are listed: by class of the denoiser, and by class of its blocks.

The order in which a block returns its streams is its author's choice, so it is written down here for each class as its
`forward` in diffusers has it. `tests/unit/dipgo/test_dipgo_families.py` holds every entry against a traced call.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from sdfp_vllm.dipgo.layout import WHOLE, Granularity, Layout, Stream, Unit, unwrapped
from sdfp_vllm.errors import SdfpError

_IMAGE, _TEXT = "hidden_states", "encoder_hidden_states"
_ONE = (Stream(argument=_IMAGE),)
_TEXT_FIRST = (Stream(argument=_TEXT, place=0), Stream(argument=_IMAGE, place=1))
_TEXT_LAST = (Stream(argument=_IMAGE, place=0), Stream(argument=_TEXT, place=1))
_BLOCKS = {
    "BasicTransformerBlock": _ONE,  # DiT, PixArt
    "SanaTransformerBlock": _ONE,
    "HunyuanDiTBlock": _ONE,
    "WanTransformerBlock": _ONE,
    "LTXVideoTransformerBlock": _ONE,
    "SD3SingleTransformerBlock": _ONE,
    "JointTransformerBlock": _TEXT_FIRST,  # SD3
    "FluxTransformerBlock": _TEXT_FIRST,
    "FluxSingleTransformerBlock": _TEXT_FIRST,
    "QwenImageTransformerBlock": _TEXT_FIRST,
    "CogVideoXBlock": _TEXT_LAST,
}
# What a block adds to its streams one after the other, as its `forward` calls it. A block without an entry, whose attention and MLP go
# into one projection or which is not read that way, stays whole.
_BRANCHES = {
    "BasicTransformerBlock": ("attn1", "attn2", "ff"),
    "SanaTransformerBlock": ("attn1", "attn2", "ff"),
    "HunyuanDiTBlock": ("attn1", "attn2", "ff"),
    "WanTransformerBlock": ("attn1", "attn2", "ffn"),
    "LTXVideoTransformerBlock": ("attn1", "attn2", "ff"),
    "SD3SingleTransformerBlock": ("attn", "ff"),
    "JointTransformerBlock": ("attn", "attn2", "ff", "ff_context"),
    "FluxTransformerBlock": ("attn", "ff", "ff_context"),
    "QwenImageTransformerBlock": ("attn", "img_mlp", "txt_mlp"),
    "CogVideoXBlock": ("attn1", "ff"),
}
# The lists of blocks that a denoiser runs, one after the other.
_CHAINS = {
    "DiTTransformer2DModel": ("transformer_blocks",),
    "PixArtTransformer2DModel": ("transformer_blocks",),
    "SD3Transformer2DModel": ("transformer_blocks",),
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "QwenImageTransformer2DModel": ("transformer_blocks",),
    "SanaTransformer2DModel": ("transformer_blocks",),
    "CogVideoXTransformer3DModel": ("transformer_blocks",),
    "WanTransformer3DModel": ("blocks",),
    "LTXVideoTransformer3DModel": ("transformer_blocks",),
}
_CONDITION_FIRST = ("DiTTransformer2DModel", "OmniGenTransformer2DModel")  # in the batches of their pipelines
_UNETS = ("UNet2DConditionModel",)
_LONG_SKIPS = ("HunyuanDiT2DModel",)


def is_listed(denoiser: nn.Module) -> bool:
    """Whether the blocks of this class of denoiser are described here."""
    return type(denoiser).__name__ in (*_CHAINS, *_UNETS, *_LONG_SKIPS)


def layout_of(denoiser: nn.Module, granularity: Granularity) -> Layout:
    """The units of `denoiser`: its blocks; with "branch" their attention and MLP; with "step" the whole network; with "guidance" that, and
    the half of the batch without the condition.

    A transformer is a chain of blocks, in HunyuanDiT with long skips between its halves. In a U-Net
    (`UNet2DConditionModel`) the outer blocks of the down path, the middle and the up path are units, as in DiP-GO;
    an up block reads the one before it and the down blocks whose skip connections it takes.

    Raises:
        SdfpError: If blocks are asked of a class that is not listed (`signature.py` reads it from a call), or branches of
            one whose blocks have none that are listed.
    """
    kind = type(denoiser).__name__
    if granularity == "step":
        return WHOLE
    if granularity == "guidance":
        half: Literal["first", "second"] = "first" if kind in _CONDITION_FIRST else "second"
        return Layout((Unit(name="", guidance=half), Unit(name="", inputs=(0,))))
    if granularity == "branch":
        return _branches(denoiser)
    if kind in _UNETS:
        return Layout(_unet_units(denoiser))
    if kind in _LONG_SKIPS:
        return Layout(_long_skip_units(denoiser))
    if kind in _CHAINS:
        return Layout(_chain_units(denoiser))
    raise SdfpError(
        kind,
        "is not among the classes whose blocks are listed",
        "Let `sdfp dipgo search` read them from a call, describe them with Layout(...), or use granularity step.",
    )


def has_branches(denoiser: nn.Module) -> bool:
    """Whether attention and MLP of its blocks can be units of their own."""
    if not is_listed(denoiser):
        return False
    return any(_parts(denoiser, unit.name) for unit in layout_of(denoiser, "block").units)


def _parts(denoiser: nn.Module, name: str) -> list[str]:
    """The branches of the block `name`; some blocks of a class lack one."""
    block = unwrapped(denoiser.get_submodule(name))
    return [p for p in _BRANCHES.get(type(block).__name__, ()) if getattr(block, p, None) is not None]


def _branches(denoiser: nn.Module) -> Layout:
    if not has_branches(denoiser):
        raise SdfpError(
            "--granularity branch",
            f"is for transformers whose blocks' attention and MLP are listed, and {type(denoiser).__name__} is none",
            "Use --granularity block; with --layout FILE that takes branches too: Unit(name=..., branch=True).",
        )
    units: list[Unit] = []
    for unit in layout_of(denoiser, "block").units:
        parts = [Unit(name=f"{unit.name}.{p}", branch=True) for p in _parts(denoiser, unit.name)]
        for each in parts or [unit]:
            units.append(each.model_copy(update={"inputs": (len(units) - 1,) if units else ()}))
    return Layout(tuple(units))


def _chain_units(denoiser: nn.Module) -> tuple[Unit, ...]:
    units: list[Unit] = []
    for part in _CHAINS[type(denoiser).__name__]:
        for i, block in enumerate(getattr(denoiser, part)):
            inputs = (len(units) - 1,) if units else ()
            units.append(Unit(name=f"{part}.{i}", inputs=inputs, streams=_streams(block)))
    return tuple(units)


def _streams(block: nn.Module) -> tuple[Stream, ...]:
    streams = _BLOCKS[type(unwrapped(block)).__name__]
    # SD3's last block reads the text and gives None for it.
    return tuple(
        s for s in streams if not (s.argument == _TEXT and getattr(block, "context_pre_only", False))
    )


def _long_skip_units(denoiser: Any) -> tuple[Unit, ...]:
    """HunyuanDiT: the outputs of the first half's blocks, but its last two, are read again in the second, last in first out."""
    units: list[Unit] = []
    skips: list[int] = []
    half = denoiser.config.num_layers // 2
    for i, block in enumerate(denoiser.blocks):
        inputs = {i - 1} if i else set()
        if i > half:
            inputs.add(skips.pop())
        if i < half - 1:
            skips.append(i)
        units.append(Unit(name=f"blocks.{i}", inputs=tuple(sorted(inputs)), streams=_streams(block)))
    return tuple(units)


def _unet_units(unet: Any) -> tuple[Unit, ...]:
    units: list[Unit] = []
    stem = -1
    skips = [stem]  # who wrote each skip connection: conv_in, then the down blocks' resnets and downsamplers
    for i, block in enumerate(unet.down_blocks):
        units.append(Unit(name=f"down_blocks.{i}", inputs=(i - 1,) if i else ()))
        skips += [i] * (len(block.resnets) + (1 if block.downsamplers else 0))
    if unet.mid_block is not None:
        units.append(Unit(name="mid_block", inputs=(len(units) - 1,)))
    for j, block in enumerate(unet.up_blocks):
        taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        inputs = {len(units) - 1, *taken} - {stem}
        units.append(Unit(name=f"up_blocks.{j}", inputs=tuple(sorted(inputs))))
    return tuple(units)
