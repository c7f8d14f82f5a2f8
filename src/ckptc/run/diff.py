"""Two checkpoints compared, tree and values: which arrays only one has, which differ in shape, dtype or values, and by
how much.

Either may be safetensors or Orbax. Arrays are paired by name: a tensor's name, or an array's path joined with slashes.
Values are read box by box, both sides of one box at a time, in boxes of whole chunks where a side has chunks; so
memory is what two boxes need, and their numbers once more as float64 where they differ in any bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.saved import is_parameter
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.plan.model import Box
from ckptc.storage.checkpoint.orbax_reader import open_reader, open_saved
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from ckptc.storage.checkpoint.safetensors_writer import runs
from ckptc.storage.checkpoint.steps import require_directory
from ckptc.storage.checkpoint.sums import Summed, Sums, noted
from ckptc.storage.source.ranges import RangeReader

Values = npt.NDArray[Any]
SHARE = 32  # a box takes at most this fraction of the budget: there are two, and numbers computed from both
PIECE = 1 << 20  # elements compared as float64 at once


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...] | None  # what is read as one; None where any range can be read


@dataclass(frozen=True, slots=True)
class Difference:
    """One array that is not the same in both. `kind`: missing, extra, shape, dtype or values."""

    name: str
    kind: str
    first: str = ""  # the type in the first checkpoint
    second: str = ""
    elements: int = 0  # how many differ
    absolute: float = 0.0  # the largest |a - b|
    relative: float = 0.0  # the largest |a - b| / max(|a|, |b|)


@dataclass(frozen=True, slots=True)
class Comparison:
    arrays: int  # that both have
    equal: int  # of them, bit for bit
    bytes: int  # read of each
    differences: tuple[Difference, ...]
    checksums: tuple[int | None, int | None]  # of each side, the arrays compared that have the checksum they were
    # written with; None for safetensors, which note none


class Side(ABC):
    """A checkpoint that can be listed, and read by boxes."""

    entries: Mapping[str, Entry]
    said: str = ""  # which step it is, where there were several
    summed: int | None = None  # arrays that had their checksums

    def check(self, name: str) -> list[Diagnostic]:
        """Whether an array that has been read has the checksum it was written with, if it has one."""
        return []

    @abstractmethod
    def read(self, name: str, box: Box) -> Values:
        """The elements of a box ([low, high) along each axis)."""


class SafetensorsSide(Side):
    def __init__(self, directory: Path) -> None:
        checkpoint = open_checkpoint(directory)
        self._tensors = checkpoint.tensors
        self._reader = RangeReader(directory, checkpoint.files)
        self.entries = {t.name: Entry(t.name, t.shape, t.dtype, None) for t in checkpoint.tensors.values()}

    def read(self, name: str, box: Box) -> Values:
        tensor = self._tensors[name]
        out = np.empty([high - low for low, high in box], dtype=numpy_dtype(tensor.dtype))
        view = out.reshape(-1).view(np.uint8).data
        at = 0
        for first, length in runs(tensor.shape, box):
            size = length * out.itemsize
            self._reader.read_into(tensor.file, tensor.begin + first * out.itemsize, view[at : at + size])
            at += size
        return out


class OrbaxSide(Side):
    """`others`: whether what is no parameter is listed, too."""

    def __init__(self, directory: Path, memory: int, others: bool = False) -> None:
        saved, step = open_saved(directory, optimizer=others)
        arrays = [a for a in saved.arrays if others or is_parameter(a.path)]
        self._paths = {a.name: a.path for a in arrays}
        listed = [Summed(a.name, a.shape, a.dtype, a.chunk) for a in arrays]
        self._sums = Sums(noted(saved.custom), listed)
        self._reader, self._memory = open_reader(step.items, sums=self._sums), memory
        self.summed = 0
        self.said = step.said
        self.entries = {a.name: Entry(a.name, a.shape, a.dtype, a.chunk) for a in arrays}

    def read(self, name: str, box: Box) -> Values:
        entry = self.entries[name]
        out = np.empty([high - low for low, high in box], dtype=numpy_dtype(entry.dtype))
        axes = [(low, 1, high - low) for low, high in box]
        self._reader.read(self._paths[name], axes, entry.chunk or entry.shape, out, self._memory // 4)
        return out

    def check(self, name: str) -> list[Diagnostic]:
        for chunk in self._sums.missing(name):
            self._reader.read_for_sums(chunk)
        problems = self._sums.differ(name)
        self.summed = (self.summed or 0) + (self._sums.has(name) and not problems)
        return problems


def open_side(directory: Path, memory: int, others: bool = False) -> Side:
    """The checkpoint in a directory, whichever kind it is; of an Orbax checkpoint the parameters, with `others`
    everything. Raises what opening either raises.
    """
    require_directory(directory, "give a checkpoint: safetensors, or Orbax")
    if any(directory.glob("*.safetensors")):
        return SafetensorsSide(directory)
    return OrbaxSide(directory, memory, others)


def compare(first: Side, second: Side, memory: int, on_array: Callable[[str], None] = lambda _: None) -> Comparison:
    """Everything that differs, in the order of names. `memory`: bytes of buffers.

    Raises InputError: `checksum-differs` for each array that is damaged, and what reading raises.
    """
    differences: list[Difference] = []
    damaged: list[Diagnostic] = []
    both = sorted(first.entries.keys() & second.entries.keys())
    done = equal = 0
    for name in sorted(first.entries.keys() | second.entries.keys()):
        a, b = first.entries.get(name), second.entries.get(name)
        if a is None or b is None:
            kind = "missing" if b is None else "extra"
            differences.append(Difference(name, kind, _type(a), _type(b)))
            continue
        on_array(name)
        if a.shape != b.shape:
            differences.append(Difference(name, "shape", _type(a), _type(b)))
            continue
        count, absolute, relative = _values(first, second, a, b, memory)
        damaged += first.check(name) + second.check(name)
        done += prod(a.shape) * itemsize(a.dtype)
        if a.dtype != b.dtype or count:
            kind = "dtype" if a.dtype != b.dtype else "values"
            differences.append(Difference(name, kind, _type(a), _type(b), count, absolute, relative))
        else:
            equal += 1
    if damaged:
        raise InputError(dict.fromkeys(damaged))
    return Comparison(len(both), equal, done, tuple(differences), (first.summed, second.summed))


def _type(entry: Entry | None) -> str:
    return "" if entry is None else f"{entry.dtype}{list(entry.shape)}"


def _values(first: Side, second: Side, a: Entry, b: Entry, memory: int) -> tuple[int, float, float]:
    """How many elements differ, and the largest differences, absolute and relative."""
    count, absolute, relative = 0, 0.0, 0.0
    for box in boxes(a, b, max(1, memory // SHARE)):
        x, y = first.read(a.name, box), second.read(a.name, box)
        if x.dtype == y.dtype and np.array_equal(x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8)):
            continue
        for found in _pieces(x.reshape(-1), y.reshape(-1)):
            count, absolute, relative = count + found[0], max(absolute, found[1]), max(relative, found[2])
    return count, absolute, relative


def _pieces(x: Values, y: Values) -> Iterator[tuple[int, float, float]]:
    for at in range(0, x.size, PIECE):
        p, q = x[at : at + PIECE], y[at : at + PIECE]
        if p.dtype == q.dtype:
            raw = np.dtype(f"u{p.itemsize}")
            different = p.view(raw) != q.view(raw) if p.itemsize <= 8 else p != q
        else:
            different = np.ones(p.shape, dtype=np.bool_)
        u, v = p[different].astype(np.float64), q[different].astype(np.float64)
        with np.errstate(all="ignore"):
            apart = np.abs(u - v)
            apart[(np.isnan(u) & np.isnan(v)) | (u == v)] = 0
            apart[np.isnan(apart)] = np.inf
            ratio = apart / np.maximum(np.abs(u), np.abs(v))
        ratio[apart == 0] = 0
        ratio[np.isnan(ratio)] = np.inf
        # Elements of one dtype differ where their bits do (-0 is not 0); of two dtypes, where their values do.
        number = len(apart) if p.dtype == q.dtype else int(np.count_nonzero(apart))
        yield number, float(apart.max(initial=0)), float(ratio.max(initial=0))


def boxes(a: Entry, b: Entry, most: int) -> Iterator[Box]:
    """Boxes of at most `most` bytes that cover an array, row-major: whole chunks of a side that has them, if they fit;
    and no box is empty.
    """
    size = max(itemsize(a.dtype), itemsize(b.dtype))
    chunk = a.chunk or b.chunk
    unit = [min(c, n) for c, n in zip(chunk, a.shape, strict=True)] if chunk else [1] * len(a.shape)
    while prod(unit) * size > most and max(unit, default=1) > 1:
        axis = next(i for i, u in enumerate(unit) if u > 1)
        unit[axis] = -(-unit[axis] // 2)
    for axis in reversed(range(len(unit))):
        room = most // (size * max(1, prod(unit)))
        unit[axis] = min(a.shape[axis], unit[axis] * max(1, room))
        if unit[axis] < a.shape[axis]:
            break
    if 0 in a.shape:
        return
    for corner in product(*(range(0, n, u) for n, u in zip(a.shape, unit, strict=True))):
        yield tuple((c, min(c + u, n)) for c, u, n in zip(corner, unit, a.shape, strict=True))
