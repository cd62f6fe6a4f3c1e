"""DecoderStack: one view on any Hugging Face causal LM that is a uniform stack of decoder layers.

Any model whose layers have the children of Llama's or Gemma's is taken, and everything else is refused by name; which
families were tried, here and in the engine, is in `plan/families.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdfp_vllm.common.checkpoint import load_config, refused
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.families import SUBLAYER_ARCHITECTURES
from sdfp_vllm.plan.keep import Branch, KeepSet
from sdfp_vllm.plan.view import Precision
from sdfp_vllm.planner.decoder import architecture_of, auto_class, decoder_of
from sdfp_vllm.planner.rounded import rounded_copy
from sdfp_vllm.planner.shown import Shown, entering

# Children of a layer -> the residual branch each belongs to. A norm belongs to the branch it
# feeds or closes, so `post_attention_layernorm` is the MLP's in Llama and attention's in Gemma.
_PRE_NORM = {
    "input_layernorm": "attention",
    "self_attn": "attention",
    "post_attention_layernorm": "mlp",
    "mlp": "mlp",
}
_SANDWICH_NORM = {
    "input_layernorm": "attention",
    "self_attn": "attention",
    "post_attention_layernorm": "attention",
    "pre_feedforward_layernorm": "mlp",
    "mlp": "mlp",
    "post_feedforward_layernorm": "mlp",
}

# The last module of each branch: what it returns is added to the residual stream.
_LAST = {"attention": "self_attn", "mlp": "mlp"}
_SANDWICH_LAST = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}

_TRAINED = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

NamedParameters = list[tuple[str, nn.Parameter]]


class _Skip(nn.Module):
    """Stands in for a skipped layer: the residual stream passes unchanged."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class _NoAttention(nn.Module):
    """Stands in for the attention of a layer that runs its MLP alone: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _NoMlp(nn.Module):
    """Stands in for the MLP of a layer that runs its attention alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class DecoderStack:
    """A causal LM seen as embed -> layers -> norm -> head. Holds the model's own modules, no copies.

    Attributes:
        model: The model as loaded, or the text decoder of a multimodal one (`planner/decoder.py`).
        config: Its text configuration.
        layers: The decoder layers, in order.
        embed, norm, head: Token embedding (with Gemma's scaling), final norm, LM head.

    Raises:
        SdfpError: If the model is not a uniform stack of attention + MLP layers.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.config = model.config.get_text_config()
        inner: Any = getattr(model, "model", None)
        layers = getattr(inner, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise self._unsupported("no decoder layers at model.layers")
        if len({type(layer) for layer in layers}) > 1:
            raise self._unsupported("its layers are of different kinds")
        self._inner = inner
        self.layers: nn.ModuleList = layers
        embed, norm, head = (
            model.get_input_embeddings(),
            getattr(inner, "norm", None),
            model.get_output_embeddings(),
        )
        if embed is None or norm is None or head is None:
            raise self._unsupported("it lacks an embedding, a final norm or an LM head")
        self.embed: nn.Module = embed
        self.norm: nn.Module = norm
        self.head: nn.Module = head
        self._branches = [self._split(i) for i in range(len(layers))]
        self._rounded: dict[tuple[int, Branch, Precision], nn.Module] = {}
        self._linear = {
            b: all(_is_linear(getattr(layer, name)) for layer in layers) for b, name in _LAST.items()
        }
        parameters = [id(p) for i in range(len(layers)) for _, p in self.layer_parameters(i)]
        if len(parameters) != len(set(parameters)):
            raise self._unsupported("its layers share parameters")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device

    def attention_parameters(self, i: int) -> NamedParameters:
        """(name within the layer, parameter) of layer i's attention branch, its norms included."""
        return self._branches[i]["attention"]

    def mlp_parameters(self, i: int) -> NamedParameters:
        """(name within the layer, parameter) of layer i's MLP branch; router and all experts in a MoE."""
        return self._branches[i]["mlp"]

    def layer_parameters(self, i: int) -> NamedParameters:
        """All parameters of layer i: attention's, then the MLP's."""
        return self.attention_parameters(i) + self.mlp_parameters(i)

    @property
    def has_sublayers(self) -> bool:
        """Whether the engine can run one branch of a layer without the other."""
        return architecture_of(self.model) in SUBLAYER_ARCHITECTURES

    def can_round(self, branch: Branch) -> bool:
        """Whether a branch's weights are linears in every layer, which have rounded copies; experts have none."""
        return self._linear[branch]

    def rounded(self, i: int, branch: Branch, precision: Precision) -> nn.Module:
        """Layer i's attention or MLP on weights rounded to `precision`, as the engine runs it; made once."""
        key = (i, branch, precision)
        if key not in self._rounded:
            held = list(dict.fromkeys(p for _, _, p in self._rounded if p != precision))
            if len(held) > 1:  # copies of three precisions at once would be as large as the model
                self._rounded = {k: m for k, m in self._rounded.items() if k[2] != held[0]}
            self._rounded[key] = rounded_copy(getattr(self.layers[i], _LAST[branch]), precision)
        return self._rounded[key]

    def branch_end(self, i: int, branch: Branch) -> nn.Module:
        """The module of layer i whose output (the first, if a tuple) is that branch's share of the residual."""
        layer = self.layers[i]
        names = _SANDWICH_LAST if hasattr(layer, _SANDWICH_LAST["mlp"]) else _LAST
        return getattr(layer, names[branch])

    @contextlib.contextmanager
    def keeping(self, keep: KeepSet | Iterable[int]) -> Iterator[PreTrainedModel]:
        """While open, `model` runs only what is in `keep`; yields `model`.

        Skipped layers are replaced in place by the identity, so every kept layer keeps its
        index and with it its K/V cache slot, mask (sliding or full) and rotary embedding. A layer of
        which one branch is kept is its own forward with the other branch adding nothing, and what a view
        rounds runs on rounded copies of its weights.
        Not re-entrant and not thread-safe: the model is changed while open.

        Args:
            keep: A keep set, a view, or the layers that are kept whole, ascending, without repeats; may be empty.

        Raises:
            SdfpError: If `keep` is not that.
        """
        keep = KeepSet.of(keep)
        if keep.touched() and (problem := keep.problem(self.num_layers)):
            raise SdfpError("keep", problem, f"Name layers 0 to {self.num_layers - 1}.")
        skip = _Skip()
        self._inner.layers = nn.ModuleList(
            self._part(i, keep) if keep.branches(i) else skip for i in range(self.num_layers)
        )
        try:
            yield self.model
        finally:
            self._inner.layers = self.layers

    def _part(self, i: int, keep: KeepSet) -> nn.Module:
        """Layer i, or a copy that shares its parameters and runs what `keep` has of it."""
        layer, runs = self.layers[i], keep.branches(i)
        changed: dict[str, nn.Module] = {}
        for branch, left_out in (("attention", _NoAttention), ("mlp", _NoMlp)):
            if branch not in runs:
                changed[_LAST[branch]] = left_out()
            elif (precision := keep.precision(i, branch)) != "full":
                changed[_LAST[branch]] = self.rounded(i, branch, precision)
        if not changed:
            return layer
        part = copy.copy(layer)
        part._modules = {**layer._modules, **changed}
        return part

    def logits(
        self,
        input_ids: Tensor,
        keep: KeepSet | Iterable[int] | None = None,
        shown: Sequence[Shown | None] = (),
    ) -> Tensor:
        """Runs the model over whole sequences, without a cache, on what is in `keep` (None: all).

        Args:
            input_ids: int64 [B, T] on the model's device, no padding.
            keep: As in `keeping`.
            shown: What each sequence shows at its start; empty for text.

        Returns:
            Logits [B, T, V] in the model's dtype. Gradients follow the caller's grad mode.
        """
        given: dict[str, Any] = {"input_ids": input_ids}
        if any(shown):
            given = entering(self.embed, input_ids, input_ids.new_zeros(len(input_ids)), shown)
        if keep is None:
            return self.model(**given, use_cache=False).logits
        with self.keeping(keep) as model:
            return model(**given, use_cache=False).logits

    def scaled(self, logits: Tensor) -> Tensor:
        """What `head` gives, with the model's scale and soft cap of logits: the same argmax, other probabilities."""
        config = self.config
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _split(self, i: int) -> dict[str, NamedParameters]:
        """Sorts layer i's parameters into its two branches; each belongs to exactly one."""
        layer = self.layers[i]
        with_parameters = {
            name for name, child in layer.named_children() if any(True for _ in child.parameters())
        }
        branch_of = next((b for b in (_PRE_NORM, _SANDWICH_NORM) if set(b) == with_parameters), None)
        if branch_of is None:
            raise self._unsupported(f"layer {i} has the parts {sorted(with_parameters)}")
        branches: dict[str, NamedParameters] = {"attention": [], "mlp": []}
        for name, parameter in layer.named_parameters():
            part = name.split(".", 1)[0]
            if part not in branch_of:
                raise self._unsupported(
                    f"parameter {name!r} of layer {i} belongs to neither attention nor MLP"
                )
            branches[branch_of[part]].append((name, parameter))
        return branches

    def _unsupported(self, why: str) -> SdfpError:
        return SdfpError(
            f"model architecture {architecture_of(self.model)}",
            f"not a uniform stack of attention + MLP decoder layers ({why})",
            "Use a causal LM of a family in docs/use/compatibility.md.",
        )


