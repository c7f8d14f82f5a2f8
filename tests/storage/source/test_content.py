"""Samples tell weights apart wherever they differ by more than a few elements, and leave the page cache alone."""

from __future__ import annotations

import json
import mmap
import os
import random
from pathlib import Path

import numpy as np
import pytest

from ckptc.storage.source.content import (
    BLOCK,
    EVEN,
    FILES,
    SAMPLED,
    TENSORS,
    bounds,
    places,
    sample,
    sample_files,
)

SIZE = 8 << 20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


def other_at(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x80]))


@pytest.mark.parametrize("offset", [64, SIZE // 2, SIZE - 1])
def test_a_difference_where_a_sample_lies_is_one(large: Path, offset: int) -> None:
    before = sample(large, "f", 64, [(SIZE // 2, SIZE // 2 + 10)])
    other_at(large, offset)
    assert sample(large, "f", 64, [(SIZE // 2, SIZE // 2 + 10)]) != before


def test_a_header_is_not_content(large: Path) -> None:
    before = sample(large, "f", 64)
    other_at(large, 63)
    assert sample(large, "f", 64) == before


@pytest.mark.parametrize("size", [1, BLOCK, 2 * EVEN * BLOCK])
def test_small_files_are_hashed_whole(size: int) -> None:
    assert places(size + 16, 16, [(16, 16 + size)]) == [(16, size)]
    assert places(16, 16, []) == []


@pytest.mark.parametrize("tensors", [0, 1, 63, 64, 65, 1000, 50_000])
def test_samples_are_few_cover_both_ends_and_every_tensor_of_a_few(tensors: int) -> None:
    begin, size, each = 1000, 1000 + (1 << 30), (1 << 30) // max(1, tensors)
    held = [(begin + n * each, begin + (n + 1) * each) for n in range(tensors)]
    found = places(size, begin, held)
    assert EVEN <= len(found) <= EVEN + TENSORS
    assert found[0] == (begin, BLOCK) and found[-1] == (size - BLOCK, BLOCK)
    gaps = np.diff([offset for offset, _ in found])
    assert gaps.min() > 0 and gaps.max() <= (1 << 30) // (EVEN - 1) + 1
    if tensors <= TENSORS:
        assert all(any(low < at + BLOCK and at < high for at, _ in found) for low, high in held)


def test_the_tensors_are_those_of_the_header() -> None:
    entries = {"b": [8, 12], "a": [0, 8]}
    text = json.dumps(
        {
            "__metadata__": {},
            **{n: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for n, (b, e) in entries.items()},
        }
    ).encode()
    head = len(text).to_bytes(8, "little") + text
    assert bounds(head) == [(len(head), len(head) + 8), (len(head) + 8, len(head) + 12)]
    assert bounds(b"12345678[[") == bounds(b"12345678[1]") == bounds(b'12345678{"a":{}}') == []


def test_many_files_are_told_from_others_by_name_size_and_content(tmp_path: Path) -> None:
    names = [f"d/{n}" for n in range(20)]
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    first = sample_files(tmp_path, names)
    assert first.startswith(SAMPLED) and sample_files(tmp_path, names[::-1]) == first
    other_at(tmp_path / "d/7", 1500)
    assert (second := sample_files(tmp_path, names)) != first
    os.rename(tmp_path / "d/7", tmp_path / "d/x")
    assert sample_files(tmp_path, [*names[:7], *names[8:], "d/x"]) != second
    assert sample_files(tmp_path, names[:7]) != first


def test_of_very_many_files_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptc.storage.source.content.FILES", 8)
    names = [f"{n:03}" for n in range(100)]
    for name in names:
        (tmp_path / name).write_bytes(b"0" * 100)
    first = sample_files(tmp_path, names)
    for name in names:
        (tmp_path / name).write_bytes(b"1" * 100)
    assert sample_files(tmp_path, names) != first
    assert FILES >= 4096


def resident(path: Path) -> int:
    """Pages of a file that the page cache has (mincore(2))."""
    import ctypes

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        flags = (ctypes.c_ubyte * (len(mapped) // BLOCK))()
        array = np.frombuffer(mapped, np.uint8)
        address = array.ctypes.data
        assert (
            ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), flags)
            == 0
        )
        del array
        return sum(flag & 1 for flag in flags)


def test_what_is_sampled_is_not_left_in_the_page_cache(large: Path) -> None:
    with large.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(large):
        pytest.skip("this file system keeps its files in memory")
    sample(large, "f", 64)
    assert resident(large) == 0
    large.read_bytes()
    assert (before := resident(large)) == SIZE // BLOCK
    sample(large, "f", 64)
    assert resident(large) == before
