"""Is a checkpoint what its plan says? Read back, bit by bit.

Two ways, both within a budget of memory, by several threads:

- `compare`: against the source. What each array must be is made by the reference interpreter (`ckptc.run.reference`), and the
  stored one is found and read by the checkpoint's own metadata (`ckptc.storage.checkpoint`). Nothing of the executor takes part.
- `check_sums`: against the checksums that the run noted in the checkpoint's metadata. No source, no plan. Arrays that
  lie in linked files have none, since the run did not read them: the files' sizes and times of change are compared.

Both take an array a block at a time: a box of whole chunks, or of whole pieces of large ones, of which each thread holds
one, with the copies that it is made through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ir.graph import Graph
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.run.reference import blocks, make, tensors_of
from ckptc.storage.checkpoint.links import changed
from ckptc.storage.checkpoint.orbax_index import PlainIndex
from ckptc.storage.checkpoint.orbax_reader import list_plain, open_reader
from ckptc.storage.checkpoint.restored import RestoredArray, custom_metadata_of, open_restored
from ckptc.storage.checkpoint.steps import find_step
from ckptc.storage.checkpoint.sums import differs, noted
from ckptc.storage.formats import checksum
from ckptc.storage.formats.zarr3 import grid
from ckptc.storage.source.base import Source, as_source

Array = npt.NDArray[Any]
Box = tuple[tuple[int, int], ...]
OnProgress = Callable[[int, int, str], None]  # bytes verified, of how many, the array

MEMORY = 512 << 20  # bytes, where nobody says
COPIES = 8  # of a block, at most: what it is made of, what ops make of that in float32, what is stored
BOX = 8 << 20  # bytes read at once of what is only summed
TILE, RUN = 1 << 16, 256  # elements compared at once, and in one run of them
_AGAIN = (
    "convert the checkpoint again, with --restart where its run has not ended; if it happens twice, the machine's memory "
    "or disk may be at fault"
)


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to be right."""

    arrays: int
    bytes: int
    linked: tuple[str, ...] = ()  # of the arrays, those of which only the linked files' sizes and times were compared
    linked_bytes: int = 0  # of `bytes`, theirs


@dataclass
class _Difference:
    """Where an array is not what it must be."""

    elements: int = 0
    first: tuple[int, ...] = ()
    expected: str = ""
    found: str = ""

    def note(self, elements: int, first: tuple[int, ...], expected: str, found: str) -> None:
        if not self.elements or first < self.first:
            self.first, self.expected, self.found = first, expected, found
        self.elements += elements


def _nothing(done: int, total: int, array: str) -> None: ...


def compare(
    graph: Graph, files: Sequence[str], source: Source | Path, step: Path, on_progress: OnProgress = _nothing,
    jobs: int = 1, memory: int = MEMORY,
) -> Verified:  # fmt: skip
    """Holds the checkpoint in `step` against the source: every array there, none besides, each bit the same; and its
    checksums, where it has them.

    `graph`: of the plan's mapping and choices; `files`: the plan's, in `source`; `jobs`: threads; `memory`: bytes that
    blocks and their copies may take. Raises InputError with a diagnostic for each array: `missing-array`,
    `extra-array`, `wrong-array` (another shape or dtype), `output-differs`, `checksum-differs`, `damaged-output`;
    `linked-changed` for each linked file; or what `find_step` and reading the source raise.
    """
    found = find_step(step)
    stored, sums = open_restored(found.items), _Sums(found.directory)
    problems = _unlike({"/".join(t.path): (t.type.shape, t.type.dtype) for t in graph.targets}, stored)
    # Linked files are the source's own: compared, they would be equal to themselves.
    problems += changed(found.items, sums.files)
    tensors, most = tensors_of(as_source(source), files), _block(jobs, memory)
    checks = _Checks(found.items, sums, sum(t.type.nbytes for t in graph.targets), on_progress)

    def tasks() -> Iterator[_Task]:
        for target in graph.targets:
            array = stored.get("/".join(target.path))
            if array is not None and (array.shape, array.dtype) == (target.type.shape, target.type.dtype):
                for box, node in blocks(target, sums.piece(array), most):
                    yield _Task(array, box, partial(make, node, tensors))

    problems += checks.run(tasks(), jobs)
    if problems:
        raise InputError(problems)
    return Verified(len(graph.targets), checks.total)


