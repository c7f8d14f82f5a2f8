"""units: in which boxes exported tensors are made, and which tensors together, so that few chunks are decoded twice.

Before: 26 tensors [mlp, embed] that lie in one array [embed, layer=26, mlp] of chunks [256, 26, mlp].
After: batches of 26 tensors, units [mlp, 256]: each unit of a batch is one chunk, decoded once, from which 26 boxes
are made.

A chunk is decoded whole, however little of it is wanted. Two shapes of units are tried: slabs of whole rows, which are
written in one piece, and boxes that cover whole chunks. Each is tried for one tensor at a time and for those that
share chunks, grown as far as the budget goes, and the one that reads the least is taken; of equals the one that writes
the longest pieces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ckptc.diagnostics import fail
from ckptc.ops.nest import Part
from ckptc.ops.types import itemsize
from ckptc.plan.model import Array, Box
from ckptc.plan.regions import Numbers, Region, axis_of, bases, needs, strides

UNIT_MOST = 64 << 20  # bytes of buffers: larger reads gain nothing, unless a chunk is larger
SAMPLE = 64  # tensors of a kind by which shapes of units are compared
MANY = 1024  # tensors that share no chunk are not made together by the thousand: nothing is gained
MIB = 1 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A saved array, as far as reading it goes."""

    shape: Shape
    dtype: str
    chunk: Shape

    @property
    def chunk_bytes(self) -> int:
        return prod(self.chunk) * itemsize(self.dtype)


@dataclass(frozen=True)
class Scheduled:
    arrays: tuple[Array, ...]  # with their units
    batches: tuple[tuple[int, ...], ...]  # positions in `arrays`; the arrays of a batch have one shape and one unit
    read_bytes: int  # of decoded chunks, those decoded again included
    peak: int  # bytes of buffers of the largest unit, and of one chunk as it is decoded


def schedule(arrays: Sequence[Array], stored: Sequence[Stored], memory: int) -> Scheduled:
    """Units and batches for arrays whose sources are positions in `stored`. Raises InputError `too-little-memory`."""
    kinds: defaultdict[object, list[int]] = defaultdict(list)
    for number, array in enumerate(arrays):
        bare = tuple(replace(p, base=0) for p in array.parts)
        kinds[array.shape, array.dtype, array.sources, bare].append(number)
    done = list(arrays)
    batches: list[tuple[int, ...]] = []
    read = peak = 0
    memo: dict[object, _Choice] = {}
    for numbers in kinds.values():
        kind = _Kind.of([arrays[n] for n in numbers], stored)
        key = (kind.first.shape, kind.first.dtype, kind.sources, kind.first.parts, kind.begins.tobytes())
        if key not in memo:
            memo[key] = _choose(kind, memory)
        choice = memo[key]
        read, peak = read + choice.read, max(peak, choice.peak)
        for number in numbers:
            done[number] = replace(arrays[number], unit=choice.unit, chunk=choice.unit)
        batches += [tuple(numbers[i] for i in batch) for batch in choice.batches]
    return Scheduled(tuple(done), tuple(batches), read, peak)


@dataclass(frozen=True, slots=True)
class _Choice:
    unit: Shape
    batches: tuple[tuple[int, ...], ...]  # positions among the members
    read: int
    peak: int


