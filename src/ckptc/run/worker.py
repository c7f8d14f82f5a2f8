"""Units of work: read what one needs, decode what is stored as codes, make its pieces, hand each over.

What a unit needs of a tensor is ranges of a file, or a box of an array of chunks, which the outputs of a batch share. A
piece is a storage chunk of an Orbax checkpoint, or a part of one, or a few rows of a tensor of a safetensors file
(`Kind.chunk`).

While one unit is made, the next is read, where all sources are files of which any range can be read; chunks are decoded
by threads of TensorStore's own. A worker's memory is its buffers, for what is read and two for what is made, which grow
to what the plan's largest unit needs and are reused, and the scratch of the kernel and the decoder. What `plan.reads` and
`plan.regions` say a part needs is what is read and what is held.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ckptc.diagnostics import fail
from ckptc.ops.codes import code_of
from ckptc.ops.nest import AxisMap, Factor, Part, restrict_part
from ckptc.ops.types import OpError, itemsize, numpy_dtype
from ckptc.plan.model import Array, Box, Kind, Operand, Plan, Stored, boxes
from ckptc.plan.order import Unit
from ckptc.plan.reads import Need, Read, Rows, Runs, aligned, need, tensor_loops
from ckptc.plan.regions import Region, needs, place_in, within
from ckptc.plan.stored import axis_order
from ckptc.run.decode import BesideRows, Coded, Decoder, packed_rows
from ckptc.run.kernel import Conversion, Kernel, Loop, raw, simplify
from ckptc.run.readers import Readers
from ckptc.storage.sink.file import grown

IN_FLIGHT = 8 << 20  # bytes of chunks being decoded at most, unless one is larger: more at once reads no faster

Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[Any]
Order = tuple[int, ...] | None
Put = Callable[[int, Box, Values], None]  # the output's position, the piece's box in it, its elements


@dataclass(frozen=True, slots=True)
class Local:
    """A part whose elements are in memory: `Part` with steps within `data`, all its tensors one after the other."""

    part: Part
    data: Values | None  # flat, of the source's dtype or decoded; None for constants
    dtype: str


Loaded = list[list[Local]]  # of each output of a unit, what it is made of


class Worker:
    """Makes units of one plan. Not for several threads.

    `put` may go on reading a piece until it is called again, or until `settle` returns.
    """

    def __init__(self, plan: Plan, readers: Readers, put: Put, settle: Callable[[], None]) -> None:
        self.plan, self.readers, self.put, self.settle = plan, readers, put, settle
        self.kernel, self.decoder = Kernel(), Decoder()
        self._ahead = all(s.format == "safetensors" for s in plan.sources)
        # The axes of pieces of large chunks are made in the order in which they are stored: linked chunks are turned later.
        self._orders = [axis_order(k.chunk, k.stored) if k.stored else None for k in plan.kinds]
        self._held = [np.empty(0, dtype=np.uint8)] * 2  # what units' parts need: read and decoded, by turns
        self._lent = False  # whether a piece that was put may still be read there
        self._pieces = [np.empty(0, dtype=np.uint8)] * 2  # one is made while the other is written
        self._turn = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of buffers."""
        return sum(buffer.size for buffer in (*self._held, *self._pieces))

    def make(self, units: Iterable[tuple[int, Unit]]) -> Generator[tuple[int, int]]:
        """Reads, makes and hands over all pieces of each unit, which comes with a number of the caller's. Yields that with
        the bytes made. A unit is asked for, and read, while the one before it is made, if it can be read ahead.
        """
        with self._loader() as load:
            current: tuple[int, Unit, Callable[[], Loaded]] | None = None
            for turn, (key, unit) in enumerate(units):
                if self._lent:  # of the unit before the current one, whose buffer is the next one's
                    self.settle()
                    self._lent = False
                following = key, unit, load(unit, turn % 2)
                if current is not None:
                    yield self._make(*current)
                current = following
                if not self._ahead:
                    yield self._make(*current)
                    current = None
            if current is not None:
                yield self._make(*current)

    @contextmanager
    def _loader(self) -> Iterator[Callable[[Unit, int], Callable[[], Loaded]]]:
        """What begins to load a unit into one of the buffers; its result waits for that."""
        if not self._ahead:
            yield lambda unit, turn: lambda: self._load(unit, 0)
            return
        with ThreadPoolExecutor(1) as thread:
            yield lambda unit, turn: thread.submit(self._load, unit, turn).result

    def _make(self, key: int, unit: Unit, loaded: Callable[[], Loaded]) -> tuple[int, int]:
        made = 0
        for number, box, piece in self._pieces_of(unit.outputs, unit.box, loaded()):
            self.put(number, box, piece)
            made += piece.nbytes
        return key, made

    def pieces(self, array: Array, box: Box) -> Iterator[tuple[Box, Values]]:
        """The pieces of a box of one output, which need be none of the plan's: each lasts until the next but one is made."""
        kind = self.plan.kinds.index(array.kind)
        local = self._load_arrays([array], box, 0)[0]
        for piece in boxes(box, array.kind.chunk):
            inside = tuple((a - low, b - low) for (a, b), (low, _) in zip(piece, box, strict=True))
            yield piece, self._make_piece(kind, local, inside)

    def fill(self, number: int, box: Box, targets: Sequence[tuple[Box, Box, Values]]) -> None:
        """Makes boxes of one output, each within `box`, which is read once, where they stand in arrays of the caller's:
        (the box to make, the box that its array holds, the array, row-major)."""
        array = self.plan.arrays[number]
        kind, local = self.plan.kinds[self.plan.outputs[number].kind], self._load_arrays([array], box, 0)[0]
        for made, whole, values in targets:
            inside = tuple((a - low, b - low) for (a, b), (low, _) in zip(made, box, strict=True))
            corner = tuple(a - low for (a, _), (low, _) in zip(made, whole, strict=True))
            flat = values.reshape(-1)
            for x in local:
                for part in restrict_part(x.part, inside):
                    self._copy(x, part, kind, target_loops(part, values.shape, corner=corner), flat)

    def _pieces_of(self, outputs: Sequence[int], box: Box, loaded: Loaded) -> Iterator[tuple[int, Box, Values]]:
        kind = self.plan.outputs[outputs[0]].kind
        for piece in boxes(box, self.plan.kinds[kind].chunk):
            inside = tuple((a - low, b - low) for (a, b), (low, _) in zip(piece, box, strict=True))
            for number, local in zip(outputs, loaded, strict=True):
                yield number, piece, self._make_piece(kind, local, inside)

    def _load(self, unit: Unit, turn: int) -> Loaded:
        return self._load_arrays([self.plan.arrays[n] for n in unit.outputs], unit.box, turn)

    def _load_arrays(self, arrays: Sequence[Array], box: Box, turn: int) -> Loaded:
        """What the same box of each of some outputs of a kind is made of."""
        kind = arrays[0].kind
        parts = [p for part in kind.parts for p in restrict_part(part, box)]
        begins = np.array([[s.begin for s in a.sources] for a in arrays], dtype=np.int64).reshape(len(arrays), -1)
        regions = dict(needs(kind, begins, box))
        sizes = {s: aligned(r.size * itemsize(kind.sources[s].dtype)) for s, r in regions.items()}
        ranges = [[self._need(a, p) for p in parts] for a in arrays]
        total = sum(sizes.values()) + sum(n.memory for own in ranges for n in own if n is not None)
        held = self._held[turn] = grown(self._held[turn], total)
        used = 0
        read: dict[int, Values] = {}
        orders: dict[int, Order] = {}  # of the axes of what is read
        for s, r in regions.items():
            operand = arrays[0].sources[s]
            orders[s] = self.readers.order(self.plan.tensors[operand.tensors[0]], operand.stored)
            read[s] = self._read_region(operand, r, orders[s], held[used : used + sizes[s]])
            used += sizes[s]
        out: Loaded = []
        for array, wanted in zip(arrays, ranges, strict=True):
            local = []
            for part, needed in zip(parts, wanted, strict=True):
                if part.source is None:
                    local.append(Local(part, None, kind.dtype))
                elif needed is None:
                    operand, region = array.sources[part.source], regions[part.source]
                    placed = _placed(part, operand, region, orders[part.source])
                    local.append(Local(placed, read[part.source], operand.stored.dtype))
                else:
                    buffer = held[used : used + needed.memory]
                    used += needed.memory
                    local.append(self._read_ranges(array.sources[part.source], part, needed, buffer))
            out.append(local)
        return out

    def _need(self, array: Array, part: Part) -> Need | None:
        """What a part of an output needs of a source of which any range can be read."""
        if part.source is None or array.kind.sources[part.source].chunk is not None:
            return None
        operand = array.sources[part.source]
        return need(replace(part, base=part.base + operand.begin) if operand.begin else part, operand.stored)

    def _read_region(self, operand: Operand, region: Region, order: Order, buffer: Bytes) -> Values:
        """A region, flat, its axes in this order."""
        dtype = operand.stored.dtype
        flat = buffer[: region.size * itemsize(dtype)].view(numpy_dtype(dtype))
        self._read_box(operand.tensors[0], operand.stored, region, in_order(flat, region.shape, order))
        return flat

    def _read_box(self, tensor: int, stored: Stored, region: Region, out: Values) -> None:
        room = max(0, min(self.plan.choices.memory - self.held_bytes, IN_FLIGHT))
        self.readers.read_box(self.plan.tensors[tensor], region.axes, stored.chunk or stored.shape, out, room)

    def stored_box(self, tensor: int, stored: Stored, region: Region) -> Values:
        """A box of a stored array as it is. It lasts until more is read."""
        size = region.size * itemsize(stored.dtype)
        self._held[0] = grown(self._held[0], size)
        values = self._held[0][:size].view(numpy_dtype(stored.dtype)).reshape(region.shape)
        self._read_box(tensor, stored, region, values)
        return values

    def _read_ranges(self, operand: Operand, part: Part, needed: Need, buffer: Bytes) -> Local:
        dtype = operand.stored.dtype
        self._fetch(operand.tensors, needed.tensors, needed.values.runs(), itemsize(dtype), buffer)
        if needed.rows is None:
            return Local(packed(part, needed.values), buffer.view(numpy_dtype(dtype)), dtype)
        return Local(packed_rows(part, needed.rows), self._decode(operand, needed, needed.rows, buffer), "float32")

    def _fetch(self, tensors: tuple[int, ...], wanted: list[int], runs: Runs, item: int, buffer: Bytes) -> None:
        """Reads runs of elements of `item` bytes of each wanted tensor, one after the other."""
        view, at = buffer.data, 0
        for position in wanted:
            tensor = self.plan.tensors[tensors[position]]
            for first, length in runs:
                # A tensor may be shorter than the most that such tensors have: zeros follow it.
                size = min(length * item, tensor.end - tensor.begin - first * item)
                self.readers.read_range(tensor, first * item, view[at : at + size])
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

    def _make_piece(self, number: int, local: list[Local], inside: Box) -> Values:
        kind, order = self.plan.kinds[number], self._orders[number]
        shape = tuple(high - low for low, high in inside)
        found = [(x, p) for x in local for p in restrict_part(x.part, inside)]
        if len(found) == 1 and (direct := _direct(*found[0], kind, shape, order)) is not None:
            self._lent = True
            return direct
        size = prod(shape) * itemsize(kind.dtype)
        turn = self._turn = 1 - self._turn
        self._pieces[turn] = grown(self._pieces[turn], size)
        flat = self._pieces[turn][:size].view(numpy_dtype(kind.dtype))
        for x, part in found:
            self._copy(x, part, kind, target_loops(part, shape, order), flat)
        return in_order(flat, shape, order)

    def _copy(self, x: Local, part: Part, kind: Kind, target: tuple[list[Loop], int], flat: Values) -> None:
        loops, at = target
        if x.data is None:
            value = constant(part, kind.dtype)
            # As plain unsigned integers: numpy makes no strided views of some of ml_dtypes' types.
            bits = flat[at:].view(raw(flat.itemsize))
            steps = [t * flat.itemsize for _, _, t in loops]
            np.lib.stride_tricks.as_strided(bits, [n for n, _, _ in loops], steps)[...] = value.view(bits.dtype)
            return
        self.kernel.copy(x.data, part.base, flat, at, loops, Conversion(x.dtype, kind.dtype, part.math))


