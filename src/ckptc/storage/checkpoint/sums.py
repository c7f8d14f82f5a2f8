"""The checksums that a checkpoint of ckptc carries, compared with what is read of it.

    chunk, read whole -> its sum, in a table that worker processes share -> array, once all its chunks are there

Whoever reads a chunk whole notes it here; chunks that were only ever read in part are listed by `missing`, to be read
once more. Then every array that was asked for is compared with the checksum that was noted when it was written
(`ckptc.storage.formats.checksum`). Memory: 9 bytes for each chunk.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

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


class Noted(NamedTuple):
    """What a checkpoint notes of an array."""

    checksum: str
    piece: tuple[int, ...] | None  # what was summed at once; None: chunks

    def grid_of(self, chunk: tuple[int, ...]) -> tuple[int, ...]:
        """The boxes that the checksum is a sum over, of an array of such chunks."""
        return self.piece if self.piece is not None and len(self.piece) == len(chunk) else chunk


def noted(custom: Mapping[str, Any]) -> dict[str, Noted]:
    """Checksums by array, from a checkpoint's custom metadata: none where it has none, or of a kind not known here."""
    made = custom.get("ckptc")
    known = made.get("checksums") if isinstance(made, dict) and made.get("checksum") == checksum.NAME else None
    pieces = made.get("pieces") if isinstance(made, dict) else None
    if not isinstance(known, dict):
        return {}
    return {
        str(k): Noted(str(v), _shape(pieces.get(k)) if isinstance(pieces, dict) else None) for k, v in known.items()
    }


def _shape(value: Any) -> tuple[int, ...] | None:
    good = isinstance(value, list) and all(type(n) is int and n > 0 for n in value)
    return tuple(value) if good else None


class Sums:
    """What was found of some arrays' chunks. Processes that are forked share it; not for several threads of one."""

    def __init__(self, known: Mapping[str, Noted], arrays: Iterable[Summed]) -> None:
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
            array = replace(array, chunk=known[array.name].grid_of(array.chunk))
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
        """A box was read, within a stored chunk: its indices in the array, and its values. Those chunks, or pieces of large
        ones, count that it covers whole.
        """
        array = self._arrays.get(name)
        if array is None:
            return
        axes = []
        for i, c, n in zip(index, array.chunk, array.shape, strict=True):
            whole = range(-(-i.start // c), -(-n // c) if i.stop >= n else i.stop // c)
            if i.step not in (None, 1):  # of an axis with steps, chunks of one index count if it is read
                whole = (
                    range(i.start // c, i.start // c + 1) if i.stop == i.start + 1 and (c == 1 or n == 1) else range(0)
                )
            axes.append(whole)
        cells = grid(array.shape, array.chunk)
        for where in product(*axes):
            cell = checksum.cell_of(where, cells)
            at = self._begins[name] + cell
            if not self._seen[at]:
                box = zip(where, array.chunk, index, strict=True)
                inside: Any = (*(slice(w * c - i.start, (w + 1) * c - i.start) for w, c, i in box), ...)
                self._sums[at] = self._summer.chunk(cell, values[inside])
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
            if found != self._known[name].checksum:
                problems.append(differs(name, self._known[name].checksum, found))
        return problems


def differs(name: str, expected: str, found: str) -> Diagnostic:
    """`checksum-differs`, of one array."""
    message = f"`{name}` does not have the checksum that was noted when it was written"
    return Diagnostic("checksum-differs", message, None, (f"expected: {expected}", f"found: {found}"), _HELP)
