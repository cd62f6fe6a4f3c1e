"""Which commit this package runs from, for plans and results that say how they were made."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_sha() -> str | None:
    """The commit of the source tree that this package runs from, if it is one.

    Asked of this file's own history: an installed copy inside somebody else's repository has none.
    """
    here = Path(__file__)
    try:
        done = subprocess.run(
            ["git", "-C", str(here.parent), "log", "-1", "--format=%H", "HEAD", "--", here.name],
            capture_output=True,
            text=True,
            timeout=5,
        )
        if not done.stdout.strip():
            return None
        done = subprocess.run(
            ["git", "-C", str(here.parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
