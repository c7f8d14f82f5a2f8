"""Ranges: the right bytes into the caller's buffer, from any number of threads, and clear refusals."""

from __future__ import annotations

import os
import random
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ckptc.diagnostics import InputError
from ckptc.ir.source import SourceFile
from ckptc.storage.source.ranges import RangeReader

from ..conftest import SIZE, refusal


def read(reader: RangeReader, file: int, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    reader.read_into(file, offset, memoryview(buffer))
    return bytes(buffer)


def content(directory: Path, file: int) -> bytes:
    return (directory / f"{file}.safetensors").read_bytes()


def open_descriptors(directory: Path) -> int:
    links = (f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link).startswith(str(directory)) for link in links)


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")

# -- reading -------------------------------------------------------------------------------------------------


def test_a_range_is_what_the_file_holds_there(tmp_path: Path, files: list[SourceFile]) -> None:
    with RangeReader(tmp_path, files) as reader:
        assert read(reader, 3, 100, 50) == content(tmp_path, 3)[100:150]
        assert read(reader, 0, 0, SIZE) == content(tmp_path, 0)
        assert read(reader, 7, SIZE - 1, 1) == content(tmp_path, 7)[-1:]
        assert reader.bytes_read == 50 + SIZE + 1


def test_reading_fills_exactly_the_given_part_of_a_buffer(tmp_path: Path, files: list[SourceFile]) -> None:
    buffer = bytearray(b"." * 12)
    with RangeReader(tmp_path, files) as reader:
        reader.read_into(1, 20, memoryview(buffer)[4:8])
    assert buffer == b"...." + content(tmp_path, 1)[20:24] + b"...."


def test_buffers_of_any_format_and_dimension_are_filled(tmp_path: Path, files: list[SourceFile]) -> None:
    array = np.zeros((3, 5), np.float32)
    with RangeReader(tmp_path, files) as reader:
        reader.read_into(2, 8, memoryview(array))
    assert array.tobytes() == content(tmp_path, 2)[8:68]


def test_the_buffer_is_released_for_its_owner_to_resize(tmp_path: Path, files: list[SourceFile]) -> None:
    buffer = bytearray(10)
    with RangeReader(tmp_path, files) as reader, memoryview(buffer) as view:
        reader.read_into(0, 0, view)
    buffer.extend(b"more")  # BufferError while any view is alive


