"""Trains the toy target of the tests, and the small separate draft it is compared with.

The recipe has three stages, because a model this small has none of the redundancy that
scale gives a real LLM (see the model card in ``tests/toy/model/README.md``):

1. *core*: a shallow Llama (``--core-layers``) on next-token cross-entropy;
2. *growth*: identity-initialised decoder layers (zero output projections, so the function
   is unchanged) are inserted between the core layers until ``--layers`` are reached, the
   progressive block expansion of LLaMA-Pro (arXiv 2401.02415);
3. *joint*: every step takes the full depth on cross-entropy, and a random sub-network
   (stochastic depth, as in LayerSkip, arXiv 2404.16710) on the KL divergence to the full
   depth's distribution (self-distillation).

    python tests/toy/train.py target --out out/demo-target
    python tests/toy/train.py draft  --out out/demo-draft

Both read the Python standard library's own sources (tests, idlelib and lib2to3 left out),
hold out every 50th file, and write a Hugging Face folder with a tokenizer. Every
``--save-every`` seconds the state goes to ``<out>/state.pt``; the same command resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, CONTEXT = 2048, 512
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}


@dataclasses.dataclass
class Shape:
    """A Llama shape with tied embeddings; `head_dim` 32 is the smallest vLLM's CPU attention takes."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int = 32


# ---------------------------------------------------------------- data
def source_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts))


