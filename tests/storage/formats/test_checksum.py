"""Checksums: what changes them, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ckptc.storage.formats import checksum
from ckptc.storage.formats.checksum import LANES, Summer, add, cell_of, seal

Array = np.ndarray[Any, Any]
BLOCK = LANES * 8  # bytes


def noise(*shape: int, dtype: Any = np.uint8, seed: int = 0) -> Array:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).view(dtype).reshape(shape)


def total(array: Array, chunk: tuple[int, ...]) -> int:
    """The sum of an array, chunk by chunk."""
    grid = tuple(-(-n // c) for n, c in zip(array.shape, chunk, strict=True))
    return add(*(Summer().chunk(cell_of(i, grid), array[box(i, chunk)]) for i in product(*map(range, grid))))


def box(index: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))


def test_the_values_are_those_that_earlier_checkpoints_hold() -> None:
    """Another algorithm needs another name, or old checkpoints would seem damaged."""
    array = np.arange(5 * BLOCK // 16 + 3, dtype=np.uint32)[:, None] * np.array([1, 77_777], dtype=np.uint32)
    assert checksum.NAME == "ckptc-lanes-1"
    assert seal(total(array, (20_000, 2)), array.shape, "uint32", (20_000, 2)) == "c2fffe34ee35011a"


def test_it_is_what_the_module_says() -> None:
    """Lane by lane, in whole numbers."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    data = noise(BLOCK + 8 * 100 + 3)

    def plain(block: bytes) -> int:
        lanes = (int.from_bytes(block[i : i + 8], "little") for i in range(0, len(block), 8))
        return sum((x ^ x >> 29) * (checksum.mix((i + 1) * golden & mask) | 1) for i, x in enumerate(lanes))

    blocks = [data.tobytes()[i : i + BLOCK] for i in range(0, data.size, BLOCK)]
    mixed = data.size + sum(checksum.mix((plain(b) + n * golden) & mask) for n, b in enumerate(blocks))
    assert len(blocks) == 2
    assert Summer().chunk(6, data) == checksum.mix(checksum.mix(mixed & mask) ^ checksum.mix(7 * golden & mask))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_every_flipped_bit_is_seen(size: int) -> None:
    data, summer = noise(size), Summer()
    right = summer.chunk(4, data)
    rng = np.random.default_rng(1)
    bits = range(8 * size) if size <= 64 else [0, 8 * size - 1, *rng.integers(0, 8 * size, 200).tolist()]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        assert summer.chunk(4, data) != right
        data[bit // 8] ^= 1 << bit % 8
    assert summer.chunk(4, data) == right


def swap(a: Array, x: int, y: int) -> None:
    a[[x, y]] = a[[y, x]]


def negate(a: Array, *rows: int) -> None:
    for row in rows:
        a.view(np.uint8).reshape(len(a), -1)[row, 1::2] ^= 0x80


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda a: swap(a, 0, 8), id="rows of different chunks in each other's place"),
        pytest.param(lambda a: swap(a, 0, 1), id="rows of one chunk in each other's place"),
        pytest.param(lambda a: a.__setitem__(slice(0, 16), np.roll(a[:16], 8, axis=0)), id="chunks swapped"),
        pytest.param(lambda a: a.__setitem__(slice(8, 16), a[:8].copy()), id="a chunk in another's place too"),
        pytest.param(lambda a: a.__setitem__(slice(8, 16), 0), id="a chunk of zeros"),
        pytest.param(lambda a: a.__setitem__((20, slice(100, 108)), 0), id="a few zeros"),
        pytest.param(lambda a: a.__setitem__(slice(None), np.roll(a.ravel(), 1).reshape(a.shape)), id="shifted"),
        pytest.param(lambda a: negate(a, 3, 4), id="signs of two rows"),
        pytest.param(lambda a: negate(a, *range(len(a))), id="all signs"),
    ],
)
def test_damage_is_seen(damage: Callable[[Array], None]) -> None:
    array = noise(36, 3000, dtype=np.uint16)
    before, right = array.copy(), total(array, (8, 3000))
    damage(array)
    assert (array != before).any()
    assert total(array, (8, 3000)) != right


