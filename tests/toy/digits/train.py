"""Trains the digits diffusion models that the pruner is tried on, and saves them as diffusers pipelines.

    python -m tests.toy.digits.train dit  --cpu-seconds 400 --out tests/toy/digits/dit
    python -m tests.toy.digits.train unet --cpu-seconds 300 --out tests/toy/digits/unet
    python -m tests.toy.digits.train flow --cpu-seconds 400 --batch 64 --lr 2e-3 --out tests/toy/digits/flow

`dit` is a class-conditional DiT (8 blocks, width 128, patch 2) in a DiTPipeline. `unet` is a
UNet2DConditionModel in a StableDiffusionPipeline; its condition is a one-hot "token", kept beside it
in conditions.safetensors. Both predict noise. `flow` is a two-stream transformer from texts to pictures
of four digits (`flow.py`). All learn the null class by dropping 10 % of the labels, and are saved as
float16 copies of an exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.toy.digits.data import CLASSES, digits
from tests.toy.digits.flow import flow_loss, save_flow
from tests.toy.digits.flow import model as flow
from tests.toy.digits.identity_vae import IdentityVae

NULL_CLASS = 1000  # DiTPipeline's constant
CONDITION_WIDTH = 16
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EMA_DECAY = 0.998

Predict = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def dit() -> tuple[nn.Module, Predict]:
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:  # adaLN-Zero's start: every block is the identity
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
            table = block.norm1.emb.class_embedder.embedding_table.weight
            table[CLASSES:NULL_CLASS] = 0  # never used; zeros compress well
    labels = torch.arange(CLASSES + 1)
    labels[CLASSES] = NULL_CLASS
    return model, lambda m, x, t, c: m(x, timestep=t, class_labels=labels[c]).sample


def unet() -> tuple[nn.Module, Predict]:
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONDITION_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    table = conditions()
    return model, lambda m, x, t, c: m(x, t, encoder_hidden_states=table[c]).sample


def conditions() -> Tensor:
    """One-hot conditions (11, 1, width); the last row is the null class."""
    return torch.eye(CLASSES + 1, CONDITION_WIDTH)[:, None]


def noise_loss(
    model: nn.Module, predict: Predict, scheduler: DDIMScheduler, images: Tensor, classes: Tensor, batch: int
) -> Tensor:
    """Squared error of the noise predicted, at a step drawn evenly; a tenth of the labels is dropped."""
    rows = torch.randint(len(images), (batch,))
    x, c = images[rows], classes[rows].clone()
    c[torch.rand(batch) < 0.1] = CLASSES
    t = torch.randint(scheduler.config.num_train_timesteps, (batch,))
    noise = torch.randn_like(x)
    return nn.functional.mse_loss(predict(model, scheduler.add_noise(x, noise, t), t, c), noise)


def save(name: str, model: nn.Module, scheduler: DDIMScheduler, out: Path) -> None:
    model = copy.deepcopy(model).half()
    if name == "flow":
        save_flow(model, out)
        return
    if name == "dit":
        DiTPipeline(transformer=model, vae=IdentityVae().half(), scheduler=scheduler).save_pretrained(out)
        index = json.loads((out / "model_index.json").read_text())
        index["id2label"] = {
            str(i): name for i, name in enumerate(NAMES)
        }  # DiTPipeline does not save its own
        (out / "model_index.json").write_text(json.dumps(index, indent=2))
        return
    StableDiffusionPipeline(
        vae=IdentityVae().half(),
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=DPMSolverMultistepScheduler.from_config(scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    table = conditions()
    negative = table[-1:].expand(CLASSES, -1, -1).contiguous()
    save_file(
        {"prompt_embeds": table[:-1], "negative_prompt_embeds": negative}, out / "conditions.safetensors"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["dit", "unet", "flow"])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--cpu-seconds", type=float, default=400)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    images, classes = digits()
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    if a.what == "flow":
        model: nn.Module = flow()
        loss_of = partial(flow_loss, model)
    else:
        model, predict = dit() if a.what == "dit" else unet()
        loss_of = partial(noise_loss, model, predict, scheduler)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=0.0)
    print(f"{sum(q.numel() for q in model.parameters()):,} parameters", flush=True)
    step, loss_ema, said = 0, float("nan"), time.process_time()
    while (spent := time.process_time()) < a.cpu_seconds:
        scale = min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - spent / a.cpu_seconds) + 0.01)
        optimizer.param_groups[0]["lr"] = a.lr * scale
        loss = loss_of(images, classes, a.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        loss_ema = loss.item() if step == 1 else 0.98 * loss_ema + 0.02 * loss.item()
        if spent - said > 20:
            said = spent
            print(f"{spent:5.0f} CPU-s  step {step}  loss {loss_ema:.4f}", flush=True)
    save(a.what, average, scheduler, a.out)
    print(f"Saved {a.out} after {step} steps, loss {loss_ema:.4f}")


if __name__ == "__main__":
    main()
