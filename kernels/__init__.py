"""Triton kernels of the layer-skip path, one op per file, each with a torch reference."""