def test_stretches_of_one_chunk_in_each_others_place_are_seen() -> None:
    """As long as the blocks that are summed on their own."""
    data = noise(3 * BLOCK)
    right = Summer().chunk(0, data)
    assert Summer().chunk(0, np.roll(data, BLOCK)) != right


def test_signs_of_any_two_elements_of_zero_are_seen() -> None:
    """The highest bit of a lane is where a plain weighted sum would be blind: two of them add to nothing."""
    summer, zeros = Summer(), np.zeros(64, dtype=np.uint16)
    right = summer.chunk(0, zeros)
    for i, j in combinations(range(64), 2):
        wrong = zeros.copy()
        wrong[[i, j]] = 0x8000
        assert summer.chunk(0, wrong) != right


def test_a_chunk_that_is_missing_or_there_twice_is_seen() -> None:
    chunks = [Summer().chunk(cell, noise(1000, seed=cell)) for cell in range(5)]
    right = add(*chunks)
    for n in range(5):
        assert add(*chunks[:n], *chunks[n + 1 :]) != right
        assert add(*chunks, chunks[n]) != right
        assert add(*chunks, chunks[n], chunks[n]) != right


def test_bytes_that_are_zero_count() -> None:
    """A chunk cut short is not a chunk that ends in zeros."""
    sums = {Summer().chunk(0, np.zeros(n, dtype=np.uint8)) for n in range(40)}
    assert len(sums) == 40


def test_order_and_grouping_of_chunks_do_not_matter() -> None:
    """Nor, with them, the number of workers, and where a run was interrupted."""
    summer = Summer()
    chunks = [summer.chunk(cell, noise(1000 + cell, seed=cell)) for cell in range(20)]
    shuffled = np.random.default_rng(2).permutation(20).tolist()
    assert add(*(chunks[n] for n in shuffled)) == add(*chunks)
    assert add(add(*chunks[:3]), add(*chunks[3:4]), 0, add(*chunks[4:])) == add(*chunks)


@pytest.mark.parametrize("offset", range(9))
def test_where_and_how_the_elements_lie_in_memory_does_not_matter(offset: int) -> None:
    data = noise(BLOCK + 1234, 2)
    right = Summer().chunk(0, data)
    moved = np.empty(data.size + offset, dtype=np.uint8)[offset:].reshape(data.shape)
    moved[...] = data
    assert Summer().chunk(0, moved) == right
    assert Summer().chunk(0, np.asfortranarray(data)) == right
    summer = Summer()
    summer.chunk(1, noise(999_999, seed=7))  # leaves other lanes in its scratch memory
    assert summer.chunk(0, moved) == right


def test_a_dtype_is_its_bytes() -> None:
    data = noise(30, 7, dtype=np.uint16)
    assert Summer().chunk(0, data.view(ml_dtypes.bfloat16)) == Summer().chunk(0, data)
    assert Summer().chunk(0, np.float32(1.5).reshape(())) == Summer().chunk(0, np.array([1.5], dtype=np.float32))


def test_shape_dtype_and_chunks_are_part_of_it() -> None:
    sealed = {
        seal(5, (4, 6), "bfloat16", (2, 6)),
        seal(5, (6, 4), "bfloat16", (2, 6)),
        seal(5, (4, 6), "float16", (2, 6)),
        seal(5, (4, 6), "bfloat16", (4, 6)),
        seal(6, (4, 6), "bfloat16", (2, 6)),
    }
    assert len(sealed) == 5 and all(len(x) == 16 for x in sealed)


def test_cells_are_counted_row_by_row() -> None:
    assert [cell_of(i, (2, 3, 2)) for i in product(range(2), range(3), range(2))] == list(range(12))
    assert cell_of((), ()) == 0


def test_weights_are_odd_and_all_different() -> None:
    """An even one would not see the highest bit of what it multiplies."""
    weights = checksum._WEIGHTS
    assert (weights & 1 == 1).all() and len(set(weights.tolist())) == LANES
