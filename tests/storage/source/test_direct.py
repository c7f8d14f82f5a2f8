"""Reads past the page cache: the same bytes, and what they leave there."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptc.diagnostics import InputError
from ckptc.ir.source import SourceFile
from ckptc.storage.source import direct as uncached
from ckptc.storage.source.ranges import RangeReader

SIZE = 3 * uncached.PIECE + 12345
BLOCK = 1 << 16


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, data: bytes) -> Path:
    """A file that the page cache does not have."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with open(path, "rb") as opened:
        try:
            uncached.Uncached(opened.fileno()).close()
        except OSError as error:
            pytest.skip(str(error))
    forget(path)
    if cached(path, SIZE // 2):
        pytest.skip("the system does not forget files when told to")
    return path


def forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # what is not on the disk stays
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cached(path: Path, offset: int) -> bool:
    """Whether the page cache has the byte at `offset`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def is_uncached(descriptor: int) -> bool:
    info = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    return bool(os.O_DIRECT & int(info.split("flags:")[1].split()[0], 8))


def reader(path: Path, *, once: bool = True, size: int = SIZE) -> RangeReader:
    return RangeReader(path.parent, [SourceFile(path.name, size, "sha256:unused")], once=once)


def read(files: RangeReader, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    files.read_into(0, offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize(
    ("offset", "count"),
    [
        (0, SIZE),
        (4096, 2 * uncached.PIECE),
        (4095, uncached.PIECE + 2),
        (1, uncached.LEAST),
        (SIZE - uncached.LEAST, uncached.LEAST),
        (uncached.PIECE - 1, SIZE - uncached.PIECE),
    ],
)
def test_any_range_has_the_files_bytes(file: Path, data: bytes, offset: int, count: int) -> None:
    with reader(file) as files:
        assert read(files, offset, count) == data[offset : offset + count]
        assert files.bytes_read == count


@pytest.mark.parametrize("once", [True, False])
def test_what_is_read_once_is_not_kept_in_the_page_cache(file: Path, once: bool) -> None:
    with reader(file, once=once) as files:
        assert not files.from_disk
        read(files, 0, SIZE)
        assert files.from_disk is once
    assert {cached(file, at) for at in range(0, SIZE // 2, 9 * BLOCK)} == {not once}


def test_small_ranges_are_left_to_the_systems_read_ahead(file: Path) -> None:
    with reader(file) as files:
        read(files, 0, uncached.LEAST - 1)
    assert cached(file, 0)


def test_what_the_page_cache_has_is_taken_from_there(file: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with reader(file, once=False) as files:
        assert read(files, BLOCK, SIZE - BLOCK) == data[BLOCK:]
    forced: list[int] = []
    preadv = os.preadv

    def watched(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if is_uncached(descriptor):
            forced.append(offset)
        return preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr("ckptc.storage.source.direct.os.preadv", watched)
    with reader(file) as files:
        assert read(files, BLOCK, SIZE - BLOCK) == data[BLOCK:]
        assert not files.from_disk
    assert not forced


@pytest.mark.parametrize("begin", [0, uncached.PIECE + 5 * BLOCK])
def test_of_a_file_that_the_page_cache_has_in_part_all_is_right_and_no_more_is_kept(
    file: Path, data: bytes, begin: int
) -> None:
    with open(file, "rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.preadv(opened.fileno(), [bytearray(3 * BLOCK)], begin)
    assert cached(file, begin) and not cached(file, SIZE - BLOCK)
    with reader(file) as files:
        assert read(files, 77, SIZE - 77) == data[77:]
    assert not cached(file, SIZE - 2 * BLOCK)  # asking has had the system read the other one


def test_what_has_just_been_written_is_read(file: Path, data: bytes) -> None:
    with open(file, "r+b") as opened:
        opened.seek(uncached.PIECE + 9)
        opened.write(b"something else")
    with reader(file) as files:
        assert read(files, 0, SIZE) == data[: uncached.PIECE + 9] + b"something else" + data[uncached.PIECE + 23 :]


def test_several_threads_have_their_own_bytes(file: Path, data: bytes) -> None:
    places = [random.Random(n).randrange(SIZE - uncached.LEAST) for n in range(64)]
    with reader(file) as files, ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda at: read(files, at, uncached.LEAST) == data[at : at + uncached.LEAST], places)
        assert all(found)


def test_a_file_that_ends_early_is_said(file: Path) -> None:
    with reader(file) as files:
        read(files, 0, 1)
        os.truncate(file, SIZE - uncached.PIECE)
        with pytest.raises(InputError) as caught:
            read(files, 0, SIZE)
    assert caught.value.diagnostics[0].code == "source-truncated"


def test_where_the_system_refuses_them_the_page_cache_is_used(
    file: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As file systems do that accept O_DIRECT when a file is opened, and not when it is read."""
    preadv: Callable[..., int] = os.preadv

    def refusing(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if is_uncached(descriptor):
            raise OSError(22, "Invalid argument")
        return preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr("ckptc.storage.source.direct.os.preadv", refusing)
    with reader(file) as files:
        assert read(files, 3, SIZE - 3) == data[3:]
