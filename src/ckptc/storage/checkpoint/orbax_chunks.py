"""Boxes of plain arrays, read from their files: `preadv` into the caller's memory wherever a run of a chunk is a run
there, and through a little scratch memory elsewhere. Which arrays are plain, and where their chunks lie, is
`ckptc.storage.checkpoint.orbax_index`.

Of a chunk only what is needed is read, as long as it comes in runs that are worth a call. An index that lies leads to
`orbax-array`: no chunk of another length than its array's, no byte beyond a file's end is read.

Layout of a shard's index, at its end: for each chunk `u64 offset, u64 bytes` (all ones: none), then CRC-32C of these, all
low bytes first. zarr v3's specification, codec `sharding_indexed`, "Binary shard format".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import InputError, fail
from ckptc.storage.checkpoint.orbax_index import INLINE, PlainArray, PlainIndex
from ckptc.storage.formats.ocdbt import crc32c
from ckptc.storage.formats.zarr3 import grid, numpy_dtype
from ckptc.storage.source.files import shown
from ckptc.storage.source.ranges import RangeReader

WORTH = 1 << 18  # bytes: what lies between two runs is read along with them where the runs are shorter
SCRATCH = 1 << 20  # bytes read at once of what has to be rearranged: stays in a core's second cache
SHARDS = 64  # indexes of shards kept
_ABSENT = (1 << 64) - 1

Values = npt.NDArray[Any]
Slices = tuple[slice, ...]
Keys = tuple[str, ...]  # of an array in the tree


class PlainReader:
    """Reads plain arrays of one checkpoint. Not for several threads."""

    def __init__(self, items: Path, index: PlainIndex) -> None:
        self._index = index
        self._files = RangeReader(items, index.files, once=True)
        self._shards: OrderedDict[tuple[str, int], npt.NDArray[np.uint64]] = OrderedDict()
        self._scratch = np.empty(0, dtype=np.uint8)

    def close(self) -> None:
        self._files.close()

    def has(self, path: Keys, dtype: np.dtype[Any]) -> bool:
        """Whether an array of this path and dtype is read here."""
        found = self._index.arrays.get(".".join(path))
        return found is not None and numpy_dtype(found.layout.dtype) == dtype

    def order(self, path: Keys) -> tuple[int, ...] | None:
        """The order in which an array's chunks store their axes, slowest first; None where that is their own."""
        order = self._index.arrays[".".join(path)].layout.order
        return None if list(order) == sorted(order) else order

    def read(
        self,
        path: Keys,
        axes: Sequence[tuple[int, int, int]],
        out: Values,
        on_piece: Callable[[Slices, Slices], None] = lambda index, place: None,
    ) -> tuple[int, ...]:
        """Fills `out` with the indices start + i·stride, i below count, of each of `axes`.

        `out`: of the counts' shape and the array's dtype; with its axes in the order of `order`, runs of chunks are read
        where they belong. `on_piece` is called with each piece of a chunk
        that has been read: where it is in the array, and in `out`. Returns the shape of the array.

        Raises InputError: `orbax-array`, and what `RangeReader` raises.
        """
        name, array = "/".join(path), self._index.arrays[".".join(path)]
        shape = array.layout.shape
        if len(axes) != len(shape) or any(
            start < 0 or start + stride * (count - 1) >= n
            for (start, stride, count), n in zip(axes, shape, strict=True)
        ):
            reason = f"the plan reads more than its shape {list(shape)}"
            raise _unreadable(name, reason, "compile the plan again")
        raw = out.view(f"u{out.itemsize}") if out.itemsize <= 8 else out  # numpy copies these faster
        for index, place in pieces(axes, array.layout.chunk):
            cell = tuple(i.start // c for i, c in zip(index, array.layout.chunk, strict=True))
            inside = tuple(
                slice(i.start - k * c, i.stop - k * c, i.step)
                for i, k, c in zip(index, cell, array.layout.chunk, strict=True)
            )
            target: Any = (*place, ...)  # with `...` an array without axes stays one
            self._read_piece(name, array, cell, inside, raw[target])
            on_piece(index, place)
        return shape

    def _read_piece(self, name: str, array: PlainArray, cell: tuple[int, ...], inside: Slices, target: Values) -> None:
        """The elements `inside` of one chunk."""
        found = self._locate(name, array, cell)
        if found is None:
            target[...] = 0
            return
        order, chunk = array.layout.order, array.layout.chunk
        if not order:
            order, chunk, inside, target = (0,), (1,), (slice(0, 1, 1),), target.reshape(1)
        self._fill(*found, [chunk[a] for a in order], [inside[a] for a in order], target.transpose(order))

    def _fill(self, file: int, offset: int, shape: Sequence[int], inside: Sequence[slice], target: Values) -> None:
        """The elements `inside` of a row-major array of `shape` that begins at a byte of a file."""
        start, step, count = inside[0].start, inside[0].step, target.shape[0]
        row = prod(shape[1:]) * target.itemsize
        at = offset + start * row
        whole = all((s.start, s.stop, s.step) == (0, n, 1) for s, n in zip(inside[1:], shape[1:], strict=True))
        if whole and (step == 1 or count == 1) and target.flags.c_contiguous:
            self._fetch(file, at, target.reshape(-1).view(np.uint8))
        elif row >= WORTH and len(shape) > 1:
            for i in range(count):
                self._fill(file, at + i * step * row, shape[1:], inside[1:], target[i])
        else:
            most = max(1, SCRATCH // (row * step))
            for i in range(0, count, most):
                part = target[i : i + most]
                rows = (len(part) - 1) * step + 1
                if self._scratch.size < rows * row:
                    self._scratch = np.empty(max(SCRATCH, rows * row), dtype=np.uint8)
                data = self._scratch[: rows * row]
                self._fetch(file, at + i * step * row, data)
                read = data.view(target.dtype).reshape(rows, *shape[1:])
                np.copyto(part, read[(slice(None, None, step), *inside[1:])])

    def _fetch(self, file: int, offset: int, out: npt.NDArray[np.uint8]) -> None:
        if file == INLINE:
            out[:] = np.frombuffer(self._index.inline, dtype=np.uint8)[offset : offset + out.size]
        else:
            self._files.read_into(file, offset, out.data)

    def _locate(self, name: str, array: PlainArray, cell: tuple[int, ...]) -> tuple[int, int] | None:
        """The file and the byte where a chunk begins, all of it within the file; None for a chunk that is not stored.

        Raises `orbax-array` where the index says what cannot be.
        """
        layout = array.layout
        per = [s // c for s, c in zip(layout.stored, layout.chunk, strict=True)]
        number = _number([i // n for i, n in zip(cell, per, strict=True)], grid(layout.shape, layout.stored))
        at = int(np.searchsorted(array.cells, number))
        if at == len(array.cells) or array.cells[at] != number:
            return None
        file, offset, length = int(array.files[at]), int(array.offsets[at]), int(array.lengths[at])
        size = len(self._index.inline) if file == INLINE else self._index.files[file].size
        if size < 0:  # whose absence reading it tells
            return file, offset
        if offset + length > size:
            where = f"{shown(self._index.files[file].name)}, which has {size} bytes"
            raise _unreadable(name, f"chunk {list(cell)} ends at byte {offset + length} of {where}")
        wanted = prod(layout.chunk) * numpy_dtype(layout.dtype).itemsize
        if layout.shard is not None:
            inside = _number([i % n for i, n in zip(cell, per, strict=True)], per)
            begin, own = self._shard(name, number, file, offset, length, prod(per))[inside].tolist()
            if (begin, own) == (_ABSENT, _ABSENT):
                return None
            if begin + own > length:
                raise _unreadable(name, f"chunk {list(cell)} ends at byte {begin + own} of a shard of {length} bytes")
            offset, length = offset + begin, own
        if length != wanted:
            raise _unreadable(name, f"chunk {list(cell)} has {length} bytes, not {wanted}")
        return file, offset

    def _shard(
        self, name: str, number: int, file: int, offset: int, length: int, chunks: int
    ) -> npt.NDArray[np.uint64]:
        """The index of a shard: offset and length of each of its chunks, uint64[chunks, 2]."""
        key = name, number
        if key not in self._shards:
            size = 16 * chunks + 4
            if length < size:
                raise _unreadable(name, f"a shard of {length} bytes has no index of {chunks} chunks")
            text = np.empty(size, dtype=np.uint8)
            self._fetch(file, offset + length - size, text)
            if crc32c(text[:-4].tobytes()) != int.from_bytes(text[-4:].tobytes(), "little"):
                raise _unreadable(name, "the index of a shard does not have its checksum")
            self._shards[key] = text[:-4].view("<u8").reshape(-1, 2)
            if len(self._shards) > SHARDS:
                self._shards.popitem(last=False)
        return self._shards[key]


def pieces(axes: Sequence[tuple[int, int, int]], chunk: Sequence[int]) -> Iterator[tuple[Slices, Slices]]:
    """A box cut where chunks begin: where each piece is in the array, and where it goes."""
    cuts = []
    for (start, stride, count), c in zip(axes, chunk, strict=True):
        own, done = [], 0
        while done < count:
            at = start + done * stride
            end = (at // c + 1) * c
            more = min(count - done, -(-(end - at) // stride))
            own.append((slice(at, at + (more - 1) * stride + 1, stride), slice(done, done + more)))
            done += more
        cuts.append(own)
    for combination in product(*cuts):
        yield tuple(i for i, _ in combination), tuple(p for _, p in combination)


def decoded(index: Slices, chunk: Sequence[int], shape: Sequence[int]) -> int:
    """Elements of the chunk, as far as the array goes, that a piece lies in."""
    return prod(min(c, n - i.start // c * c) for i, c, n in zip(index, chunk, shape, strict=True))


def _number(index: Sequence[int], shape: Sequence[int]) -> int:
    """The row-major number of an index in a grid."""
    number = 0
    for i, n in zip(index, shape, strict=True):
        number = number * n + i
    return number


def _unreadable(name: str, reason: str, help: str = "is the checkpoint whole?") -> InputError:
    return fail("orbax-array", f"the array {shown(name)} cannot be read: {reason}", help=help)
