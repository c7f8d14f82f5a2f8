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
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from ckptc.diagnostics import fail
from ckptc.ops.nest import Part
from ckptc.ops.types import itemsize
from ckptc.plan.model import Box, Kind, Output, Stored, boxes
from ckptc.plan.regions import Numbers, Region, axis_of, made_bytes, needs, piece, strides

UNIT_MOST = 48 << 20  # bytes of buffers: larger reads gain nothing, unless a chunk is larger
SAMPLE = 64  # tensors of a kind by which shapes of units are compared
MANY = 1024  # tensors that share no chunk are not made together by the thousand: nothing is gained
MIB = 1 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scheduled:
    kinds: tuple[Kind, ...]  # with their units
    tensors: tuple[Output, ...]  # as they were given, of these kinds
    batches: tuple[tuple[int, ...], ...]  # positions in `tensors`; those of a batch have one kind and the same arrays
    read_bytes: int  # of decoded chunks, those decoded again included
    peak: int  # bytes of buffers of the largest unit, and of one chunk as it is decoded


def schedule(kinds: Sequence[Kind], tensors: Sequence[Output], memory: int) -> Scheduled:
    """Units and batches for tensors of kinds that have no units yet. Raises InputError `too-little-memory`."""
    together: defaultdict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        together[tensor.kind, tensor.tensors].append(number)
    found: dict[Kind, int] = {}
    kind_of: list[int] = [0] * len(tensors)
    batches: list[tuple[int, ...]] = []
    read = peak = 0
    memo: dict[object, _Choice] = {}
    for (kind, _), numbers in together.items():
        begins = np.array([tensors[n].begins for n in numbers], dtype=np.int64)
        key = (kind, begins.tobytes())
        if key not in memo:
            memo[key] = _choose(_Group(kinds[kind], begins), memory, tensors[numbers[0]].name)
        choice = memo[key]
        read, peak = read + choice.read, max(peak, choice.peak)
        own = kinds[kind]
        chunk = piece(choice.unit, itemsize(own.dtype))
        position = found.setdefault(replace(own, unit=choice.unit, chunk=chunk), len(found))
        for number in numbers:
            kind_of[number] = position
        batches += [tuple(numbers[i] for i in batch) for batch in choice.batches]
    done = tuple(replace(t, kind=k) for t, k in zip(tensors, kind_of, strict=True))
    return Scheduled(tuple(found), done, tuple(batches), read, peak)


@dataclass(frozen=True, slots=True)
class _Choice:
    unit: Shape
    batches: tuple[tuple[int, ...], ...]  # positions among the members
    read: int
    peak: int


