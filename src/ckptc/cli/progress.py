"""Progress on a terminal: bytes, rate, time left, resident memory, the array being made. Elsewhere, nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptc.run.work import Progress

SHOWN = 60  # characters of an array's name


@contextmanager
def show_progress(enabled: bool) -> Iterator[Callable[[Progress], None]]:
    """A function to call with each step."""
    if not enabled or not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    from ckptc.cli.render import size
    from ckptc.run.memory import resident_bytes

    columns = (
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}", markup=False),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, memory="")

        def step(progress: Progress) -> None:
            name = progress.array if len(progress.array) <= SHOWN else "…" + progress.array[-SHOWN:]
            bar.update(
                task,
                completed=progress.written,
                total=progress.total,
                description=name,
                memory=f"{size(resident_bytes())} resident",
            )

        yield step
