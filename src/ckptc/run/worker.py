"""Units of work: read the byte ranges that one needs, decode what is stored as codes, make its chunks, hand each over.

While one unit is made, the next is read. A worker's memory is its buffers, two for what is read and two for what is made,
which grow to what the plan's largest unit needs and are reused, and the scratch of the kernel and the decoder. What
`plan.reads.need` says a part needs is what is read and what is held.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ckptc.diagnostics import fail
from ckptc.ops.codes import code_of
from ckptc.ops.nest import AxisMap, Factor, Part, restrict_part
from ckptc.ops.types import OpError, itemsize, numpy_dtype
from ckptc.plan.model import Array, Box, Operand, Plan
from ckptc.plan.reads import Need, Read, Rows, Runs, aligned, need, tensor_loops
from ckptc.plan.stored import axis_order
from ckptc.run.decode import BesideRows, Coded, Decoder, packed_rows
from ckptc.run.kernel import Conversion, Kernel, Loop, raw, simplify
from ckptc.storage.sink.file import grown
from ckptc.storage.source.ranges import RangeReader

Bytes = npt.NDArray[np.uint8]
Order = tuple[int, ...] | None  # of axes, slowest first; None: their own
Sink = Callable[[int, tuple[int, ...], npt.NDArray[Any]], None]  # array, chunk's index, chunk


@dataclass(frozen=True, slots=True)
class Local:
    """A part whose elements are in memory: `Part` with steps within `data`, all its tensors one after the other."""

    part: Part
    data: npt.NDArray[Any] | None  # flat, of the source's dtype or decoded; None for constants
    dtype: str


class Worker:
    """Makes units of one plan. Not for several threads.

    `sink` may go on reading a chunk until it is called again, or until `settle` returns.
    """

    def __init__(self, plan: Plan, reader: RangeReader, sink: Sink, settle: Callable[[], None]) -> None:
        self.plan, self.reader, self.sink, self.settle = plan, reader, sink, settle
        self.kernel, self.decoder = Kernel(), Decoder()
        # The axes of pieces of large chunks are made in the order in which they are stored: linked chunks are turned later.
        self._orders = [axis_order(a.chunk, a.stored) if a.stored else None for a in plan.arrays]
        self._held = [np.empty(0, dtype=np.uint8)] * 2  # what a unit's parts need: read and decoded, by turns
        self._lent = False  # whether the sink may still read a chunk there
        self._chunks = [np.empty(0, dtype=np.uint8)] * 2  # one is made while the other is written
        self._turn = 0

    def make(self, units: Iterable[tuple[int, int, Box]]) -> Generator[tuple[int, int]]:
        """Reads, makes and hands over all chunks of each unit: a number of the caller's, its array's and its box. Yields
        the first with the bytes made. A unit is asked for, and read, while the one before it is made.
        """
        with ThreadPoolExecutor(1) as thread:
            current: tuple[int, int, Box, Future[list[Local]]] | None = None
            for turn, (key, number, box) in enumerate(units):
                if self._lent:  # of the unit before the current one, whose buffer is the next one's
                    self.settle()
                    self._lent = False
                following = key, number, box, thread.submit(self._load, number, box, turn % 2)
                if current is not None:
                    yield self._make(*current)
                current = following
            if current is not None:
                yield self._make(*current)

    def _make(self, key: int, number: int, box: Box, loaded: Future[list[Local]]) -> tuple[int, int]:
        array, local, made = self.plan.arrays[number], loaded.result(), 0
        for index, within in chunks(array, box):
            chunk = self._make_chunk(number, local, within)
            self.sink(number, index, chunk)
            made += chunk.nbytes
        return key, made

    def _load(self, number: int, box: Box, turn: int) -> list[Local]:
        array = self.plan.arrays[number]
        parts = [p for part in array.parts for p in restrict_part(part, box)]
        needs = [need(p, array.sources[p.source].stored) if p.source is not None else None for p in parts]
        held = self._held[turn] = grown(self._held[turn], sum(n.memory for n in needs if n is not None))
        out, used = [], 0
        for part, needed in zip(parts, needs, strict=True):
            if needed is None or part.source is None:
                out.append(Local(part, None, array.dtype))
                continue
            buffer = held[used : used + needed.memory]
            used += needed.memory
            source = array.sources[part.source]
            dtype = source.stored.dtype
            self._fetch(source.tensors, needed.tensors, needed.values.runs(), itemsize(dtype), buffer)
            if needed.rows is None:
                out.append(Local(packed(part, needed.values), buffer.view(numpy_dtype(dtype)), dtype))
            else:
                rows = self._decode(source, needed, needed.rows, buffer)
                out.append(Local(packed_rows(part, needed.rows), rows, "float32"))
        return out

    def _fetch(self, tensors: tuple[int, ...], wanted: list[int], runs: Runs, item: int, buffer: Bytes) -> None:
        """Reads runs of elements of `item` bytes of each wanted tensor, one after the other."""
        view, at = buffer.data, 0
        for position in wanted:
            tensor = self.plan.tensors[tensors[position]]
            for first, length in runs:
                # A tensor may be shorter than the most that such tensors have: zeros follow it.
                size = min(length * item, tensor.end - tensor.begin - first * item)
                self.reader.read_into(tensor.file, tensor.begin + first * item, view[at : at + size])
                buffer[at + size : at + length * item] = 0
                at += length * item

    def _decode(self, source: Operand, needed: Need, rows: Rows, buffer: Bytes) -> npt.NDArray[Any]:
        """The decoded rows, flat float32, from codes at the start of `buffer`; the rest takes what is beside them."""
        decode = source.stored.decode
        assert decode is not None
        codes, rest, layout = buffer[: needed.value_bytes], buffer[aligned(needed.value_bytes) :], rows.layout
        beside = []
        columns = zip(decode.beside, source.beside, needed.beside, layout.beside, strict=True)
        for stored, tensors, wanted, of in columns:
            self._fetch(tensors, needed.tensors, wanted.runs, itemsize(stored.dtype), rest)
            data = rest[: wanted.bytes].view(numpy_dtype(stored.dtype))
            each = prod(stored.shape) // layout.count(of)
            beside.append(BesideRows(data, wanted.places, each, layout.count(of) == 1))
            rest = rest[aligned(wanted.bytes) :]
        decoded = rest[: needed.decoded_bytes].view(np.float32)
        how = Coded(code_of(decode.code, decode.settings), decode.shape, source.stored.dtype)
        try:
            self.decoder.decode(how, rows, codes, beside, decoded)
        except (OpError, IndexError) as error:
            names = [self.plan.tensors[source.tensors[i]].name for i in needed.tensors]
            raise fail(
                "bad-codes",
                f"`{names[0]}` cannot be decoded: {error}",
                notes=(f"or one of {len(names) - 1} others that are read with it",) if len(names) > 1 else (),
                help="is the file whole? download it again",
            ) from None
        return decoded

    def _make_chunk(self, number: int, local: list[Local], within: Box) -> npt.NDArray[Any]:
        array = self.plan.arrays[number]
        shape = tuple(high - low for low, high in within)
        found = [(x, p) for x in local for p in restrict_part(x.part, within)]
        if len(found) == 1 and (direct := self._direct(found[0][0], found[0][1], number, shape)) is not None:
            self._lent = True
            return direct
        self._lent = False
        size, order = prod(shape) * itemsize(array.dtype), self._orders[number]
        turn = self._turn = 1 - self._turn
        self._chunks[turn] = grown(self._chunks[turn], size)
        flat = self._chunks[turn][:size].view(numpy_dtype(array.dtype))
        for x, part in found:
            self._copy(x, part, array, shape, order, flat)
        return in_order(flat, shape, order)

    def _copy(
        self, x: Local, part: Part, array: Array, shape: tuple[int, ...], order: Order, flat: npt.NDArray[Any]
    ) -> None:
        loops, at = target_loops(part, shape, order)
        if x.data is None:
            value = constant(part, array.dtype)
            # As plain unsigned integers: numpy makes no strided views of some of ml_dtypes' types.
            bits = flat[at:].view(raw(flat.itemsize))
            steps = [t * flat.itemsize for _, _, t in loops]
            np.lib.stride_tricks.as_strided(bits, [n for n, _, _ in loops], steps)[...] = value.view(bits.dtype)
            return
        self.kernel.copy(x.data, part.base, flat, at, loops, Conversion(x.dtype, array.dtype, part.math))

    def _direct(self, x: Local, part: Part, number: int, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
        """The chunk as it lies in the read buffer, where nothing needs to move."""
        if x.data is None or not Conversion(x.dtype, self.plan.arrays[number].dtype, part.math).moves:
            return None
        loops, at = target_loops(part, shape, self._orders[number])
        if at or any(loop != (prod(shape), 1, 1) for loop in simplify(loops)):
            return None
        return in_order(x.data[part.base : part.base + prod(shape)], shape, self._orders[number])


def chunks(array: Array, box: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
    """The chunks of a unit: their place in the array's grid, and their box relative to the unit's corner."""
    ranges = (range(low, high, c) for (low, high), c in zip(box, array.chunk, strict=True))
    for corner in product(*ranges):
        within = tuple(
            (x - low, min(x + c, high) - low) for x, c, (low, high) in zip(corner, array.chunk, box, strict=True)
        )
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


def target_loops(part: Part, shape: tuple[int, ...], order: Order = None) -> tuple[list[Loop], int]:
    """The loops of a part over an array of `shape` whose axes lie in this order, slowest first, or in their own; and the
    first element's place."""
    loops, at, stride = [], 0, prod(shape)
    for number in order or range(len(shape)):
        axis = part.axes[number]
        stride //= shape[number]
        at += axis.start * stride
        loops += [Loop(f.size, f.step, f.weight * stride) for f in axis.factors]
    return loops, at


def in_order(flat: npt.NDArray[Any], shape: tuple[int, ...], order: Order) -> npt.NDArray[Any]:
    """The array of `shape` whose axes lie in this order, slowest first, or in their own: a view."""
    if order is None:
        return flat.reshape(shape)
    return flat.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def constant(part: Part, dtype: str) -> npt.NDArray[Any]:
    """The value of a part without source, after its math: an array of no axes."""
    value = np.float32(part.value)
    for step, operand in part.math:
        if step == "scale":
            value = np.float32(value * np.float32(operand))
        elif step == "unscale":
            value = np.float32(value / np.float32(operand))
        elif step == "add":
            value = np.float32(value + np.float32(operand))
        else:
            value = np.float32(np.asarray(value).astype(numpy_dtype(str(operand))))
    return np.asarray(value).astype(numpy_dtype(dtype))
