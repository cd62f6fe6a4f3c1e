"""torchvision for tests: transformers' image processors are built on it, and a CPU's environment may have none.

`make` installs packaging/vision.txt into a folder beside the environment's own packages, never among them: an import of
torchvision that fails is worse for transformers than none. Imported before transformers, which looks for it once.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("VISION_FOLDER") or Path(sys.prefix) / "vision").resolve()
_STARTUP = Path(__file__).parent / "vision_startup"


def usable() -> bool:
    """Makes torchvision importable here and in processes that are started from here, if it is not; whether it is now."""
    if importlib.util.find_spec("torchvision") is None and (FOLDER / "torchvision").is_dir():
        sys.path.append(str(FOLDER))
        # A test worker was started with what follows, and then given the path of who started it.
        if not any(type(finder).__name__ == "DeclareOperators" for finder in sys.meta_path):
            runpy.run_path(str(_STARTUP / "sitecustomize.py"))
        # vLLM looks into a model's module in a process of its own, and servers are others too.
        before = os.environ.get("PYTHONPATH", "")
        if str(_STARTUP) not in before.split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_STARTUP), before, str(FOLDER)]))
    return importlib.util.find_spec("torchvision") is not None