def check_sums(step: Path, on_progress: OnProgress = _nothing, jobs: int = 1, memory: int = MEMORY) -> Verified:
    """Holds every array in `step` against the checksum that the run noted, or its linked files against theirs.

    Raises InputError: `no-checksums`, or a diagnostic for each array: `missing-array`, `extra-array`,
    `checksum-differs`, `damaged-output`; and `linked-changed` for each linked file; or what `find_step` raises.
    """
    checkpoint = find_step(step)
    stored, sums = open_restored(checkpoint.items), _Sums(checkpoint.directory)
    if not sums.known and not sums.linked:
        raise fail(
            "no-checksums",
            f"{checkpoint.directory} has no checksums",
            help="ckptc notes them since it writes them; `ckptc verify PLAN --output DIR` compares with the source",
        )
    noted = sums.known.keys() | sums.linked
    problems = [_missing(name) for name in sorted(noted - stored.keys())]
    problems += [_extra(name) for name in sorted(stored.keys() - noted)]
    problems += changed(checkpoint.items, sums.files)
    linked = tuple(sorted(stored.keys() & (sums.linked - sums.known.keys())))
    linked_bytes, most = sum(_nbytes(stored[name]) for name in linked), _block(jobs, memory)
    checks = _Checks(checkpoint.items, sums, sum(map(_nbytes, stored.values())), on_progress, linked_bytes)

    def tasks() -> Iterator[_Task]:
        for name in sorted(stored.keys() & sums.known.keys()):
            for box in _boxes(stored[name], sums.piece(stored[name]), most):
                yield _Task(stored[name], box)

    problems += checks.run(tasks(), jobs)
    if problems:
        raise InputError(problems)
    return Verified(len(stored), checks.total, linked, linked_bytes)


