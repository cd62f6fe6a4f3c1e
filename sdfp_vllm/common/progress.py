"""Progress of a long job on the console: one line a stage, with the time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Stages:
    """Stages of a long job; each gets its own line."""

    def __init__(self, progress: Progress):
        self._progress = progress

    @contextlib.contextmanager
    def step(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields advance(count, title=None); the stage is complete when the block ends."""
        task = self._progress.add_task(title, total=total)
        yield lambda count, title=None: self._progress.update(
            task, advance=count, **({"description": title} if title else {})
        )
        self._progress.update(task, completed=total)


@contextlib.contextmanager
def stages(console: Console | None) -> Iterator[Stages]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console is None) as progress:
        yield Stages(progress)
