"""A linear in lower precision beside the full-precision one it was made from, run by vLLM's kernels.

vLLM picks the kernel by platform, as it does for a quantised checkpoint. Its methods for online
quantisation (`layers.quantization.online`) are not used: they want a `LinearBase` with weights on the meta
device, and round on their own; the kernels under them take the codes of `sdfp_vllm/plan/rounding.py` as they are.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.rounding import (
    ROUNDED,
    Precision,
    Rounded,
    copy_bytes,
    group_size,
    reference_linear,
    round_weight,
    unroundable,
)

_TRIAL = 64  # rows and columns of the weight a kernel is tried on before it is trusted
_TRIAL_ERROR = 0.3  # of the product, against `reference_linear`: weight-only kernels differ by some percent


class RoundedLinear(nn.Module):
    """x W^T + b with W, and where the kernel does so x, in lower precision.

    Args:
        weight: [N, K], float32, bfloat16 or float16, on the engine's device. Neither changed nor kept.
        bias: [N] or None; copied.
        precision: One of `sdfp_vllm.plan.rounding.ROUNDED`.
        name: What vLLM's log calls the layer.
        reference: Use torch's own operations on the same codes, on any machine; slow.

    Raises:
        SdfpError: Where vLLM has no kernel for this precision, dtype and shape here.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, precision: Precision, name: str, *, reference: bool = False
    ):
        super().__init__()
        n, k = weight.shape
        if why := unroundable(precision, k) if reference else refusal(precision, weight.dtype, n, k):
            raise _no_kernel(precision, why, weight.dtype, n, k)
        self.precision, self.name, self.reference = precision, name, reference
        self.dtype = weight.dtype
        self.in_features, self.out_features = k, n
        self._bias = None if bias is None else bias.detach().clone()
        self._kernel = _Reference(precision) if reference else _kernel(precision, weight.dtype, n, k, name)
        self._packed = _pack(self._kernel, round_weight(weight, precision), self._bias, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., K] in the weight's dtype to [..., N] in that dtype.

        Raises:
            ValueError: On another dtype: the kernel was picked, and the scales and bias laid out, for one.
        """
        if x.dtype != self.dtype:
            raise ValueError(f"{self.name}: made for {self.dtype}, given {x.dtype}")
        # Some kernels read the rows as one block of memory without a check.
        out: Tensor = self._kernel.apply_weights(self._packed, x.contiguous(), self._packed.bias)
        return out

    @torch.no_grad()
    def refresh(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Rounds `weight` [N, K] in place of the one held; a graph compiled over this module follows.

        Args:
            weight: Of the shape and dtype this module was made from. Neither changed nor kept.
            bias: The new bias; None leaves it as it is.
        """
        if weight.shape != (self.out_features, self.in_features) or weight.dtype != self.dtype:
            raise ValueError(
                f"{self.name}: holds [{self.out_features}, {self.in_features}] {self.dtype}, "
                f"given {list(weight.shape)} {weight.dtype}"
            )
        if self._bias is not None and bias is not None:
            self._bias.copy_(bias)
        fresh = RoundedLinear(weight, self._bias, self.precision, self.name, reference=self.reference)
        _take_over(self._packed, fresh._packed)
        _swap_handlers(self._kernel, fresh._kernel)
        _release(fresh._kernel)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy, codes and scales; the kernel's padding and the bias are not counted."""
        return copy_bytes(self.out_features, self.in_features, self.precision, self.dtype)

    @property
    def kernel(self) -> str:
        """The class of the vLLM kernel that runs it, or "Reference"."""
        return type(self._kernel).__name__.lstrip("_")

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.precision}, {self.kernel}"


def refusal(precision: Precision, dtype: torch.dtype, n: int, k: int, *, tried: bool = True) -> str | None:
    """Says why vLLM has no kernel here for a weight [n, k] of `dtype` at `precision`; None: it has one.

    Asks vLLM's selection, after trying the precision once per process on a small weight: a kernel that is
    there but fails, or computes something else, is refused too. With `tried` false only the selection is asked, which
    leaves a GPU alone.
    """
    if why := unroundable(precision, k):
        return why
    try:
        _kernel(precision, dtype, n, k, "trial")
    except SdfpError:
        raise  # a vLLM release this package has not met
    except Exception as e:  # whatever a kernel's own checks raise
        return _in_one_line(e)
    return _fault(precision, dtype) if tried else None


