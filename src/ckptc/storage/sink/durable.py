"""A finished local directory: made durable, then named, so that after a crash all is there or none."""

from __future__ import annotations

import os
from pathlib import Path

from ckptc.diagnostics import fail


def make_durable(directory: Path) -> None:
    """Has the system write all of a directory to the disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def commit(partial: Path, final: Path) -> None:
    """Make everything in `partial` durable, then give it its final name: after a crash, all is there or none.

    Raises:
        InputError: `output-exists`: there is something at `final`.
    """
    if final.exists():
        raise fail("output-exists", f"the output `{final}` exists", help="choose another one, or remove it")
    make_durable(partial)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(partial, final)
    _sync(final.parent)
    _sync(partial.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
