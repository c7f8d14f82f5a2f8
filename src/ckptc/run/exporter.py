"""Making what an export's plan says: chunks of stored arrays are read once for all the tensors of a batch, and each
tensor's box is written in place.

A batch is several tensors that lie in the same chunks. For each of its units, what all of them need of each stored
array is read as one box; from it each tensor's own box is copied, with arithmetic, piece by piece, and written where
the plan says it belongs in the output: one piece is made while the other is written. Buffers are as large as the plan's
largest unit needs and are reused; besides there are the chunks being decoded, and the kernel's scratch.

After the tensors, what no tensor has a place for is looked at: padding that training has changed is counted, and where
arrays hold a tensor twice, the second is compared with the one that was taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ckptc.ops.nest import Part, restrict_part
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.plan.files import places
from ckptc.plan.model import Box, Kind, Output, Padding, Plan, Safetensors, Stored, boxes
from ckptc.plan.needs import begins_of
from ckptc.plan.order import Unit, kind_of
from ckptc.plan.regions import Region, indices, made_bytes, needs, padding_region, place_in, within
from ckptc.run.kernel import Conversion, Kernel, Loop
from ckptc.run.worker import target_loops
from ckptc.storage.checkpoint.orbax_reader import ArrayReader
from ckptc.storage.checkpoint.safetensors_writer import CheckpointWriter
from ckptc.storage.sink.file import grown

IN_FLIGHT = 8 << 20  # bytes of chunks being decoded at most, unless one is larger: more at once reads no faster
SLAB = 64 << 20  # bytes of padding looked at at once

Values = npt.NDArray[Any]


class Exporter:
    """Makes the tensors of one plan, each unit by itself. Not for several threads."""

    def __init__(self, plan: Plan, reader: ArrayReader, writer: CheckpointWriter) -> None:
        assert isinstance(plan.layout, Safetensors)
        self.plan, self.reader, self.writer = plan, reader, writer
        self.kernel = Kernel()
        self._held = np.empty(0, dtype=np.uint8)  # boxes of stored arrays
        self._made = [np.empty(0, dtype=np.uint8)] * 2  # pieces of tensors: one is made while the other is written
        self._turn = 0  # which of them the next piece is made in
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._places = places(plan, plan.layout)

    @property
    def held_bytes(self) -> int:
        """Bytes of buffers."""
        return self._held.nbytes + sum(made.nbytes for made in self._made)

    def make(self, unit: Unit) -> int:
        """Writes a unit; returns how many bytes that were. The last of them may be written, or fail to be, only when the
        next unit is made, or the exporter is left.
        """
        batch, box = unit
        tensors, kind = [self.plan.outputs[n] for n in batch], kind_of(self.plan, unit)
        written = 0
        for number, piece, values in self._boxes(tensors, kind, box):
            file, begin = self._places[batch[number]]
            self._settle()
            self._pending = self._thread.submit(self.writer.write_box, file, begin, kind.shape, piece, values)
            written += values.nbytes
        return written

    def _settle(self) -> None:
        """Waits for what is being written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> Exporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._settle()
        finally:
            self._thread.shutdown()

    def _boxes(self, tensors: Sequence[Output], kind: Kind, box: Box) -> Iterator[tuple[int, Box, Values]]:
        """The same box of each of some tensors of a kind, in pieces: the tensor's position, the piece, its values. What
        all of them need of the stored arrays is read at once. Values last until the next but one are made.
        """
        begins = begins_of(tensors, len(kind.sources))
        regions = dict(needs(kind, begins, box))
        item = itemsize(kind.dtype)
        sizes = {s: r.size * itemsize(kind.sources[s].dtype) for s, r in regions.items()}
        self._held = grown(self._held, sum(sizes.values()))
        held: dict[int, Values] = {}
        used = 0
        for s, r in regions.items():
            source = kind.sources[s]
            held[s] = self._held[used : used + sizes[s]].view(numpy_dtype(source.dtype))
            used += sizes[s]
            room = self._held.nbytes + made_bytes([high - low for low, high in box], item)
            self._read(tensors[0].tensors[s], source, r, held[s].reshape(r.shape), room)
        for piece in boxes(box, kind.chunk):
            shape = tuple(high - low for low, high in piece)
            copies = [
                _Copy.of(inside, kind, regions[part.source or 0], shape)
                for part in kind.parts
                for inside in restrict_part(part, piece)
            ]
            for number, start_at in enumerate(begins.tolist()):
                turn, self._turn = self._turn, 1 - self._turn
                self._made[turn] = made = grown(self._made[turn], prod(shape) * item)
                flat = made[: prod(shape) * item].view(numpy_dtype(kind.dtype))
                for copy in copies:
                    s = copy.source
                    start = place_in(copy.base + start_at[s], kind.sources[s].shape, regions[s])
                    self.kernel.copy(held[s], start, flat, copy.at, copy.loops, copy.conversion)
                yield number, piece, flat.reshape(shape)

    def _read(self, tensor: int, stored: Stored, region: Region, out: Values, used: int) -> None:
        path = tuple(self.plan.tensors[tensor].name.split("/"))
        room = max(0, min(self.plan.choices.memory - used, IN_FLIGHT))
        self.reader.read(path, region.axes, stored.chunk or stored.shape, out, room)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {t.name: n for n, t in enumerate(self.plan.outputs)}

    def twin_differs(self, number: int) -> bool:
        """Whether a stored array says other things of a tensor than the one that was taken."""
        twin = self.plan.twins[number]
        kind = self.plan.kinds[twin.kind]
        file, begin = self._places[self._numbers[twin.name]]
        for box in kind.units():
            for _, piece, values in self._boxes([twin], kind, box):
                taken = np.empty_like(values)
                self.writer.read_box(file, begin, kind.shape, piece, taken)
                covered = _covered(kind, piece)
                if not np.array_equal(values[covered], taken[covered], equal_nan=True):
                    return True
        return False

    def trained_rows(self, number: int) -> int:
        """How many rows of a padding have other values than padding has."""
        padding = self.plan.padding[number]
        most = min(self.plan.choices.memory // 4, SLAB)
        return sum(self._trained_rows(padding, *slab) for slab in _slabs(padding, most))

    def _trained_rows(self, padding: Padding, low: int, high: int) -> int:
        """How many of the rows from `low` up to `high` are not what padding is."""
        axes = list(padding_region(padding).axes)
        at = [indices(a) - a.start for a in padding.axes]
        if axes:
            axes[padding.axis] = (low, 1, high - low)
            own = indices(padding.axes[padding.axis])
            at[padding.axis] = own[(own >= low) & (own < high)] - low
        region = Region(tuple(axes))
        size = region.size * itemsize(padding.array.dtype)
        self._held = grown(self._held, size)
        values = self._held[:size].view(numpy_dtype(padding.array.dtype)).reshape(region.shape)
        self._read(padding.tensor, padding.array, region, values, self._held.nbytes)
        if any(len(own) < n for own, n in zip(at, region.shape, strict=True)):
            values = values[np.ix_(*at)]  # padding between other rows
        wrong = values != np.asarray(padding.value).astype(values.dtype)
        others = tuple(a for a in range(wrong.ndim) if a != padding.axis)
        return int(np.count_nonzero(wrong.any(axis=others))) if wrong.ndim else int(wrong)


@dataclass(frozen=True, slots=True)
class _Copy:
    """What is copied, of one part of a kind, into a box: the same for all tensors but for where it begins."""

    source: int
    base: int  # counted from where the tensor begins in the stored array
    loops: list[Loop]
    at: int  # first element in the box
    conversion: Conversion

    @staticmethod
    def of(part: Part, kind: Kind, region: Region, shape: tuple[int, ...]) -> _Copy:
        source = part.source or 0
        stored = kind.sources[source]
        loops, at = target_loops(within(replace(part, base=0), stored.shape, region), shape)
        return _Copy(source, part.base, loops, at, Conversion(stored.dtype, kind.dtype, part.math))


def _slabs(padding: Padding, most: int) -> Iterator[tuple[int, int]]:
    """Rows of the array that hold all of the padding's, in slabs of at most `most` bytes or a row."""
    if not padding.axes:
        yield 0, 1
        return
    region = padding_region(padding)
    low, _, count = region.axes[padding.axis]
    row = region.size // count * itemsize(padding.array.dtype)
    step = max(1, most // row)
    for at in range(low, low + count, step):
        yield at, min(at + step, low + count)


def _covered(kind: Kind, box: Box) -> npt.NDArray[np.bool_]:
    """Which elements of a box the kind's parts speak of."""
    shape = tuple(high - low for low, high in box)
    out = np.zeros(prod(shape), dtype=np.bool_)
    for part in kind.parts:
        for inside in restrict_part(part, box):
            loops, at = target_loops(replace(inside, base=0), shape)
            places = np.array([at])
            for loop in loops:
                places = (places[:, None] + np.arange(loop.size) * loop.target).ravel()
            out[places] = True
    return out.reshape(shape)
