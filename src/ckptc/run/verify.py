"""Is a checkpoint what its plan says? Read back, bit by bit.

Two ways, both with bounded memory:

- `compare`: against the source. What each array must be is made the straight way (`ckptc.run.reference`), and the stored
  one is read through TensorStore by Orbax's own metadata (`ckptc.storage.checkpoint.restored`). Nothing of the executor takes part.
- `check_sums`: against the checksums that the run noted in the checkpoint's metadata. No source, no plan. Arrays that
  lie in linked files have none, since the run did not read them: the files' sizes and times of change are compared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ir.graph import Graph, Target
from ckptc.ops.types import itemsize
from ckptc.run.reference import RemoteTensors, Tensors, blocks, make, tensors_of
from ckptc.storage.checkpoint.links import changed
from ckptc.storage.checkpoint.restored import Pending, RestoredArray, custom_metadata_of, open_restored
from ckptc.storage.checkpoint.steps import find_step
from ckptc.storage.checkpoint.sums import differs, noted
from ckptc.storage.formats import checksum
from ckptc.storage.formats.zarr3 import grid
from ckptc.storage.source.base import Source, as_source

Array = npt.NDArray[Any]
Box = tuple[tuple[int, int], ...]
OnProgress = Callable[[int, int, str], None]  # bytes verified, of how many, the array

AHEAD = 32 << 20  # bytes of chunks that are being read while others are summed
_STRIP = 1 << 22  # elements compared at once
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
    graph: Graph, files: Sequence[str], source: Source | Path, step: Path, on_progress: OnProgress = _nothing
) -> Verified:
    """Holds the checkpoint in `step` against the source: every array there, none besides, each bit the same; and its
    checksums, where it has them.

    `graph`: of the plan's mapping and choices; `files`: the plan's, in `source`. Raises InputError with a diagnostic
    for each array: `missing-array`, `extra-array`, `wrong-array` (another shape or dtype), `output-differs`,
    `checksum-differs`; `linked-changed` for each linked file; or `damaged-output`, and what `find_step` and reading the source raise.
    """
    found = find_step(step)
    stored, sums = open_restored(found.items), _Sums(found.directory)
    problems = _unlike({"/".join(t.path): (t.type.shape, t.type.dtype) for t in graph.targets}, stored)
    problems += changed(
        found.items, sums.files
    )  # which are the source's own: compared, they would be equal to themselves
    tensors = tensors_of(as_source(source), files)
    total, done = sum(t.type.nbytes for t in graph.targets), 0
    for target in graph.targets:
        name = "/".join(target.path)
        array = stored.get(name)
        if array is not None and (array.shape, array.dtype) == (target.type.shape, target.type.dtype):
            problems += _compare_array(target, array, tensors, sums)
        done += target.type.nbytes
        on_progress(done, total, name)
    if problems:
        raise InputError(problems)
    return Verified(len(graph.targets), total)


def check_sums(step: Path, on_progress: OnProgress = _nothing) -> Verified:
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
    total = sum(_nbytes(a) for a in stored.values())
    linked = tuple(sorted(stored.keys() & (sums.linked - sums.known.keys())))
    linked_bytes = done = sum(_nbytes(stored[name]) for name in linked)
    for name in sorted(stored.keys() & sums.known.keys()):
        array, summer, found = stored[name], checksum.Summer(), 0
        try:
            for inside, data in _chunks(array, tuple((0, n) for n in array.shape)):
                found = checksum.add(found, sums.sum(array, summer, [s.start for s in inside], data))
            problems += sums.differ(array, found)
        except InputError as error:
            problems += error.diagnostics
        done += _nbytes(array)
        on_progress(done, total, name)
    if problems:
        raise InputError(problems)
    return Verified(len(stored), total, linked, linked_bytes)


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


def _compare_array(
    target: Target, stored: RestoredArray, tensors: Tensors | RemoteTensors, sums: _Sums
) -> list[Diagnostic]:
    difference, summer, total = _Difference(), checksum.Summer(), 0
    for box, node in blocks(target, stored.chunk):
        chunks = _chunks(stored, box)
        first = next(chunks)  # the first ones are read while the block is made
        expected = make(node, tensors)
        for inside, found in chain([first], chunks):
            corner = tuple(low + s.start for (low, _), s in zip(box, inside, strict=True))
            at: Any = (*inside, ...)  # with `...` an array without axes stays one
            _compare_chunk(expected[at], found, corner, difference)
            total = checksum.add(total, sums.sum(stored, summer, corner, found))
    if not difference.elements:
        return sums.differ(stored, total)
    n, size = difference.elements, prod(stored.shape)
    notes = (f"first index: {list(difference.first)}", f"expected: {difference.expected}", f"found: {difference.found}")
    message = f"{n} of {size} elements of `{stored.name}` {'is' if n == 1 else 'are'} not what the source gives"
    return [Diagnostic("output-differs", message, None, notes, _AGAIN)]


def _compare_chunk(expected: Array, found: Array, corner: tuple[int, ...], difference: _Difference) -> None:
    """Notes where the bits of two arrays of one type are not the same. `corner`: where both begin in the whole array."""
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        raise AssertionError(f"{expected.dtype}{expected.shape} made, {found.dtype}{found.shape} read")
    a, b = np.ascontiguousarray(expected).reshape(-1), np.ascontiguousarray(found).reshape(-1)
    for begin in range(0, a.size, _STRIP):
        one, other = a[begin : begin + _STRIP], b[begin : begin + _STRIP]
        unequal = (_bits(one) != _bits(other)).any(axis=1)
        if not unequal.any():
            continue
        at = int(np.argmax(unequal))
        index = np.unravel_index(begin + at, expected.shape)
        first = tuple(int(i) + low for i, low in zip(index, corner, strict=True))
        difference.note(int(np.count_nonzero(unequal)), first, _shown(one[at]), _shown(other[at]))


def _bits(flat: Array) -> Array:
    """Elements as rows of unsigned integers: unlike floats, they are equal only where all bits are."""
    item = flat.dtype.itemsize
    return flat.view(f"u{item}" if item <= 8 else "u8").reshape(flat.size, -1)


def _shown(value: Any) -> str:
    """An element and its bits: zeros have signs, and NaNs differ."""
    return f"{value!s} (0x{np.asarray(value).tobytes()[::-1].hex()})"


def _cells(array: RestoredArray, box: Box) -> Iterator[tuple[slice, ...]]:
    """The chunks of a box of whole chunks: where they stand in the box."""
    for corner in product(*(range(low, high, c) for (low, high), c in zip(box, array.chunk, strict=True))):
        yield tuple(slice(x - low, x - low + c) for x, c, (low, _) in zip(corner, array.chunk, box, strict=True))


def _chunks(array: RestoredArray, box: Box) -> Iterator[tuple[tuple[slice, ...], Array]]:
    """The chunks of a box of whole chunks: where they stand in the box, and what they hold; the next ones being read while
    one is used."""
    ahead = max(1, AHEAD // max(1, prod(array.chunk) * itemsize(array.dtype)))
    pending: deque[tuple[tuple[slice, ...], Pending]] = deque()
    for inside in _cells(array, box):
        edges = zip(inside, box, array.shape, strict=True)
        part = tuple((low + s.start, min(low + s.stop, n)) for s, (low, _), n in edges)
        pending.append((inside, array.start(part)))
        if len(pending) > ahead:
            inside, first = pending.popleft()
            yield inside, first.result()
    while pending:
        inside, first = pending.popleft()
        yield inside, first.result()


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