class _Reference:
    """`reference_linear` under the interface of vLLM's kernels."""

    def __init__(self, precision: Precision):
        self.precision = precision

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        group = layer.input_size // layer.weight_scale.shape[1]
        return reference_linear(Rounded(self.precision, layer.weight, layer.weight_scale, group), x, bias)


class _Packed(nn.Module):
    """What kernels read of a linear layer: the names are vLLM's."""

    def __init__(self, n: int, k: int, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.input_size = self.input_size_per_partition = k
        self.output_size = self.output_size_per_partition = n
        self.logical_widths = self.output_partition_sizes = [n]
        self.tp_size = 1
        self.orig_dtype = self.params_dtype = dtype
        self.weight_block_size = None
        self.input_scale = self.input_scale_ub = self.input_zero_point = self.azp_adj = None
        # A copy: some kernels permute or widen it.
        self.bias = None if bias is None else _constant(bias.to(dtype, copy=True))


def _kernel(precision: Precision, dtype: torch.dtype, n: int, k: int, name: str) -> Any:
    """Returns the kernel vLLM picks here; raises whatever vLLM raises where there is none."""
    from sdfp_vllm.engine.upstream import linear as vllm

    _import_operators()
    with _a_config():
        if precision == "int8":
            return vllm.init_int8_linear_kernel(
                is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name=name
            )
        if precision == "fp8":
            if (format := vllm.current_platform.fp8_dtype()) != torch.float8_e4m3fn:
                raise ValueError(f"float8 is {format} here, not float8_e4m3fn")
            return vllm.init_fp8_linear_kernel(
                activation_quant_key=vllm.kFp8DynamicTokenSym,
                weight_quant_key=vllm.kFp8StaticChannelSym,
                input_dtype=dtype,
                out_dtype=dtype,
                weight_shape=(n, k),
                module_name=name,
            )
        if precision == "int4":
            config = vllm.MPLinearLayerConfig(
                full_weight_shape=(k, n),
                partition_weight_shape=(k, n),
                weight_type=vllm.scalar_types.uint4b8,
                act_type=dtype,
                group_size=group_size(k) or -1,
                zero_points=False,
            )
            kernel = vllm.choose_mp_linear_kernel(config)
            return kernel(config, "weight", "weight_scale", "weight_zero_point")
        return vllm.init_mxfp4_linear_kernel(activation_quant_key=vllm.kMxfp4Dynamic)


def _pack(kernel: Any, rounded: Rounded, bias: Tensor | None, dtype: torch.dtype) -> _Packed:
    """Lays the codes and scales out as a checkpoint of that precision would, then as `kernel` wants them."""
    n = len(rounded.codes)
    layer = _Packed(n, rounded.scale.shape[1] * rounded.group, bias, dtype)
    if isinstance(kernel, _Reference) or rounded.precision in ("int8", "mxfp4"):
        layer.weight, layer.weight_scale = _constant(rounded.codes), _constant(rounded.scale)
    elif rounded.precision == "fp8":
        layer.weight, layer.weight_scale = _constant(rounded.codes.t()), _constant(rounded.scale)
    else:
        from sdfp_vllm.engine.upstream import linear as vllm

        # Eight codes to an int32, the lowest input lowest: four bytes of two, read as one number.
        words = rounded.codes.view(torch.int32)
        layer.weight = _vllm_parameter(
            vllm.PackedvLLMParameter, words, input_dim=1, output_dim=0, packed_dim=1, packed_factor=8
        )
        layer.weight_scale = _vllm_parameter(
            vllm.GroupQuantScaleParameter, rounded.scale, input_dim=1, output_dim=0
        )
    with _default_dtype(dtype), _a_config(), torch.no_grad():
        # vLLM tells oneDNN that outputs have torch's default dtype. oneDNN keeps a bare pointer to
        # `layer.weight_scale`, which therefore lives as long as the kernel.
        kernel.process_weights_after_loading(layer)
    return layer


def _vllm_parameter(kind: type[nn.Parameter], data: Tensor, **layout: int) -> nn.Parameter:
    """A parameter with a layout, without vLLM's constructor: that asks for a rank, which only engines have."""
    parameter = kind.__new__(kind, data)
    for name, value in layout.items():
        setattr(parameter, f"_{name}", value)
    return parameter


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _take_over(held: _Packed, fresh: _Packed) -> None:
    """Moves the tensors of `fresh` into the objects `held` has, which compiled graphs may have captured."""
    tensors = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    tensors |= {name: value for name, value in vars(fresh).items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        mine = getattr(held, name)
        if mine.device.type == "cpu":
            mine.data = tensor.data  # the storage itself: oneDNN's new handler points to the new scales
        else:
            mine.data.copy_(tensor.data)  # into the storage: CUDA graphs hold its address


def _swap_handlers(held: Any, fresh: Any) -> None:
    """Exchanges two oneDNN handlers, by value: whoever captured the tensor sees the new one."""
    if (mine := getattr(held, "dnnl_handler", None)) is None:
        return
    theirs = fresh.dnnl_handler
    old = mine.handler_tensor.clone()
    mine.handler_tensor.copy_(theirs.handler_tensor)
    theirs.handler_tensor.copy_(old)


def _release(kernel: Any) -> None:
    """Frees a kernel's oneDNN handler now.

    The kernel refers to itself, so the garbage collector would; and in the middle of a torch.compile,
    where tensors have no values, the handler could not be found and would leak.
    """
    if getattr(kernel, "dnnl_handler", None) is not None:
        kernel.dnnl_handler = None


@functools.cache
def _fault(precision: Precision, dtype: torch.dtype) -> str | None:
    """Runs the precision's kernel on a small weight; says what is wrong with it, None: it is right."""
    from sdfp_vllm.engine.upstream import linear as vllm

    device = torch.device(vllm.current_platform.device_type)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(m, _TRIAL, generator=generator).to(device, dtype) for m in (_TRIAL, 3))
    rounded = round_weight(weight, precision)
    try:
        kernel = _kernel(precision, dtype, _TRIAL, _TRIAL, "trial")
        got = kernel.apply_weights(_pack(kernel, rounded, None, dtype), x, None)
        _release(kernel)
    except Exception as e:  # whatever a kernel's own checks raise
        return _in_one_line(e)
    want = reference_linear(rounded, x).float()
    error = float((got.float() - want).norm() / want.norm())
    if error < _TRIAL_ERROR:
        return None
    return f"{type(kernel).__name__} is {error:.0%} off on {str(dtype).removeprefix('torch.')} inputs"


def _no_kernel(precision: Precision, why: str, dtype: torch.dtype, n: int, k: int) -> SdfpError:
    others = [p for p in ROUNDED if p != precision and refusal(p, dtype, n, k) is None]
    instead = f"Use {' or '.join(others)}, which run here, or draft" if others else "Draft"
    return SdfpError(
        f"--precision {precision}",
        f"vLLM has no kernel here for a {str(dtype).removeprefix('torch.')} weight [{n}, {k}] ({why})",
        f"{instead} at full precision (--precision full).",
    )


def _in_one_line(error: Exception) -> str:
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()).replace(":; ", ": ")
    return (text or type(error).__name__).removesuffix(" Reasons:").rstrip(".")


@functools.cache
def _import_operators() -> None:
    """Registers vLLM's compiled operators, which outside an engine nobody has done."""
    from sdfp_vllm.engine.upstream import linear as vllm

    vllm.current_platform.import_kernels()


@contextlib.contextmanager
def _a_config() -> Iterator[None]:
    """The engine's vLLM configuration or, outside an engine, a default one: kernels ask for it."""
    from sdfp_vllm.engine.upstream import linear as vllm

    if vllm.get_current_vllm_config_or_none() is not None:
        yield
        return
    with vllm.set_current_vllm_config(_default_config()):
        yield


@functools.cache
def _default_config() -> Any:
    from sdfp_vllm.engine.upstream import linear as vllm

    logging.disable(logging.WARNING)  # it remarks on a model it has not got
    try:  # uncompiled: what is tried here runs a few times
        return vllm.VllmConfig(compilation_config=vllm.CompilationConfig(mode=vllm.CompilationMode.NONE))
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
