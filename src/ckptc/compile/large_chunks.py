"""large_chunks: chunks that a restore holds one at a time, whatever the memory that a conversion may use.

Before: array [embed=4096, layer=32, mlp=14336] in 16 shards, unit [4096, 1, 1024], chunk [256, 1, 1024] of 512 KiB.
After: chunks of [256, 5, 14336], 35 MiB, each written in pieces of [256, 1, 1024].

Whoever restores a checkpoint with Orbax has TensorStore read each chunk into a buffer of its own, copy that to where it
belongs, and free it. glibc gives a freed buffer back to the system at once only above 32 MiB: below, it raises its limit
to the largest buffer that was freed, and keeps those that follow, in the heap of whichever thread had it. So a checkpoint
of chunks of 8 MiB takes twice its size to restore, and stays at that afterwards; one of chunks above 32 MiB takes its size and a fifth.
(`M_MMAP_THRESHOLD` in mallopt(3), whose maximum is DEFAULT_MMAP_THRESHOLD_MAX.)

Chunks grow along the axes that the unit is cut along, fastest first, then over shards where no mesh says that they are
for different devices. A device's shard of less than that is one chunk, as Orbax itself writes it; arrays of less in all
stay as they are.
"""

from __future__ import annotations

from math import prod

from ckptc.compile.schedule import fastest_first, main_part
from ckptc.ops.types import itemsize
from ckptc.plan.model import Content

LEAST = (32 << 20) + (1 << 16)  # bytes: what a buffer holds besides a chunk, such as malloc's own fields, counts too
MOST = 256 << 20  # bytes; more, where a device's shard has no smaller divisor, would be read for a box of few elements
PIECE = 2 << 20  # bytes that a piece has at least, where the unit allows: to write less at once costs more

Shape = tuple[int, ...]


def enlarge(content: Content, shards: Shape, chunk: Shape, unit: Shape, devices: bool) -> tuple[Shape, Shape]:
    """The pieces and the large chunks of an array, instead of `chunk`; the chunk and () where it stays as it is.

    `devices`: shards are for different devices, and no chunk covers two of them.
    """
    item, shape = itemsize(content.dtype), content.shape
    order = fastest_first(shape, main_part(content.parts))
    share = [n // s if n % s == 0 else n for n, s in zip(shape, shards, strict=True)]
    unchanged = chunk, ()
    if prod(chunk) * item >= LEAST or prod(shape) * item < LEAST:
        return unchanged
    stored = list(chunk)
    for axis in order:
        if prod(stored) * item >= LEAST:
            break
        stored[axis] = _grown(prod(stored) // stored[axis] * item, chunk[axis], share[axis], shape[axis])
    for axis in order:
        if prod(stored) * item < LEAST and not devices and stored[axis] == share[axis] < shape[axis]:
            row, count = prod(stored) * item, shape[axis] // share[axis]
            stored[axis] *= next((k for k in range(1, count) if count % k == 0 and k * row >= LEAST), count)
    if prod(stored) * item < LEAST and not (devices and stored == share):
        return unchanged
    piece = _piece(order, unit, stored, max(prod(chunk), PIECE // item), shape)
    if piece is None or piece == tuple(stored):
        return unchanged
    return piece, tuple(stored)


def _grown(row: int, chunk: int, share: int, size: int) -> int:
    """How much of an axis a large chunk takes, where one index is `row` bytes: a multiple of `chunk`, or all of it."""
    if share % chunk:
        if share < size:
            return chunk  # its shards are not whole chunks as it is
        return _least_waste(row, chunk, size)
    count = share // chunk
    enough = next(k for k in range(1, count + 1) if count % k == 0 and (k * chunk * row >= LEAST or k == count))
    if enough * chunk * row > MOST and share == size:
        return _least_waste(row, chunk, size)
    return enough * chunk


def _least_waste(row: int, chunk: int, size: int) -> int:
    """As `_grown`, where no even division is at hand: the last chunk reaches past the edge, by as little as can be."""
    if size * row <= MOST:
        return size
    fewest = -(-LEAST // (chunk * row))
    fits = range(fewest, max(fewest, MOST // (chunk * row)) + 1)
    return chunk * min(fits, key=lambda k: -(-size // (k * chunk)) * k * chunk)


def _piece(order: list[int], unit: Shape, stored: list[int], most: int, shape: Shape) -> Shape | None:
    """What of a large chunk is written at once: as much of the unit as fits in `most` elements, in one run of bytes."""
    piece, full = [1] * len(unit), True
    for axis in order:
        whole = min(unit[axis], stored[axis])
        room = max(1, most // prod(piece))
        if full:
            inside = stored[axis] % whole == 0 or stored[axis] == shape[axis]
            even = [k for k in range(1, whole + 1) if whole % k == 0 and k <= room]
            piece[axis] = whole if inside and room >= whole else even[-1] if inside else 1
        full = full and piece[axis] == stored[axis]
    if any(p == s and n % s for p, s, n in zip(piece, stored, shape, strict=True)):
        return None  # a piece at the edge would be no run of bytes
    return tuple(piece)
