"""Keeps tensors in memory up to a limit, and what is beyond it in files."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sdfp_vllm.errors import SdfpError

_SMALL = 1 << 14  # bytes; what is smaller stays in memory, a file for it costs more than it saves


class Spill:
    """Holds tensors while memory lasts; `saving()` makes autograd hold what backward passes need in here as well.

    Use as a context manager; its files are gone afterwards.

    Args:
        limit: Bytes to hold in memory; None for no limit.
        beside: Tensors that lie in memory anyway, such as weights: autograd's references to them count for nothing.

    Attributes:
        held, stored: Bytes in memory and in files now.
        most_held, most_stored: The most that these were at one time.
    """

    def __init__(self, limit: int | None = None, beside: Iterable[Tensor] = ()):
        self.limit = limit
        self.held = self.stored = self.most_held = self.most_stored = 0
        self._beside = {x.untyped_storage().data_ptr() for x in beside}
        self._users: Counter[int] = Counter()  # of each storage in memory, by its address
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._names = itertools.count()

    def keep(self, tensor: Tensor, spare: int = 0) -> Kept:
        """Keeps a copy of `tensor`, in memory if `spare` bytes are left free beside it."""
        tensor = tensor.detach()
        if self._fits(tensor.nbytes + spare) or tensor.nbytes < _SMALL:
            return _Held(self, tensor.clone())
        return _Stored(self, tensor)

    def saving(self) -> saved_tensors_hooks:
        """A context in which what autograd saves is kept here; as itself in memory, not as a copy."""
        return saved_tensors_hooks(
            self._pack, lambda packed: packed if isinstance(packed, Tensor) else packed.get()
        )

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._beside:
            return tensor
        # Several operations save the same tensor, or parts of one: it is in memory once.
        if address in self._users or self._fits(storage.nbytes()) or tensor.nbytes < _SMALL:
            return _Held(self, tensor.detach())  # an operation that saves its own result must not hold itself
        return _Stored(self, tensor)

    def _fits(self, size: int) -> bool:
        return self.limit is None or self.held + size <= self.limit

    def path(self) -> Path:
        """A new name in a folder for temporary files."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="sdfp-dipgo-")
        return Path(self._folder.name, f"{next(self._names)}.bin")

    def hold(self, storage: torch.UntypedStorage) -> None:
        self._users[storage.data_ptr()] += 1
        if self._users[storage.data_ptr()] == 1:
            self.held += storage.nbytes()
            self.most_held = max(self.most_held, self.held)

    def drop(self, storage: torch.UntypedStorage) -> None:
        self._users[storage.data_ptr()] -= 1
        if not self._users[storage.data_ptr()]:
            del self._users[storage.data_ptr()]
            self.held -= storage.nbytes()

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Kept:
    """A tensor that a `Spill` keeps for as long as this is referred to."""

    def get(self) -> Tensor:
        raise NotImplementedError


class _Held(Kept):
    def __init__(self, spill: Spill, tensor: Tensor):
        self._spill, self._tensor, self._version = spill, tensor, tensor._version
        spill.hold(tensor.untyped_storage())

    def get(self) -> Tensor:
        # Autograd checks this itself, but not where it saves through hooks.
        if self._tensor._version != self._version:
            raise SdfpError(
                "DiP-GO recording",
                "the model writes into a tensor that its gradients need",
                "Search without what does that (FreeU, adapters), or with --method learned.",
            )
        return self._tensor

    def __del__(self) -> None:
        self._spill.drop(self._tensor.untyped_storage())


class _Stored(Kept):
    def __init__(self, spill: Spill, tensor: Tensor):
        dense = (
            tensor.detach().cpu().clone()
        )  # a part of a larger tensor, or one on a GPU, becomes one of its own
        self._spill, self._path, self._device = spill, spill.path(), tensor.device
        self._dtype, self._shape, self._strides = dense.dtype, dense.shape, dense.stride()
        raw = torch.empty(0, dtype=torch.uint8).set_(dense.untyped_storage())  # type: ignore[call-overload]
        try:
            raw.numpy().tofile(self._path)
        except OSError as e:
            raise SdfpError(
                str(self._path.parent),
                f"cannot take what is beyond the memory for a recording ({e})",
                "Give more --memory, or set TMPDIR to a folder on a larger disk.",
            ) from e
        self._size = raw.numel()
        spill.stored += self._size
        spill.most_stored = max(spill.most_stored, spill.stored)

    def get(self) -> Tensor:
        raw = torch.empty(self._size, dtype=torch.uint8)
        with self._path.open("rb") as file:
            file.readinto(raw.numpy().data)
        whole = torch.empty(0, dtype=self._dtype)
        whole.set_(raw.untyped_storage(), 0, self._shape, self._strides)  # type: ignore[call-overload]
        return whole.to(self._device)

    def __del__(self) -> None:
        if hasattr(self, "_size"):
            self._path.unlink(missing_ok=True)
            self._spill.stored -= self._size