def _block(jobs: int, memory: int) -> int:
    """Bytes of the blocks that each thread may take."""
    return max(1, memory // (jobs * COPIES))


def _boxes(array: RestoredArray, piece: Sequence[int], most: int) -> Iterator[Box]:
    """Boxes of whole pieces that cover an array, of at most `most` bytes and BOX if pieces are not larger."""
    extents, most = list(piece), min(most, BOX)
    for axis in reversed(range(len(extents))):
        size = prod(extents) * itemsize(array.dtype)
        extents[axis] = min(array.shape[axis], extents[axis] * max(1, most // max(1, size)))
    for corner in product(*(range(0, n, e) for n, e in zip(array.shape, extents, strict=True))):
        yield tuple((c, min(c + e, n)) for c, e, n in zip(corner, extents, array.shape, strict=True))


@dataclass(frozen=True, slots=True)
class _Task:
    """A block to check."""

    array: RestoredArray
    box: Box
    make: Callable[[], Array] | None = None  # what it must be, where that is known


class _Local(threading.local):
    """What each thread has of its own."""

    def __init__(self, items: Path, plain: PlainIndex) -> None:
        self.reader, self.summer = open_reader(items, plain), checksum.Summer()
        self.buffer = np.empty(0, dtype=np.uint8)

    def read(self, array: RestoredArray, box: Box) -> Array:
        """The stored elements, until the next are read. Raises `damaged-output`."""
        shape, dtype = tuple(high - low for low, high in box), numpy_dtype(array.dtype)
        size = prod(shape) * dtype.itemsize
        if self.buffer.size < size:
            self.buffer = np.empty(size, dtype=np.uint8)
        out = self.buffer[:size].view(dtype).reshape(shape)
        try:
            axes = [(low, 1, high - low) for low, high in box]
            self.reader.read(tuple(array.name.split("/")), axes, array.chunk or array.shape, out, size)
        except InputError as error:
            said = [replace(d, code="damaged-output", help="convert the checkpoint again") for d in error.diagnostics]
            raise _DamagedError(said) from None
        return out


class _DamagedError(InputError):
    """A stored array cannot be read; others may be."""


class _Checks:
    """Blocks being checked, and what was found so far. All of it is changed under a lock."""

    def __init__(self, items: Path, sums: _Sums, total: int, on_progress: OnProgress, done: int = 0) -> None:
        self.total = total
        self._sums, self._on_progress, self._done = sums, on_progress, done
        self._local = _Local(items, list_plain(items))
        self._lock, self._stopped = threading.Lock(), False
        self._arrays: dict[str, RestoredArray] = {}
        self._totals: dict[str, int] = {}
        self._differences: dict[str, _Difference] = {}
        self._damaged: dict[str, list[Diagnostic]] = {}

    def run(self, tasks: Iterator[_Task], jobs: int) -> list[Diagnostic]:
        """Checks every block. Returns what is wrong, by array. Raises what making a block raises."""
        try:
            if jobs == 1:
                self._work(tasks)
            else:
                with ThreadPoolExecutor(jobs) as threads:
                    working = [threads.submit(self._work, tasks) for _ in range(jobs)]
                    try:
                        wait(working, return_when=FIRST_EXCEPTION)
                    finally:
                        self._stopped = True  # or they would go on, whatever has happened
                    for one in working:
                        one.result()
        finally:
            self._stopped = True
        return [problem for name in sorted(self._arrays) for problem in self._wrong(name)]

    def _work(self, tasks: Iterator[_Task]) -> None:
        while not self._stopped:
            with self._lock:
                task = next(tasks, None)
                if task is None:
                    return
                name = task.array.name
                self._arrays[name] = task.array
                difference = self._differences.setdefault(name, _Difference())
                if name in self._damaged:
                    continue
            try:
                found = self._local.read(task.array, task.box)
            except _DamagedError as error:
                with self._lock:
                    self._damaged.setdefault(name, list(error.diagnostics))
                continue
            corner, own = [low for low, _ in task.box], _Difference()
            if task.make is not None:
                _compare_chunk(task.make(), found, corner, own)
            total = self._sums.sum(task.array, self._local.summer, corner, found)
            with self._lock:
                self._totals[name] = checksum.add(self._totals.get(name, 0), total)
                if own.elements:
                    difference.note(own.elements, own.first, own.expected, own.found)
                self._done += found.nbytes
                self._on_progress(self._done, self.total, name)

    def _wrong(self, name: str) -> list[Diagnostic]:
        array, difference = self._arrays[name], self._differences[name]
        if name in self._damaged:
            return self._damaged[name]
        if not difference.elements:
            return self._sums.differ(array, self._totals.get(name, 0))
        n, first = difference.elements, list(difference.first)
        notes = (f"first index: {first}", f"expected: {difference.expected}", f"found: {difference.found}")
        message = (
            f"{n} of {prod(array.shape)} elements of `{name}` {'is' if n == 1 else 'are'} not what the source gives"
        )
        return [Diagnostic("output-differs", message, None, notes, _AGAIN)]


def _unlike(
    expected: Mapping[str, tuple[tuple[int, ...], str]], stored: Mapping[str, RestoredArray]
) -> list[Diagnostic]:
    problems = [_missing(name) for name in sorted(expected.keys() - stored.keys())]
    problems += [_extra(name) for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        (shape, dtype), array = expected[name], stored[name]
        if (shape, dtype) != (array.shape, array.dtype):
            notes = (f"expected: {dtype}{list(shape)}", f"found: {array.dtype}{list(array.shape)}")
            problems.append(Diagnostic("wrong-array", f"`{name}` is another array", None, notes, _AGAIN))
    return problems


def _missing(name: str) -> Diagnostic:
    return Diagnostic("missing-array", f"the checkpoint has no array `{name}`", None, (), _AGAIN)


def _extra(name: str) -> Diagnostic:
    return Diagnostic("extra-array", f"the checkpoint has an array `{name}` that nothing made", None, (), _AGAIN)


def _compare_chunk(expected: Array, found: Array, corner: Sequence[int], difference: _Difference) -> None:
    """Notes where the bits of two arrays of one type are not the same. `corner`: where both begin in the whole array.

    In tiles that stay in cache on both sides: the expected array is often a view whose axes are in another order.
    """
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        raise AssertionError(f"{expected.dtype}{expected.shape} made, {found.dtype}{found.shape} read")
    a, b = _bits(expected), _bits(found)
    extents = _tile(a)
    for at in product(*(range(0, n, e) for n, e in zip(a.shape, extents, strict=True))):
        index: Any = (*(slice(x, x + e) for x, e in zip(at, extents, strict=True)), ...)
        unequal = a[index] != b[index]
        if not unequal.any():
            continue
        place = np.unravel_index(int(np.argmax(unequal)), unequal.shape)
        inside = tuple(int(i) + x for i, x in zip(place, at, strict=True))[: expected.ndim]
        first = tuple(i + low for i, low in zip(inside, corner, strict=True))
        elements = unequal.any(axis=-1) if a.ndim > expected.ndim else unequal
        difference.note(int(np.count_nonzero(elements)), first, _shown(expected[inside]), _shown(found[inside]))


def _tile(array: Array) -> list[int]:
    """The shape of tiles: runs along the axis that moves least in memory, and along the last, then whatever fits."""
    extents = [1] * array.ndim
    fastest = min(range(array.ndim), key=lambda a: (abs(array.strides[a]), -a), default=None)
    wanted = [(fastest, RUN), (array.ndim - 1, RUN), *((a, TILE) for a in reversed(range(array.ndim)))]
    for axis, most in wanted if fastest is not None else ():
        if axis is not None:
            room = TILE // (prod(extents) // extents[axis])
            extents[axis] = max(extents[axis], min(array.shape[axis], most, room))
    return extents


def _bits(array: Array) -> Array:
    """The same elements as unsigned integers: unlike floats, they are equal only where all bits are. Of wide elements, along
    one more axis."""
    item = array.dtype.itemsize
    if item <= 8:
        return array.view(f"u{item}")
    return np.ascontiguousarray(array).reshape(-1).view("u8").reshape(*array.shape, -1)


def _shown(value: Any) -> str:
    """An element and its bits: zeros have signs, and NaNs differ."""
    return f"{value!s} (0x{np.asarray(value).tobytes()[::-1].hex()})"


def _nbytes(array: RestoredArray) -> int:
    return prod(array.shape) * itemsize(array.dtype)


class _Sums:
    """The checksums that a run noted, by array; none where it noted none, or in a way this ckptc does not know. And
    the arrays that it linked, and the linked files."""

    def __init__(self, step: Path) -> None:
        custom = custom_metadata_of(step).get("ckptc")
        made = custom if isinstance(custom, dict) else {}
        self.known = noted(custom_metadata_of(step))
        linked = made.get("linked")
        files, arrays = (linked.get("files"), linked.get("arrays")) if isinstance(linked, dict) else ({}, [])
        self.files: dict[str, Any] = files if isinstance(files, dict) else {}
        self.linked = {str(name) for name in arrays} if isinstance(arrays, list) else set[str]()

    def piece(self, array: RestoredArray) -> tuple[int, ...]:
        """What the array's checksum was summed over: its chunks, or the pieces that large ones were written in."""
        noted = self.known.get(array.name)
        return array.chunk if noted is None else noted.grid_of(array.chunk)

    def sum(self, array: RestoredArray, summer: checksum.Summer, corner: Sequence[int], data: Array) -> int:
        """What a chunk adds to its array's sum. `corner`: where in the array it begins."""
        piece, total = self.piece(array), 0
        cells = grid(array.shape, piece)
        for at in product(*(range(0, n, p) for n, p in zip(data.shape, piece, strict=True))):
            index = [(low + x) // p for low, x, p in zip(corner, at, piece, strict=True)]
            part: Any = (*(slice(x, x + p) for x, p in zip(at, piece, strict=True)), ...)
            total += summer.chunk(checksum.cell_of(index, cells), data[part])
        return checksum.add(total)

    def differ(self, array: RestoredArray, total: int) -> list[Diagnostic]:
        found, expected = checksum.seal(total, array.shape, array.dtype, self.piece(array)), self.known.get(array.name)
        if expected is None or found == expected.checksum:
            return []
        return [differs(array.name, expected.checksum, found)]
