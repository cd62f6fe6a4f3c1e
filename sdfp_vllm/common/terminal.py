"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """The terminal as it is; wide enough for every table where the output goes to a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 120)
