"""Tiny random checkpoints of models that take images: configuration, processor, tokenizer and weights, in a folder.

Weights are random and large enough that an image changes the answer; 4 decoder layers, attention heads of 32 numbers, which
vLLM's CPU kernels take. An image becomes a handful of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

VOCAB = 384
_TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=1024,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
# Processors find these by name.
_SPECIAL = (
    "<eos>",
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
)
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}IMAGE{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant:"
)


def tiny_tokenizer(image: str, words: Sequence[str] = (), **named: str) -> Any:
    """A tokenizer of bytes and special tokens, with a chat template that puts `image` where an image is.

    Args:
        words: Tokens of several bytes, which vLLM looks for.
        named: Special tokens that a processor asks for by attribute (`boi_token="<start_of_image>"`).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in words])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", extra_special_tokens=named
    )
    made.chat_template = _TEMPLATE.replace("IMAGE", image)
    return made


def token_id(token: str) -> int:
    """The id of a special token."""
    return 256 + _SPECIAL.index(token)


@dataclass(frozen=True)
class Tiny:
    """How a tiny checkpoint is made, and asked.

    Attributes:
        image: What stands for an image in a prompt.
        build: Returns the model and its processor.
        embedded: The token in whose places the image's embeddings are.
        bare: An image without what may stand around it, for a prompt that ends in one; None where it has to.
    """

    image: str
    build: Callable[[], tuple[Any, Any]]
    embedded: str
    bare: str | None = None


def _qwen_processor(name: str, patch: int) -> Any:
    import transformers

    size = {"shortest_edge": (2 * patch) ** 2 * 4, "longest_edge": (2 * patch) ** 2 * 24}
    settings = dict(patch_size=patch, temporal_patch_size=2, merge_size=2, size=size)
    image = transformers.Qwen2VLImageProcessor(**settings)
    kind = "Qwen3VLVideoProcessor" if name.startswith("Qwen3") else "Qwen2VLVideoProcessor"
    video = getattr(transformers, kind)(**settings)
    tokenizer = tiny_tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    return getattr(transformers, name)(
        image_processor=image,
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=tokenizer.chat_template,
    )


_QWEN_TOKENS = dict(
    image_token_id=token_id("<|image_pad|>"),
    video_token_id=token_id("<|video_pad|>"),
    vision_start_token_id=token_id("<|vision_start|>"),
    vision_end_token_id=token_id("<|vision_end|>"),
)


def _qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    config = Qwen2VLConfig(
        text_config=_TEXT | {"rope_parameters": rope},
        vision_config=dict(depth=2, embed_dim=64, hidden_size=64, num_heads=2, patch_size=14),
        **_QWEN_TOKENS,
    )
    return Qwen2VLForConditionalGeneration(config), _qwen_processor("Qwen2VLProcessor", 14)


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": rope},
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=14,
            window_size=56, fullatt_block_indexes=[1],
        ),
        **_QWEN_TOKENS,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_processor("Qwen2_5_VLProcessor", 14)


def _qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 1e4}
    config = Qwen3VLConfig(
        text_config=_TEXT | {"rope_parameters": rope, "head_dim": 32},
        vision_config=dict(
            depth=3, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=16,
            num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
        ),
        **_QWEN_TOKENS,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config), _qwen_processor("Qwen3VLProcessor", 16)


_TOWER = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=7,
)


def _llava() -> tuple[Any, Any]:
    import transformers as t

    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**_TEXT, head_dim=32),
        vision_config=t.CLIPVisionConfig(**_TOWER),
        image_token_index=token_id("<image>"),
        image_seq_length=16,
    )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    tokenizer = tiny_tokenizer("<image>")
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessor(**size),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return t.LlavaForConditionalGeneration(config), processor


