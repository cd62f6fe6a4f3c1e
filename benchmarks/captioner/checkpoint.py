"""The captioner's checkpoint: a language model behind a small CLIP tower, LLaVA's architecture, as vLLM 0.32 reads it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.captioner.pictures import PLACE, PLACES, SIDE
from sdfp_vllm.common.provenance import PROVENANCE_FILE

IMAGE = "<image>"
# A token that SmolLM2 keeps for notebooks. It stands for a picture here, so that the vocabulary stays as it is.
_SPARE = "<jupyter_script>"
_TOWER = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
# SmolLM2's own, without the system prompt that it puts before a chat by itself, and with pictures among the parts.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}" + IMAGE + "{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(folder: Path) -> Any:
    """The language model's tokenizer, with its spare token renamed to IMAGE and a chat template that takes pictures."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as renamed:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(renamed) / name).write_text((folder / name).read_text().replace(_SPARE, IMAGE))
        tokenizer = AutoTokenizer.from_pretrained(renamed)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def untrained(language_model: Any, tokenizer: Any) -> Any:
    """The captioner before training: `language_model` as it is, float32, behind a random tower and projector."""
    import transformers as t

    config = t.LlavaConfig(
        text_config=language_model.config,
        vision_config=t.CLIPVisionConfig(**_TOWER, image_size=SIDE, patch_size=PLACE),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=PLACES,
        vision_feature_layer=-1,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    model = t.LlavaForConditionalGeneration(config).float()
    model.model.language_model = language_model.model.float()
    model.lm_head = language_model.lm_head.float()
    model.generation_config = language_model.generation_config
    return model


def image_processor() -> Any:
    """Makes pixels of a picture: nothing is resized, values go from -1 to 1."""
    import transformers as t

    mean = [0.5, 0.5, 0.5]
    size = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return t.CLIPImageProcessor(**size, image_mean=mean, image_std=mean)


def save(model: Any, tokenizer: Any, folder: Path, provenance: str) -> None:
    """Writes the checkpoint in bfloat16, with the names of weights that vLLM reads, and where it comes from."""
    import transformers as t

    model.to(torch.bfloat16).save_pretrained(folder)
    t.LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PLACE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which is dropped
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    _rename(folder / "model.safetensors")
    (folder / PROVENANCE_FILE).write_text(provenance + "\n")
    for file in folder.iterdir():  # what safetensors writes is readable by its owner alone
        file.chmod(0o644)


def pixels(pictures: list[Any]) -> torch.Tensor:
    """What `image_processor` makes of pictures, without it: float32 [B, 3, SIDE, SIDE]."""
    grey = torch.stack([torch.from_numpy(p.pixels.copy()) for p in pictures]).float() / 127.5 - 1
    return grey[:, None].expand(-1, 3, -1, -1)


def _rename(file: Path) -> None:
    """Gives the tower the names of published checkpoints: transformers 5 saves others, which vLLM does not read."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    renamed = {new + k.removeprefix(old) if k.startswith(old) else k: w.clone() for k, w in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def describe(folder: Path) -> str:
    """The checkpoint's PROVENANCE line and architecture, for a log."""
    config = json.loads((folder / "config.json").read_text())
    return f"{config['architectures'][0]}: {(folder / PROVENANCE_FILE).read_text().strip()}"
