"""Runs the offline job again and again in one folder, the n-th run killed before its n-th step on the disk.

    python -m tests.support.killed_jobs MODEL TEXT FOLDER

Every run goes on from what the one before left, until one survives. Prints what lay in the folder
after each run, as JSON. A process of its own, because children forked after autograd has run in
the parent cannot use it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = dict(
    sequences=24, length=16, text_sequences=4, prompt=8, new_tokens=8, layers=2, score_text="corpus",
    run_check=False, precision="full",
)  # fmt: skip
_STEPS = ("replace", "fsync", "unlink")  # what the job's writes are made of


def _die_before(n: int) -> None:
    left = n

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        return call

    for name in _STEPS:
        setattr(os, name, counted(getattr(os, name)))


def main(model: str, text: str, folder: Path) -> None:
    from sdfp_vllm.planner.job import make_plan

    left: list[dict[str, Any]] = []
    while not left or left[-1]["killed"]:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _die_before(len(left) + 1)
                make_plan(model, calibration=text, out=folder, resume=True, **OPTIONS)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            sys.exit("a run failed by itself")
        partial = folder / ".fisher-partial.pt"
        left.append(
            {
                "killed": os.WIFSIGNALED(status),
                "files": sorted(f.name for f in folder.iterdir()) if folder.exists() else [],
                "windows": json.loads(partial.read_text())["sequences"] if partial.exists() else 0,
            }
        )
    print(json.dumps(left))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