def _direct(x: Local, part: Part, kind: Kind, shape: tuple[int, ...], order: Order) -> Values | None:
    """The piece as it lies in the read buffer, where nothing needs to move."""
    if x.data is None or not Conversion(x.dtype, kind.dtype, part.math).moves:
        return None
    loops, at = target_loops(part, shape, order)
    if at or any(loop != (prod(shape), 1, 1) for loop in simplify(loops)):
        return None
    return in_order(x.data[part.base : part.base + prod(shape)], shape, order)


def _placed(part: Part, operand: Operand, region: Region, order: Order) -> Part:
    """The part's steps in an array, its axes in this order, that holds a region of what it reads, and nothing else."""
    shape = operand.stored.shape
    moved = within(replace(part, base=0), shape, region, order)
    return replace(moved, base=place_in(part.base + operand.begin, shape, region, order))


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


def target_loops(
    part: Part, shape: tuple[int, ...], order: Order = None, corner: Sequence[int] | None = None
) -> tuple[list[Loop], int]:
    """The loops of a part over an array of `shape` whose axes lie in this order, slowest first, or in their own; and the
    first element's place. `corner`: where in that array the part's own box begins."""
    loops, at, stride = [], 0, prod(shape)
    for number in order or range(len(shape)):
        axis = part.axes[number]
        stride //= shape[number]
        at += (axis.start + (corner[number] if corner else 0)) * stride
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