@dataclass(frozen=True)
class _Group:
    """Tensors of one kind that lie in the same stored arrays."""

    kind: Kind
    begins: Numbers  # where they begin there: int64[tensors, sources]

    def needs(self, batch: Numbers, box: Box) -> Iterator[tuple[Stored, Region]]:
        """What a box of each of some members needs."""
        for source, found in needs(self.kind, self.begins[batch], box):
            yield self.kind.sources[source], found

    def memory(self, batch: Numbers, unit: Sequence[int]) -> int:
        """Bytes of buffers of a batch's first unit, which is as large as any: what is read, and pieces made of it."""
        box = tuple((0, min(u, n)) for u, n in zip(unit, self.kind.shape, strict=True))
        made = made_bytes([high for _, high in box], itemsize(self.kind.dtype))
        return made + sum(r.size * itemsize(s.dtype) for s, r in self.needs(batch, box))

    def read(self, batch: Numbers, unit: Shape) -> int:
        """Bytes decoded for all units of a batch."""
        return sum(
            r.chunked(chunk_of(s), s.shape) * itemsize(s.dtype)
            for box in boxes(tuple((0, n) for n in self.kind.shape), unit)
            for s, r in self.needs(batch, box)
        )

    def total(self, batches: Sequence[Numbers], unit: Shape) -> tuple[int, int]:
        """Bytes decoded for all batches, and bytes of buffers of the largest.

        Batches that differ by whole chunks cost alike, where no chunk is cut short: each sort is counted once.
        """
        places = np.concatenate([self._indices(n) for n in range(len(self.kind.sources))], axis=1)
        chunk = np.array(
            [c if n % c == 0 else n for s in self.kind.sources for n, c in zip(s.shape, chunk_of(s), strict=True)]
        )
        known: dict[bytes, tuple[int, int]] = {}
        read = peak = 0
        for batch in batches:
            own = places[batch]
            key = (own - own[:1] // chunk * chunk).tobytes()
            if key not in known:
                known[key] = self.read(batch, unit), self.memory(batch, unit)
            read, peak = read + known[key][0], max(peak, known[key][1])
        return read, peak

    def _indices(self, source: int) -> Numbers:
        """The index in a source's array where each member begins: int64[tensors, axes]."""
        rest, out = self.begins[:, source], []
        for step in strides(self.kind.sources[source].shape):
            at, rest = np.divmod(rest, step)
            out.append(at)
        return np.stack(out, axis=1) if out else np.zeros((len(rest), 0), dtype=np.int64)

    def chunks(self) -> Numbers:
        """Where in its array's grid of chunks each member begins: int64[tensors, axes]."""
        first = self.kind.parts[0]
        source = self.kind.sources[first.source or 0]
        rest, out = self.begins[:, first.source or 0] + first.base, []
        for step, c in zip(strides(source.shape), chunk_of(source), strict=True):
            at, rest = np.divmod(rest, step)
            out.append(at // c)
        return np.stack(out, axis=1) if out else np.zeros((len(rest), 1), dtype=np.int64)


def _choose(group: _Group, memory: int, name: str) -> _Choice:
    kind = group.kind
    decoding = 2 * max(s.chunk_bytes for s in kind.sources)  # a chunk as stored and as decoded
    most = min(memory - decoding, max(UNIT_MOST, 2 * decoding))
    chunks = group.chunks()
    # By chunk, then as they lie in the array.
    order = np.lexsort((group.begins[:, 0], *reversed(chunks.T)))
    shared = int(max(np.unique(chunks, axis=0, return_counts=True)[1]))
    grains = [_grain(kind.parts, axis, kind.sources) for axis in range(len(kind.shape))]
    best: tuple[tuple[float, int, int], Shape, int] | None = None
    least = None
    sizes = {n for n in (shared, 2 * shared, 8 * shared) if n <= len(order)} | (
        {len(order)} if len(order) <= MANY else set()
    )
    for together in sorted({1, *sizes}):
        sample = _batches(order[: max(SAMPLE // together, 1) * together], together)
        for start in {(1,) * len(kind.shape): None, tuple(grains): None}:
            unit = _fitted(group, sample[0], start, grains, most)
            needed = group.memory(sample[0], unit)
            least = needed if least is None else min(least, needed)
            if needed > most:
                continue
            each = sum(group.read(batch, unit) for batch in sample) / sum(map(len, sample))
            key = (each, -_run(kind.shape, unit), together)
            if best is None or key < best[0]:
                best = (key, unit, together)
    if best is None:
        enough = -(-(decoding + (least or 0)) // MIB) * MIB
        raise fail(
            "too-little-memory",
            f"`{name}` is made of chunks of {decoding // 2} bytes, which must be held whole",
            notes=(f"expected: --memory {enough // MIB}MiB or more", f"found:    --memory {memory // MIB}MiB"),
            help=f"use --memory {enough // MIB}MiB",
        )
    _, unit, together = best
    batches = _batches(order, together)
    read, peak = group.total(batches, unit)
    peak += decoding
    return _Choice(unit, tuple(tuple(b.tolist()) for b in batches), read, peak)


def chunk_of(stored: Stored) -> Shape:
    """What is decoded as one."""
    return stored.chunk or stored.shape


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
            turns = min(f.size, chunk_of(stored)[a] // max(1, f.step // steps[a]))
            if turns > 1:
                return f.weight * turns
    return 1


def _fitted(group: _Group, batch: Numbers, start: Shape, grains: Sequence[int], most: int) -> Shape:
    """The largest unit, grown from `start` along the axes of the tensor, fastest first, that fits in `most` bytes."""
    shape, unit = group.kind.shape, list(start)
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
            if group.memory(batch, trial) <= most:
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