@dataclass(frozen=True)
class _Kind:
    """Arrays that differ in where they begin alone."""

    first: Array
    begins: Numbers  # int64[arrays, parts]
    sources: tuple[Stored, ...]

    @staticmethod
    def of(members: Sequence[Array], stored: Sequence[Stored]) -> _Kind:
        return _Kind(members[0], bases(members), tuple(stored[s.tensors[0]] for s in members[0].sources))

    def needs(self, batch: Numbers, box: Box) -> Iterator[tuple[Stored, Region]]:
        """What a box of each of some members needs."""
        for source, found in needs(self.first, self.begins[batch], box, [s.shape for s in self.sources]):
            yield self.sources[source], found

    def memory(self, batch: Numbers, unit: Sequence[int]) -> int:
        """Bytes of buffers of a batch's first unit, which is as large as any: what is read, and one box made of it."""
        box = tuple((0, min(u, n)) for u, n in zip(unit, self.first.shape, strict=True))
        made = prod(high for _, high in box) * itemsize(self.first.dtype)
        return made + sum(r.size * itemsize(s.dtype) for s, r in self.needs(batch, box))

    def read(self, batch: Numbers, unit: Shape) -> int:
        """Bytes decoded for all units of a batch."""
        units = replace(self.first, unit=unit).units()
        return sum(r.chunked(s.chunk, s.shape) * itemsize(s.dtype) for box in units for s, r in self.needs(batch, box))

    def total(self, batches: Sequence[Numbers], unit: Shape) -> tuple[int, int]:
        """Bytes decoded for all batches, and bytes of buffers of the largest.

        Where chunks fill their arrays, tensors made alone that begin alike within chunks cost alike: each sort is
        counted once.
        """
        even = all(len(b) == 1 for b in batches) and all(
            n % c == 0 for s in self.sources for n, c in zip(s.shape, s.chunk, strict=True)
        )
        places = [self._within(number) for number in range(self.begins.shape[1])] if even else [self.begins]
        known: dict[bytes, tuple[int, int]] = {}
        read = peak = 0
        for batch in batches:
            key = b"".join(p[batch].tobytes() for p in places)
            if key not in known:
                known[key] = self.read(batch, unit), self.memory(batch, unit)
            read, peak = read + known[key][0], max(peak, known[key][1])
        return read, peak

    def _within(self, number: int) -> Numbers:
        """Where a part of each member begins, within its chunk: int64[arrays, axes]."""
        source = self.sources[self.first.parts[number].source or 0]
        rest, out = self.begins[:, number], [np.zeros(len(self.begins), dtype=np.int64)]
        for step, c in zip(strides(source.shape), source.chunk, strict=True):
            at, rest = np.divmod(rest, step)
            out.append(at % c)
        return np.stack(out, axis=1)

    def chunks(self) -> Numbers:
        """Where in its array's grid of chunks each member begins: int64[arrays, axes]."""
        source = self.sources[self.first.parts[0].source or 0]
        rest, out = self.begins[:, 0], []
        for step, c in zip(strides(source.shape), source.chunk, strict=True):
            at, rest = np.divmod(rest, step)
            out.append(at // c)
        return np.stack(out, axis=1) if out else np.zeros((len(rest), 1), dtype=np.int64)


def _choose(kind: _Kind, memory: int) -> _Choice:
    first = kind.first
    decoding = 2 * max(s.chunk_bytes for s in kind.sources)  # a chunk as stored and as decoded
    most = min(memory - decoding, max(UNIT_MOST, 2 * decoding))
    chunks = kind.chunks()
    # By chunk, then as they lie in the array.
    order = np.lexsort((kind.begins[:, 0], *reversed(chunks.T)))
    shared = int(max(np.unique(chunks, axis=0, return_counts=True)[1]))
    grains = [_grain(first.parts, axis, kind.sources) for axis in range(len(first.shape))]
    best: tuple[tuple[float, int, int], Shape, int] | None = None
    least = None
    sizes = {n for n in (shared, 2 * shared, 8 * shared) if n <= len(order)} | (
        {len(order)} if len(order) <= MANY else set()
    )
    for together in sorted({1, *sizes}):
        sample = _batches(order[: max(SAMPLE // together, 1) * together], together)
        for start in {(1,) * len(first.shape): None, tuple(grains): None}:
            unit = _fitted(kind, sample[0], start, grains, most)
            needed = kind.memory(sample[0], unit)
            least = needed if least is None else min(least, needed)
            if needed > most:
                continue
            each = sum(kind.read(batch, unit) for batch in sample) / sum(map(len, sample))
            key = (each, -_run(first.shape, unit), together)
            if best is None or key < best[0]:
                best = (key, unit, together)
    if best is None:
        enough = -(-(decoding + (least or 0)) // MIB) * MIB
        raise fail(
            "too-little-memory",
            f"`{first.name}` is made of chunks of {decoding // 2} bytes, which must be held whole",
            notes=(f"expected: --memory {enough // MIB}MiB or more", f"found:    --memory {memory // MIB}MiB"),
            help=f"use --memory {enough // MIB}MiB",
        )
    _, unit, together = best
    batches = _batches(order, together)
    read, peak = kind.total(batches, unit)
    peak += decoding
    return _Choice(unit, tuple(tuple(b.tolist()) for b in batches), read, peak)


def _batches(order: Numbers, together: int) -> list[Numbers]:
    return [order[i : i + together] for i in range(0, len(order), together)]


def _grain(parts: Sequence[Part], axis: int, sources: Sequence[Stored]) -> int:
    """How much of a tensor's axis whole chunks are, in the largest part."""
    main = max(parts, key=lambda p: p.size)
    stored = sources[main.source or 0]
    steps = strides(stored.shape)
    for f in main.axes[axis].factors:
        if f.size > 1:
            a = axis_of(f.step, stored.shape)
            turns = min(f.size, stored.chunk[a] // max(1, f.step // steps[a]))
            if turns > 1:
                return f.weight * turns
    return 1


def _fitted(kind: _Kind, batch: Numbers, start: Shape, grains: Sequence[int], most: int) -> Shape:
    """The largest unit, grown from `start` along the axes of the tensor, fastest first, that fits in `most` bytes."""
    shape, unit = kind.first.shape, list(start)
    for axis in reversed(range(len(shape))):
        grain = grains[axis]
        candidates = [shape[axis]]
        if grain < shape[axis]:
            n = -(-shape[axis] // grain)
            candidates += [grain * (n >> k) for k in range(1, n.bit_length()) if n >> k]
            candidates.append(grain)
        candidates += [shape[axis] >> k for k in range(1, shape[axis].bit_length())]
        for size in sorted(set(candidates), reverse=True):
            if size <= unit[axis]:
                break
            trial = [*unit[:axis], size, *unit[axis + 1 :]]
            if kind.memory(batch, trial) <= most:
                unit[axis] = size
                break
        if unit[axis] < shape[axis]:
            break
    return tuple(unit)


def _run(shape: Shape, unit: Shape) -> int:
    """Elements of a unit that are written in one piece."""
    out = 1
    for n, u in zip(reversed(shape), reversed(unit), strict=True):
        out *= u
        if u < n:
            break
    return out
