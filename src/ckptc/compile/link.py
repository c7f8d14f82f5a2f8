"""link: arrays whose chunks lie in the source's files as they are, for checkpoints that refer to them there.

Before: an array [embed=4096, layer=32, mlp=14336] whose source is 32 tensors [14336, 4096], transposed and stacked.
After: chunk [4096, 1, 2048], stored in the order of axes layer, mlp, embed: 224 chunks, each of them 16 MB of one
tensor.

A chunk grows along the axes in the order in which the source stores them, fastest first, while the steps are those of
contiguous bytes; the last axis may be cut. Where that ends below `LEAST` (a permutation inside of heads, for one) and
short of a tensor, where there is arithmetic or another dtype, or where most chunks hold padding, the array is copied
like any other.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd, prod

from ckptc.compile.schedule import Account
from ckptc.ops.nest import AxisMap, Part, joined, restrict_part
from ckptc.ops.types import itemsize
from ckptc.plan import links
from ckptc.plan.model import Content, Kind
from ckptc.plan.reads import need

MOST = 16 << 20  # bytes of a chunk: a restore holds each chunk whole, and reads several at once
LEAST = 64 << 10  # bytes: reading smaller ones one by one is slower than copying them now
ALIGNED_LEAST = 1 << 20  # bytes: cutting chunks smaller, so that none straddles shards or padding, is not worth it
MADE_MOST = 4096  # chunks of an array that are not linked

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # chunk, and its axes as stored, slowest first


@lru_cache(maxsize=4096)
def choose(content: Content, shards: tuple[int, ...], budget: int) -> Layout | None:
    """The chunk and the order of axes with which at least half of the array lies in source files; None when there is
    none, or when making the rest takes more than `budget` bytes of buffers."""
    main = max((p for p in content.parts if links.plain(p, content)), key=lambda p: p.size, default=None)
    if main is None or main.source is None:
        return None
    item = itemsize(content.dtype)
    chunk, order = _grow(content.shape, main, content.parts, shards, item, min(MOST, budget // 4))
    if prod(chunk) * item < LEAST and prod(chunk) < prod(content.sources[main.source].shape):
        return None
    linked = links.of(content, chunk, order).cells.size
    grid = [-(-n // c) for n, c in zip(content.shape, chunk, strict=True)]
    if 2 * linked * prod(chunk) < prod(content.shape) or prod(grid) - linked > MADE_MOST:
        return None
    needed = _account(content, chunk, order)
    if needed.buffers + needed.made // 2 > budget:  # a chunk is held once more, in the order that it is stored in
        return None
    return chunk, order


def _grow(
    shape: tuple[int, ...], main: Part, parts: tuple[Part, ...], shards: tuple[int, ...], item: int, most: int
) -> Layout:
    loops = []
    for axis, own in enumerate(main.axes):
        inner = joined(own.factors)[-1:]
        if inner and inner[0].weight == 1 and inner[0].tensor == 0 and inner[0].step > 0:
            loops.append((inner[0].step, axis, inner[0].size))
    chunk, run, grown = [1] * len(shape), 1, list[int]()
    for step, axis, size in sorted(loops):
        if step != run:
            break
        chunk[axis] = _portion(size, axis, shape, main.axes[axis], parts, shards, run * item, most)
        grown.append(axis)
        run *= chunk[axis]
        if chunk[axis] < size:
            break
    grown.reverse()
    if grown == sorted(grown):
        return tuple(chunk), tuple(range(len(shape)))  # as a chunk lies anyway: axes of one index may be anywhere
    return tuple(chunk), (*(a for a in range(len(shape)) if a not in grown), *grown)


def _portion(
    size: int,
    axis: int,
    shape: tuple[int, ...],
    own: AxisMap,
    parts: tuple[Part, ...],
    shards: tuple[int, ...],
    row: int,
    most: int,
) -> int:
    """How much of a loop of `size` a chunk takes, where one index is `row` bytes: a divisor of it, of at most `most`
    bytes; one with which chunks straddle neither shards nor the ends of other parts, if it is large enough."""
    room = max(1, most // row)
    plain = gcd(size, own.start)
    ends = gcd(plain, shape[axis], *(n for p in parts for n in (p.axes[axis].start, p.axes[axis].stop)))
    for whole in (gcd(ends, shape[axis] // shards[axis]), ends):
        found = _divisor(whole, room)
        if found * row >= ALIGNED_LEAST:
            return found
    return _divisor(plain, room)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    if size <= most:
        return size
    return max(d for k in range(1, int(size**0.5) + 1) if size % k == 0 for d in (k, size // k) if d <= most)


def account(kind: Kind) -> Account:
    """What the chunks that are made take, as `schedule.account`."""
    assert kind.link is not None
    return _account(kind.content, kind.chunk, kind.link)


@lru_cache(maxsize=4096)
def _account(content: Content, chunk: tuple[int, ...], order: tuple[int, ...]) -> Account:
    linked = links.of(content, chunk, order).cells
    read = held = made = 0
    for box in links.others(content.shape, chunk, linked):
        inside = [p for part in content.parts for p in restrict_part(part, box)]
        needs = [need(p, content.sources[p.source]) for p in inside if p.source is not None]
        read += sum(n.read for n in needs)
        held = max(held, sum(n.memory for n in needs))
        made = 2 * prod(chunk) * itemsize(content.dtype)
    return Account(read, held, made)