def _is_linear(module: nn.Module) -> bool:
    """Whether all but a trifle of its weights are linears'."""
    linears = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    return linears > 0.9 * sum(p.numel() for p in module.parameters())


def load_target(
    model_dir: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    look: Callable[[Any], None] | None = None,
) -> PreTrainedModel:
    """Loads a causal LM from a local folder, in eval mode; of a multimodal model, its text decoder.

    Args:
        dtype: None keeps the checkpoint's.
        device: One device, or "auto" for layer after layer over all GPUs (needs accelerate).
        trust_remote_code: Run code that comes with the checkpoint where it needs that.
        look: Called with a multimodal model as a whole, before its encoder is let go.

    Raises:
        SdfpError: If the folder holds no causal LM, or its weights are damaged, incomplete or quantised.
    """
    # from_pretrained would fill missing weights with random numbers and only warn.
    try:
        loaded: Any = auto_class(load_config(model_dir, trust_remote_code)).from_pretrained(
            str(model_dir),
            dtype=dtype or "auto",
            device_map="auto" if device == "auto" else None,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except SdfpError:
        raise
    except Exception as e:  # every library below has its own exceptions
        raise refused(model_dir, e) or SdfpError(
            f"model {model_dir}",
            f"cannot be loaded as a causal LM ({type(e).__name__}: {e})",
            "Give a folder with config.json and undamaged weight files of a decoder-only language model.",
        ) from e
    whole, info = loaded
    model = decoder_of(whole)
    # Mismatched shapes come as (name, shape, shape) tuples in some releases, as names in others.
    absent = sorted(str(k) for field in ("missing_keys", "mismatched_keys") for k in info.get(field) or ())
    if absent:
        raise SdfpError(
            f"model {model_dir}",
            f"{len(absent)} weights are missing or of the wrong shape, the first is {absent[0]}",
            "Download or save the model again.",
        )
    rounded = next((n for n, p in model.named_parameters() if p.dtype not in _TRAINED), None)
    if rounded is not None:
        raise SdfpError(
            f"model {model_dir}",
            f"has quantised weights ({rounded} is {model.get_parameter(rounded).dtype}), which have no gradients",
            "Use the unquantised checkpoint.",
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the default, PyTorch's own, leaves Gemma 2's cap out
    if look is not None:
        look((whole if device == "auto" else whole.to(device)).eval())
    return (model if device == "auto" else model.to(device)).eval()