def prepare(out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (train, held-out) int64 token streams; trains the tokenizer once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = source_files()
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    path = out / "tokenizer.json"
    if path.exists():
        tok = Tokenizer.from_file(str(path))
    else:
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tok.train_from_iterator((t for i, t in enumerate(texts) if i % 50), trainer)
        tok.save(str(path))
    end = tok.token_to_id("<|end|>")
    train: list[int] = []
    held: list[int] = []
    for i, enc in enumerate(tok.encode_batch(texts)):
        (train if i % 50 else held).extend([end, *enc.ids])
    return torch.tensor(train), torch.tensor(held)


# ---------------------------------------------------------------- model (names as in transformers' Llama)
def rope(dim: int, theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    inv = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(CONTEXT, dtype=torch.float32), inv)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


class Layer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        lin = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.input_layernorm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.q_proj = lin(s.hidden, s.heads * s.head_dim)
        self.k_proj = lin(s.hidden, s.kv_heads * s.head_dim)
        self.v_proj = lin(s.hidden, s.kv_heads * s.head_dim)
        self.o_proj = lin(s.heads * s.head_dim, s.hidden)
        self.gate_proj = lin(s.hidden, s.mlp)
        self.up_proj = lin(s.hidden, s.mlp)
        self.down_proj = lin(s.mlp, s.hidden)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        s = self.s
        h = self.input_layernorm(x)
        q = self.q_proj(h).view(b, t, s.heads, s.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)
        half = s.head_dim // 2

        def turn(z):
            return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin

        q, k = turn(q), turn(k)
        rep = s.heads // s.kv_heads
        k, v = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(a.transpose(1, 2).reshape(b, t, -1))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    def __init__(self, s: Shape, layers: int):
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(VOCAB, s.hidden)
        nn.init.normal_(self.embed.weight, std=s.hidden**-0.5)
        self.layers = nn.ModuleList(Layer(s) for _ in range(layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-5)
        cos, sin = rope(s.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, keep: list[int] | None = None):
        x = self.embed(ids)
        t = ids.shape[1]
        for i in range(len(self.layers)) if keep is None else keep:
            x = self.layers[i](x, self.cos[:t], self.sin[:t])
        return F.linear(self.norm(x), self.embed.weight)

    def grow(self, layers: int) -> tuple[Llama, list[int]]:
        """Inserts identity layers evenly; returns the deeper model and the core's new indices."""
        core = [round(i * (layers - 1) / (len(self.layers) - 1)) for i in range(len(self.layers))]
        big = Llama(self.s, layers)
        big.embed, big.norm = self.embed, self.norm
        for i, layer in zip(core, self.layers, strict=True):
            big.layers[i] = layer
        for i in set(range(layers)) - set(core):
            nn.init.zeros_(big.layers[i].o_proj.weight)
            nn.init.zeros_(big.layers[i].down_proj.weight)
        return big, core


# ---------------------------------------------------------------- training
def optimizers(model: Llama, lr: float):
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def batch(data: torch.Tensor, rows: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.randint(len(data) - CONTEXT - 1, (rows,), generator=rng)
    x = torch.stack([data[i : i + CONTEXT + 1] for i in at.tolist()])
    return x[:, :-1], x[:, 1:]


@torch.no_grad()
def held_out(model: Llama, data: torch.Tensor, keep: list[int] | None) -> tuple[float, float]:
    """Returns the full depth's loss, and the share of positions where `keep` has the same top-1."""
    loss, same, n = 0.0, 0.0, 0
    for x, y in (batch(data, 8, torch.Generator().manual_seed(s)) for s in range(2)):
        full = model(x)
        loss += F.cross_entropy(full.flatten(0, 1), y.flatten()).item()
        if keep is not None:
            same += (model(x, keep).argmax(-1) == full.argmax(-1)).float().mean().item()
        n += 1
    return loss / n, same / n


def sub_network(layers: int, core: list[int], rng: random.Random) -> list[int]:
    """Half the time the bare core; else core plus a random share of the rest; now and then a core layer goes."""
    share = 0.0 if rng.random() < 0.5 else rng.random()
    keep = {i for i in range(layers) if i in core or rng.random() < share}
    if rng.random() < 0.15:
        keep.discard(rng.choice(core[1:-1] or core))
    return sorted(keep)


def train(
    model: Llama, data, held, a, seconds: float, core: list[int] | None, log, state: dict, save
) -> None:
    """Runs one stage for `seconds` of wall clock: warm-up, flat, then linear decay over the last 60 %."""
    opts = optimizers(model, a.lr)
    for o, s in zip(opts, state.get("opts", []), strict=False):
        o.load_state_dict(s)
    rng = torch.Generator().manual_seed(a.seed + state.get("step", 0))
    pick = random.Random(a.seed + state.get("step", 0))
    done, step = state.get("done", 0.0), state.get("step", 0)
    t0, said, saved = time.time() - done, time.time(), time.time()
    ema = float("nan")
    rows = a.rows if core is None else a.rows // 2  # a joint step is dearer: smaller batches, more of them
    while (done := time.time() - t0) < seconds:
        frac = done / seconds
        scale = min((step + 1) / 40, 1.0) * min(1.0, (1 - frac) / 0.6 + 0.01)
        for o in opts:
            for g in o.param_groups:
                g["lr"] = a.lr * scale
        x, y = batch(data, rows, rng)
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        kl = torch.zeros(())
        if core is not None:
            target = logits.detach().flatten(0, 1).log_softmax(-1)
            sub = model(x, sub_network(len(model.layers), core, pick)).flatten(0, 1).log_softmax(-1)
            kl = F.kl_div(sub, target, log_target=True, reduction="batchmean")
            kl.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        ema = loss.item() if math.isnan(ema) else 0.95 * ema + 0.05 * loss.item()
        if time.time() - said > 60:
            said = time.time()
            v, same = held_out(model, held, core)
            log(
                f"{done:6.0f}s step {step} loss {ema:.3f} kl {kl.item():.3f} held-out {v:.3f} core top-1 agreement {same:.3f}"
            )
        if time.time() - saved > a.save_every:
            saved = time.time()
            save(opts=[o.state_dict() for o in opts], done=done, step=step)
    v, same = held_out(model, held, core)
    log(
        f"stage over: step {step} held-out {v:.4f} core top-1 agreement {same:.4f} tokens {step * rows * CONTEXT}"
    )


# ---------------------------------------------------------------- export
def export(model: Llama, out: Path) -> None:
    from safetensors.torch import save_file

    s = model.s
    tensors = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        for name, p in layer.named_parameters():
            part = "" if "norm" in name else "self_attn." if name[0] in "qkvo" else "mlp."
            tensors[f"model.layers.{i}.{part}{name}"] = p
    save_file(
        {k: v.detach().to(torch.bfloat16).contiguous() for k, v in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": s.hidden, "intermediate_size": s.mlp, "num_hidden_layers": len(model.layers),
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "vocab_size": VOCAB,
        "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16",
    }, indent=1) + "\n")  # fmt: skip
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>",
        "pad_token": "<|end|>", "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False,
    }, indent=1) + "\n")  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["target", "draft"])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--core-layers", type=int, default=4)
    p.add_argument("--core-minutes", type=float, default=40)
    p.add_argument("--joint-minutes", type=float, default=55)
    p.add_argument("--rows", type=int, default=8, help=f"sequences of {CONTEXT} tokens a step")
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--save-every", type=float, default=180)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    data, held = prepare(a.out)
    shape = Shape(192, 640, 6, 2) if a.what == "target" else Shape(128, 384, 4, 2)
    if a.what == "draft":
        a.core_layers = 2
    model, core, stage = Llama(shape, a.core_layers), None, "core"
    state: dict = {}
    path = a.out / "state.pt"

    def log(line: str) -> None:
        print(line, flush=True)
        with (a.out / "train.log").open("a") as f:
            f.write(line + "\n")

    def save(**kw) -> None:
        torch.save(dict(stage=stage, core=core, model=model.state_dict(), **kw), path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        export(model, a.out)

    if path.exists():
        state = torch.load(path)
        stage, core = state["stage"], state["core"]
        if stage == "joint":
            model = Llama(shape, a.layers)
        model.load_state_dict(state["model"])
    compiled = (lambda: [layer.compile() for layer in model.layers]) if a.compile else (lambda: None)
    log(
        f"train tokens {len(data)} held-out {len(held)} parameters {sum(q.numel() for q in model.parameters())} {vars(a)}"
    )
    if stage == "core":
        compiled()
        train(model, data, held, a, a.core_minutes * 60, None, log, state, save)
        state = {}
        if a.what == "target":
            export(model, a.out)
            model, core = model.grow(a.layers)
            stage = "joint"
            save()
    if stage == "joint":
        log(f"joint: {a.layers} layers, core {core}, parameters {sum(q.numel() for q in model.parameters())}")
        compiled()
        train(model, data, held, a, a.joint_minutes * 60, core, log, state, save)
    save()


if __name__ == "__main__":
    main()
