"""What is durable of files that are being written, so that the same command goes on where a run was interrupted.

    <directory>/.ckptc-journal      JSON, a line each: the plan and what it reads, then units of work that are on the disk

A line is written only after the data it speaks of is durable. A line that a crash cut short is not there. Worker
processes that are forked append to the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptc.regular import open_file

JOURNAL = ".ckptc-journal"


@dataclass(frozen=True, slots=True)
class Noted:
    """What a journal says."""

    plan: str  # digest
    source: Mapping[str, Sequence[Any]]  # of each file that was read, what the system said of it
    units: frozenset[int]
    length: int  # bytes of its whole lines


def read_notes(directory: Path) -> Noted | None:
    """What the journal in a directory says; None where there is none, or none that can be understood. Raises OSError
    where it is no regular file."""
    try:
        with open_file(directory / JOURNAL) as file:
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    with suppress(ValueError, TypeError, KeyError, IndexError, RecursionError):
        head, length, units = json.loads(lines[0]), len(lines[0]) + 1, set[int]()
        noted = str(head["plan"]), {str(name): list(status) for name, status in head["source"].items()}
        with suppress(ValueError, TypeError):
            for line in lines[1:]:
                units.update(map(int, json.loads(line)))
                length += len(line) + 1
        return Noted(*noted, frozenset(units), length)
    return None


class Notes:
    """A journal that is written."""

    def __init__(self, directory: Path, plan: str, source: Mapping[str, Sequence[Any]], kept: Noted | None) -> None:
        """`kept`: of an earlier run, to be continued."""
        path = directory / JOURNAL
        if kept is not None:
            os.truncate(path, kept.length)
        else:
            new = path.with_name(f"{path.name}.new")
            head = {"plan": plan, "source": {name: list(status) for name, status in source.items()}}
            with new.open("w", encoding="utf-8") as file:
                file.write(json.dumps(head) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, units: Sequence[int]) -> None:
        """Units whose data is durable by now."""
        os.write(self._descriptor, json.dumps(list(units)).encode() + b"\n")
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
