"""Lets torchvision be imported where the half of it that is compiled cannot be loaded.

A build for CUDA finds no CUDA here, and its Python half then describes operators that nobody declared. Image processors
need none of them. Tests run this file for themselves (`tests/support/vision.py`); processes that they start find it on
PYTHONPATH, as the sitecustomize, and with it the one that would have been.
"""

import importlib.abc
import os
import runpy
import sys

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the operators in the middle of torchvision's import: its compiled half was tried by then, and is not there."""

    declared = None  # a library ends with its object

    def find_spec(self, fullname, path, target=None):
        if fullname == "torchvision._meta_registrations" and self.declared is None:
            import torch

            if not sys.modules["torchvision.extension"]._has_ops():
                self.declared = torch.library.Library("torchvision", "DEF")
                for operator in _OPERATORS:
                    self.declared.define(operator)
        return None


sys.meta_path.insert(0, DeclareOperators())

if __name__ == "sitecustomize":  # one is run, the first: this one runs the next
    _others = (os.path.join(folder, "sitecustomize.py") for folder in sys.path)
    _next = next((f for f in _others if os.path.isfile(f) and not os.path.samefile(f, __file__)), None)
    if _next is not None:
        runpy.run_path(_next)
