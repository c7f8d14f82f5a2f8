"""The checksums that a checkpoint of ckptc carries, compared with what is read of it.

    chunk, read whole -> its sum, in a table that worker processes share -> array, once all its chunks are there

Whoever reads a chunk whole notes it here; chunks that were only ever read in part are listed by `missing`, to be read
once more. Then every array that was asked for is compared with the checksum that was noted when it was written
(`ckptc.storage.formats.checksum`). Memory: 9 bytes for each chunk.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import Diagnostic
from ckptc.storage.formats import checksum
from ckptc.storage.formats.zarr3 import grid

_HELP = (
    "copy the checkpoint again, or convert it again; if it happens twice, the machine's memory or disk may be at fault"
)
Axes = tuple[tuple[int, int, int], ...]  # start, stride and count along each axis


@dataclass(frozen=True, slots=True)
class Summed:
    """An array that is to be compared."""

    name: str  # its path joined with slashes
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]

    @property
    def cells(self) -> int:
        return prod(grid(self.shape, self.chunk))


def noted(custom: Mapping[str, Any]) -> dict[str, str]:
    """Checksums by array, from a checkpoint's custom metadata: none where it has none, or of a kind not known here."""
    made = custom.get("ckptc")
    known = made.get("checksums") if isinstance(made, dict) and made.get("checksum") == checksum.NAME else None
    return {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else {}


class Sums:
    """What was found of some arrays' chunks. Processes that are forked share it; not for several threads of one."""

    def __init__(self, known: Mapping[str, str], arrays: Iterable[Summed]) -> None:
        """`known`: as `noted`; `arrays`: those that will be read."""
        self._known = known
        self._arrays: dict[str, Summed] = {}
        self._begins: dict[str, int] = {}
        self.without: list[str] = []  # arrays that have no checksum
        total = 0
        for array in sorted({a.name: a for a in arrays}.values(), key=lambda a: a.name):
            if array.name not in known:
                self.without.append(array.name)
                continue
            self._arrays[array.name], self._begins[array.name] = array, total
            total += array.cells
        shared = mmap.mmap(-1, max(1, 9 * total))  # anonymous and shared: forked processes write into the same
        self._sums = np.frombuffer(shared, dtype=np.uint64, count=total)
        self._seen = np.frombuffer(shared, dtype=np.uint8, count=total, offset=8 * total)
        self._summer = checksum.Summer()

    def __bool__(self) -> bool:
        return bool(self._arrays)

    @property
    def compared(self) -> int:
        """How many arrays have a checksum."""
        return len(self._arrays)

    def note(self, name: str, index: Sequence[slice], values: npt.NDArray[Any]) -> None:
        """A piece of a chunk was read: its indices in the array, and its values. Counts where it is the whole chunk."""
        array = self._arrays.get(name)
        if array is None:
            return
        for i, c, n in zip(index, array.chunk, array.shape, strict=True):
            begin = i.start // c * c
            last = min(begin + c, n) - 1
            if i.start != begin or i.stop <= last or (last > begin and i.step != 1):
                return
        where = tuple(i.start // c for i, c in zip(index, array.chunk, strict=True))
        cell = checksum.cell_of(where, grid(array.shape, array.chunk))
        at = self._begins[name] + cell
        if not self._seen[at]:
            self._sums[at] = self._summer.chunk(cell, values)
            self._seen[at] = 1

    def missing(self, only: str | None = None) -> list[tuple[str, Axes]]:
        """Chunks, of all arrays or of one, that were not read whole: the array, and the box."""
        out = []
        for name, array in self._of(only):
            begin, cells = self._begins[name], grid(array.shape, array.chunk)
            for cell in np.flatnonzero(self._seen[begin : begin + array.cells] == 0):
                where = np.unravel_index(int(cell), cells) if cells else ()
                box = zip(where, array.chunk, array.shape, strict=True)
                out.append((name, tuple((int(i) * c, 1, min(c, n - int(i) * c)) for i, c, n in box)))
        return out

    def has(self, name: str) -> bool:
        """Whether an array has a checksum to compare with."""
        return name in self._arrays

    def array(self, name: str) -> Summed:
        """One that is to be compared."""
        return self._arrays[name]

    def _of(self, only: str | None) -> Iterable[tuple[str, Summed]]:
        if only is None:
            return self._arrays.items()
        return [(only, self._arrays[only])] if only in self._arrays else []

    def differ(self, only: str | None = None) -> list[Diagnostic]:
        """`checksum-differs` for each array, of all or of one, with another checksum than was noted. Every chunk must
        have been read.
        """
        problems = []
        for name, array in self._of(only):
            begin = self._begins[name]
            own = slice(begin, begin + array.cells)
            if not self._seen[own].all():
                raise AssertionError(f"{name}: not all chunks were read")
            found = checksum.seal(int(self._sums[own].sum(dtype=np.uint64)), array.shape, array.dtype, array.chunk)
            if found != self._known[name]:
                problems.append(differs(name, self._known[name], found))
        return problems


def differs(name: str, expected: str, found: str) -> Diagnostic:
    """`checksum-differs`, of one array."""
    message = f"`{name}` does not have the checksum that was noted when it was written"
    return Diagnostic("checksum-differs", message, None, (f"expected: {expected}", f"found: {found}"), _HELP)
