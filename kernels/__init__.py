"""Triton kernels of the layer-skip path, one op per file: kernel, launcher, torch reference.

A launcher runs its Triton kernel on CUDA tensors (or on any tensor under TRITON_INTERPRET=1) and its
torch reference elsewhere, through the same interface. `docs/reference/kernels.md` has formulas and bytes.
"""
