"""One unit of work: read the byte ranges it needs, make its chunks, hand each over. Buffers are allocated once and reused.

A worker's memory is its two buffers, sized for the plan's largest unit, and the kernel's scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.io.reader import RangeReader
from ckptc.ops.nest import AxisMap, Factor, Part, restrict_part
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.plan.model import Array, Box, Plan
from ckptc.plan.reads import Read, plan_read, tensor_loops, tensors_of
from ckptc.run.kernel import Conversion, Kernel, Loop, simplify

Bytes = npt.NDArray[np.uint8]
Sink = Callable[[int, tuple[int, ...], npt.NDArray[Any]], None]  # array, chunk's index, chunk


@dataclass(frozen=True, slots=True)
class Local:
    """A part whose elements are in memory: `Part` with steps within `data`, all its tensors one after the other."""

    part: Part
    data: npt.NDArray[Any] | None  # flat, of the source's dtype; None for constants
    dtype: str


class Worker:
    """Makes units of one plan. Not for several threads."""

    def __init__(self, plan: Plan, reader: RangeReader, sink: Sink) -> None:
        self.plan, self.reader, self.sink = plan, reader, sink
        self.kernel = Kernel()
        self._read = np.empty(0, dtype=np.uint8)
        self._chunk = np.empty(0, dtype=np.uint8)

    def make(self, number: int, box: Box) -> int:
        """Reads, makes and hands over all chunks of the unit `box` of array `number`. Returns the bytes made."""
        array = self.plan.arrays[number]
        inside = [p for part in array.parts for p in restrict_part(part, box)]
        local = self._load(array, inside)
        made = 0
        for index, within in chunks(array, box):
            chunk = self._make_chunk(array, local, within)
            self.sink(number, index, chunk)
            made += chunk.nbytes
        return made

    def _load(self, array: Array, parts: list[Part]) -> list[Local]:
        plans = [plan_read(p) if p.source is not None else None for p in parts]
        needed = sum(self._bytes(array, p, r) for p, r in zip(parts, plans, strict=True) if r is not None)
        if self._read.size < needed:
            self._read = np.empty(needed, dtype=np.uint8)
        out, used = [], 0
        for part, read in zip(parts, plans, strict=True):
            if read is None or part.source is None:
                out.append(Local(part, None, array.dtype))
                continue
            size = self._bytes(array, part, read)
            buffer = self._read[used : used + size]
            used += size
            self._fetch(array, part, read, buffer)
            dtype = array.sources[part.source].dtype
            out.append(Local(packed(part, read), buffer.view(numpy_dtype(dtype)), dtype))
        return out

    @staticmethod
    def _bytes(array: Array, part: Part, read: Read) -> int:
        """Bytes of buffer, rounded up so that the next part's elements are aligned."""
        assert part.source is not None
        size = read.size * len(tensors_of(part)) * itemsize(array.sources[part.source].dtype)
        return -(-size // 16) * 16

    def _fetch(self, array: Array, part: Part, read: Read, buffer: Bytes) -> None:
        assert part.source is not None
        source = array.sources[part.source]
        item, starts, at = itemsize(source.dtype), read.starts(), 0
        length = read.length * item
        view = memoryview(buffer)
        for position in tensors_of(part):
            tensor = self.plan.tensors[source.tensors[position]]
            for start in starts:
                self.reader.read_into(tensor.file, tensor.begin + start * item, view[at : at + length])
                at += length

    def _make_chunk(self, array: Array, local: list[Local], within: Box) -> npt.NDArray[Any]:
        shape = tuple(high - low for low, high in within)
        found = [(x, p) for x in local for p in restrict_part(x.part, within)]
        if len(found) == 1 and (direct := _direct(found[0][0], found[0][1], array, shape)) is not None:
            return direct
        size = prod(shape) * itemsize(array.dtype)
        if self._chunk.size < size:
            self._chunk = np.empty(size, dtype=np.uint8)
        flat = self._chunk[:size].view(numpy_dtype(array.dtype))
        for x, part in found:
            self._copy(x, part, array, shape, flat)
        return flat.reshape(shape)

    def _copy(self, x: Local, part: Part, array: Array, shape: tuple[int, ...], flat: npt.NDArray[Any]) -> None:
        loops, at = target_loops(part, shape)
        if x.data is None:
            value = constant(part, array.dtype)
            view = np.lib.stride_tricks.as_strided(
                flat[at:], [n for n, _, _ in loops], [t * flat.itemsize for _, _, t in loops]
            )
            view[...] = value
            return
        self.kernel.copy(x.data, part.base, flat, at, loops, Conversion(x.dtype, array.dtype, part.math))


def chunks(array: Array, box: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
    """The chunks of a unit: their place in the array's grid, and their box relative to the unit's corner."""
    ranges = (range(low, high, c) for (low, high), c in zip(box, array.chunk, strict=True))
    for corner in product(*ranges):
        within = tuple((x - low, min(x + c, high) - low) for x, c, (low, high) in zip(corner, array.chunk, box, strict=True))
        yield tuple(x // c for x, c in zip(corner, array.chunk, strict=True)), within


def packed(part: Part, read: Read) -> Part:
    """The part's steps in a buffer that holds what `read` reads of each of its tensors, one after the other.

    Loops inside a run keep their steps; loops over runs step by whole runs; loops over tensors step by all runs of one.
    """
    outer: dict[tuple[int, int], int] = {}
    step = read.length
    for count, old in reversed(read.loops):
        outer[(count, old)] = step
        step *= count
    per_tensor, steps = read.size, {}  # type: int, dict[Factor, int]
    position = per_tensor
    for f in reversed(tensor_loops(part)):
        steps[f] = position
        position *= f.size

    def moved(f: Factor) -> Factor:
        if f.tensor:
            return replace(f, step=steps[f], tensor=0)
        return replace(f, step=outer.get((f.size, f.step), f.step))

    axes = tuple(AxisMap(a.start, tuple(moved(f) for f in a.factors)) for a in part.axes)
    return replace(part, base=0, first=0, axes=axes)


def target_loops(part: Part, shape: tuple[int, ...]) -> tuple[list[Loop], int]:
    """The loops of a part over a row-major array of `shape`, and the first element's place."""
    loops, at, stride = [], 0, prod(shape)
    for axis, size in zip(part.axes, shape, strict=True):
        stride //= size
        at += axis.start * stride
        loops += [Loop(f.size, f.step, f.weight * stride) for f in axis.factors]
    return loops, at


def constant(part: Part, dtype: str) -> Any:
    """The value of a part without source, after its math."""
    value = np.float32(part.value)
    for step, operand in part.math:
        if step == "scale":
            value = np.float32(value * np.float32(operand))
        elif step == "add":
            value = np.float32(value + np.float32(operand))
        else:
            value = np.float32(np.asarray(value).astype(numpy_dtype(str(operand))))
    return np.asarray(value).astype(numpy_dtype(dtype))


def _direct(x: Local, part: Part, array: Array, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """The chunk as it lies in the read buffer, where nothing needs to move."""
    if x.data is None or not Conversion(x.dtype, array.dtype, part.math).moves:
        return None
    loops, at = target_loops(part, shape)
    if at or any(loop != (prod(shape), 1, 1) for loop in simplify(loops)):
        return None
    return x.data[part.base : part.base + prod(shape)].reshape(shape)