def test_short_reads_are_continued(tmp_path: Path, files: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return whole(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr("ckptc.storage.source.ranges.os.preadv", short)
    with RangeReader(tmp_path, files) as reader:
        assert read(reader, 0, 10, 20) == content(tmp_path, 0)[10:30]
    assert calls == [10, 17, 24]


def test_an_empty_range_reads_nothing(tmp_path: Path, files: list[SourceFile]) -> None:
    with RangeReader(tmp_path, files) as reader:
        reader.read_into(0, SIZE, memoryview(bytearray()))
        reader.read_into(0, 0, memoryview(np.zeros((0, 3))))
        assert reader.bytes_read == 0


def test_many_threads_read_right_bytes_through_few_descriptors(tmp_path: Path, files: list[SourceFile]) -> None:
    expected = [content(tmp_path, file) for file in range(8)]
    start = threading.Barrier(8)

    def work(seed: int) -> int:
        random_ = random.Random(seed)
        buffer = bytearray(SIZE)
        start.wait()
        total = 0
        for _ in range(400):
            file, begin = random_.randrange(8), random_.randrange(SIZE)
            count = random_.randint(1, SIZE - begin)
            reader.read_into(file, begin, memoryview(buffer)[:count])
            assert buffer[:count] == expected[file][begin : begin + count]
            total += count
        return total

    with RangeReader(tmp_path, files, max_open=2) as reader, ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(work, range(8))) == reader.bytes_read


def test_too_many_open_files_are_said_to_be_that(tmp_path: Path, files: list[SourceFile]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open(os.devnull, os.O_RDONLY)  # the lowest free number: the limit leaves none beyond it
    try:
        with RangeReader(tmp_path, files) as reader, pytest.raises(InputError) as caught:
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1, limits[1]))
            read(reader, 0, 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(taken)
    (refused,) = caught.value.diagnostics
    assert refused.code == "system-refused" and "Too many open files" in refused.message
    assert refused.help is not None and "ulimit -n" in refused.help


# -- descriptors ---------------------------------------------------------------------------------------------


@needs_proc
def test_files_are_opened_when_first_read_and_closed_at_the_end(tmp_path: Path, files: list[SourceFile]) -> None:
    with RangeReader(tmp_path, files) as reader:
        assert open_descriptors(tmp_path) == 0
        for _ in range(3):
            read(reader, 0, 0, 1)
        read(reader, 1, 0, 1)
        assert open_descriptors(tmp_path) == 2
    assert open_descriptors(tmp_path) == 0


@needs_proc
def test_open_files_are_bounded_and_the_least_recently_used_goes(
    tmp_path: Path, files: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, during = os.preadv, []

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        during.append(open_descriptors(tmp_path))
        return whole(descriptor, buffers, offset)

    monkeypatch.setattr("ckptc.storage.source.ranges.os.preadv", counting)
    with RangeReader(tmp_path, files, max_open=3) as reader:
        for file in (0, 1, 2, 0, 3, 4):
            read(reader, file, 0, 1)
        assert during == [1, 2, 3, 3, 3, 3]
        assert set(reader._open) == {0, 3, 4}


@needs_proc
def test_a_file_being_read_is_not_closed_under_the_read(
    tmp_path: Path, files: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, reading, go_on = os.preadv, threading.Event(), threading.Event()

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 77:
            reading.set()
            assert go_on.wait(10)
        return whole(descriptor, buffers, offset)

    monkeypatch.setattr("ckptc.storage.source.ranges.os.preadv", slow)
    reader = RangeReader(tmp_path, files, max_open=1)
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(read, reader, 0, 77, 9)
        assert reading.wait(10)
        read(reader, 1, 0, 1)  # wants file 0's place
        reader.close()
        go_on.set()
        assert result.result() == content(tmp_path, 0)[77:86]
    assert open_descriptors(tmp_path) == 0


@needs_proc
def test_two_threads_that_open_the_same_file_keep_one_descriptor(
    tmp_path: Path, files: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, opened = threading.Barrier(2), RangeReader._open_file

    def open_together(reader: RangeReader, file: int) -> int:
        both.wait(10)
        return opened(reader, file)

    monkeypatch.setattr(RangeReader, "_open_file", open_together)
    with RangeReader(tmp_path, files) as reader, ThreadPoolExecutor(2) as threads:
        assert len(set(threads.map(lambda _: read(reader, 0, 0, 99), range(2)))) == 1
        assert open_descriptors(tmp_path) == 1


@needs_proc
def test_refusals_leave_no_descriptor_open(tmp_path: Path, files: list[SourceFile]) -> None:
    os.truncate(tmp_path / files[0].name, 10)
    os.truncate(tmp_path / files[1].name, SIZE + 1)
    with RangeReader(tmp_path, files) as reader:
        refusal(read, reader, 0, 0, 5)
        refusal(read, reader, 1, 0, 5)
        assert open_descriptors(tmp_path) == 0


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux only")
def test_sequential_reading_is_announced_once_per_opened_file(
    tmp_path: Path, files: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    advice: list[int] = []

    def advise(_: int, offset: int, length: int, what: int) -> None:
        advice.append(what)
        raise OSError("this file system takes none")

    monkeypatch.setattr("ckptc.storage.source.ranges.os.posix_fadvise", advise)
    with RangeReader(tmp_path, files) as reader:
        assert read(reader, 0, 0, 9) + read(reader, 0, 9, 9) == content(tmp_path, 0)[:18]
    assert advice == [os.POSIX_FADV_SEQUENTIAL]


def test_reading_works_where_there_is_no_fadvise(
    tmp_path: Path, files: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("ckptc.storage.source.ranges.os.posix_fadvise", raising=False)
    with RangeReader(tmp_path, files) as reader:
        assert read(reader, 0, 0, 9) == content(tmp_path, 0)[:9]


# -- refusals while reading ----------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path, files: list[SourceFile]) -> None:
    (tmp_path / "4.safetensors").unlink()
    with RangeReader(tmp_path, files) as reader:
        found = refusal(read, reader, 4, 0, 1)
    assert (found.code, "`4.safetensors`" in found.message) == ("source-missing", True)


def test_a_file_shorter_than_recorded_is_truncated(tmp_path: Path, files: list[SourceFile]) -> None:
    os.truncate(tmp_path / "4.safetensors", 100)
    with RangeReader(tmp_path, files) as reader:
        found = refusal(read, reader, 4, 0, 1)
    assert (found.code, found.notes) == ("source-truncated", (f"expected: {SIZE} bytes", "found: 100 bytes"))


def test_a_file_truncated_while_it_is_open(tmp_path: Path, files: list[SourceFile]) -> None:
    with RangeReader(tmp_path, files) as reader:
        read(reader, 4, 0, 1)
        os.truncate(tmp_path / "4.safetensors", 100)
        found = refusal(read, reader, 4, 90, 20)
        assert reader.bytes_read == 1 + 10
    assert found.code == "source-truncated"
    assert found.message == "`4.safetensors` is truncated: byte 110 is needed but the file is only 100 bytes"


def test_a_range_past_the_recorded_end_is_truncated(tmp_path: Path, files: list[SourceFile]) -> None:
    with RangeReader(tmp_path, files) as reader:
        found = refusal(read, reader, 0, SIZE - 1, 2)
    assert (found.code, found.notes[0]) == ("source-truncated", f"expected: {SIZE + 1} bytes")


def test_a_file_longer_than_recorded_has_changed(tmp_path: Path, files: list[SourceFile]) -> None:
    os.truncate(tmp_path / "4.safetensors", SIZE + 1)
    with RangeReader(tmp_path, files) as reader:
        assert refusal(read, reader, 4, 0, 1).code == "source-changed"


def test_an_error_of_the_disk_is_told_in_the_systems_words(
    tmp_path: Path, files: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ckptc.storage.source.ranges.os.preadv", broken)
    with RangeReader(tmp_path, files) as reader:
        found = refusal(read, reader, 0, 0, 1)
    assert (found.code, "Input/output error" in found.message) == ("source-unreadable", True)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x", "", "."])
def test_a_plan_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    file = SourceFile(name, 1, "sha256:00")
    with RangeReader(tmp_path, [file]) as reader:
        assert refusal(read, reader, 0, 0, 1).code == "unsafe-path"


@pytest.mark.parametrize(("file", "offset"), [(-1, 0), (8, 0), (0, -1), (0, 1 << 63)])
def test_an_index_or_offset_no_file_has_is_a_programming_error(
    tmp_path: Path, files: list[SourceFile], file: int, offset: int
) -> None:
    with RangeReader(tmp_path, files) as reader, pytest.raises(ValueError, match="no file"):
        read(reader, file, offset, 1)


def test_buffers_that_cannot_be_filled_in_order_are_programming_errors(tmp_path: Path, files: list[SourceFile]) -> None:
    with RangeReader(tmp_path, files) as reader:
        for buffer in (memoryview(b"read-only"), memoryview(bytearray(8))[::2]):
            with pytest.raises(ValueError, match="writable"):
                reader.read_into(0, 0, buffer)


def test_a_closed_reader_reads_no_more(tmp_path: Path, files: list[SourceFile]) -> None:
    reader = RangeReader(tmp_path, files)
    read(reader, 0, 0, 1)
    reader.close()
    reader.close()
    for file in (0, 1):
        with pytest.raises(ValueError, match="closed"):
            read(reader, file, 0, 1)
