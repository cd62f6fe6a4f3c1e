"""Plans and `torch.compile`: a plan decides between graphs, and its own code is in none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import HookFunctionReference
from torch import nn
from torch._dynamo.eval_frame import skip_code

from sdfp_vllm.dipgo.layout import unwrapped

F = TypeVar("F", bound=Callable)


def between_graphs(function: F) -> F:
    """Breaks a graph at calls of `function`, and never compiles it; what is called from it may be.

    `torch.compiler.disable(recursive=False)` alone breaks the graph, and then compiles the function itself, anew for steps
    that it has not seen.
    """
    skip_code(function.__code__)
    return torch.compiler.disable(  # type: ignore[no-any-return]
        function, recursive=False, reason="a DiP-GO plan skips it in some calls"
    )


def is_one_graph(denoiser: Any) -> bool:
    """Whether it was compiled with `fullgraph=True`, by `torch.compile(denoiser)` or by `denoiser.compile()`."""
    context = getattr(denoiser, "dynamo_ctx", None)
    compiled = getattr(unwrapped(denoiser), "_compiled_call_impl", None)
    if context is None and inspect.isfunction(compiled):
        context = inspect.getclosurevars(compiled).nonlocals.get("self")
    return bool(getattr(context, "fullgraph", False))


def one_graph_around(denoiser: nn.Module, name: str) -> str | None:
    """The name of the part of `denoiser` around its module `name` that is compiled as one graph; None if there is none."""
    while name := name.rpartition(".")[0]:
        if is_one_graph(denoiser.get_submodule(name)):
            return name
    return None


def put_around(module: nn.Module, hook: ModelHook) -> bool:
    """Puts `hook` around a module that was compiled by itself, outside its graph. False if it was not.

    Inside it, where hooks on `forward` lie, a block that is one graph could not be skipped.
    """
    name = _compiled(module)
    if name is None:
        return False
    hook.fn_ref = HookFunctionReference()
    hook.fn_ref.original_forward = getattr(module, name)
    setattr(module, name, partial(hook.new_forward, module))  # type: ignore[attr-defined]
    return True


def take_off(module: nn.Module, kind: type[ModelHook]) -> None:
    """Undoes `put_around` for a hook of this kind."""
    name = _compiled(module)
    if name is not None:
        hook = getattr(getattr(getattr(module, name), "func", None), "__self__", None)
        if isinstance(hook, kind):
            setattr(module, name, hook.fn_ref.original_forward)


def _compiled(module: nn.Module) -> str | None:
    """The attribute by which a module calls its graphs, after `torch.compile(module)` or `module.compile()`."""
    if unwrapped(module) is not module:
        return "forward"
    return "_compiled_call_impl" if module._compiled_call_impl is not None else None