def _idefics(name: str) -> tuple[Any, Any]:
    import transformers as t

    config = getattr(t, f"{name}Config")(
        text_config=t.LlamaConfig(**_TEXT, head_dim=32),
        vision_config=_TOWER,
        image_token_id=token_id("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    tokenizer = tiny_tokenizer("<image>")
    parts: dict[str, Any] = dict(
        image_processor=getattr(t, f"{name}ImageProcessor")(**sizes),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    if name == "SmolVLM":
        parts["video_processor"] = t.SmolVLMVideoProcessor(**sizes)
    return getattr(t, f"{name}ForConditionalGeneration")(config), getattr(t, f"{name}Processor")(**parts)


def _gemma3() -> tuple[Any, Any]:
    import transformers as t

    config = t.Gemma3Config(
        text_config=t.Gemma3TextConfig(
            **_TEXT,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        vision_config=t.SiglipVisionConfig(**_TOWER, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=token_id("<image_soft_token>"),
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
    )
    tokenizer = tiny_tokenizer(
        "<start_of_image>",
        words=["\n" * i for i in range(1, 5)],
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    processor = t.Gemma3Processor(
        image_processor=t.Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return t.Gemma3ForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    import transformers as t

    config = t.InternVLConfig(
        text_config=t.Qwen2Config(**_TEXT),
        vision_config={**_TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    tokenizer = tiny_tokenizer(
        "<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = t.InternVLProcessor(
        image_processor=t.GotOcr2ImageProcessor(
            size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=2
        ),
        tokenizer=tokenizer,
        video_processor=t.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return t.InternVLForConditionalGeneration(config), processor


_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
TINY: dict[str, Tiny] = {
    "qwen2_vl": Tiny(_QWEN, _qwen2_vl, "<|image_pad|>", "<|image_pad|>"),
    "qwen2_5_vl": Tiny(_QWEN, _qwen2_5_vl, "<|image_pad|>", "<|image_pad|>"),
    "qwen3_vl": Tiny(_QWEN, _qwen3_vl, "<|image_pad|>", "<|image_pad|>"),
    "llava": Tiny("<image>", _llava, "<image>"),
    "idefics3": Tiny("<image>", lambda: _idefics("Idefics3"), "<image>"),
    "smolvlm": Tiny("<image>", lambda: _idefics("SmolVLM"), "<image>"),
    "gemma3": Tiny("<start_of_image>", _gemma3, "<image_soft_token>"),
    "internvl": Tiny("<IMG_CONTEXT>", _internvl, "<IMG_CONTEXT>"),
}


def save_tiny_multimodal(kind: str, folder: Path, seed: int = 0) -> Path:
    """Saves a random checkpoint of a kind, float32; returns its folder."""
    torch.manual_seed(seed)
    model, processor = TINY[kind].build()
    model = model.float().eval()
    # Gemma's embedding is its head too, and larger in the stream: with as much of it a token would only repeat itself.
    embedding = 0.05 if kind == "gemma3" else 0.5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(std=embedding if "embed" in name else 0.2)
            else:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind in ("llava", "gemma3"):
        _rename(folder / "model.safetensors")
    return folder


def saver(folder_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """`save_tiny_multimodal`, once a kind, into `folder_of(kind)`."""
    return functools.cache(lambda kind: save_tiny_multimodal(kind, folder_of(kind)))


def _rename(file: Path) -> None:
    """Gives the vision tower the names of published checkpoints: transformers 5 saves others, which vLLM does not read."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    renamed = {new + k.removeprefix(old) if k.startswith(old) else k: w.clone() for k, w in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def pictures(count: int, seed: int = 0, width: int = 168, height: int = 112) -> list[Any]:
    """Random pictures, no two alike."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    # Coarse noise: of single pixels little is left where a picture is made smaller.
    return [
        Image.fromarray(
            np.kron(
                rng.integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8),
                np.ones((14, 14, 1), np.uint8),
            )
        )
        for _ in range(count)
    ]


def mixed_requests(kind: str) -> list[dict[str, Any]]:
    """Requests for one batch: text alone, an image at the front, in the middle, at the very end, several of them."""
    tiny = TINY[kind]
    image, bare = tiny.image, tiny.bare or tiny.image
    a, b, c, d = pictures(4)
    (tall,) = pictures(1, seed=1, width=56, height=112)

    def ask(prompt: str, *images: Any) -> dict[str, Any]:
        return {"prompt": prompt, **({"multi_modal_data": {"image": list(images)}} if images else {})}

    return [
        ask("Which of these words rhyme, and why do they?"),
        ask(f"{image}What is in the picture?", a),
        ask(f"Look at {image} first, then at {image}. Compare.", b, c),
        ask(f"The last thing is a picture: {bare}", d),
        ask("a"),
        ask(f"Tall: {image} and again {image}, wide: {image}. " + "More words follow. " * 4, tall, tall, a),
        ask(f"{image}What is in the picture?", b),
    ]


def repeated(requests: Sequence[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """The same requests behind a text that makes their images' blocks whole, and shared."""
    return [r | {"prompt": prefix + r["prompt"]} for r in requests]
