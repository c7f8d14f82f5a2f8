"""Writing behind: each chunk is written as it was put, though its buffer is used again."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.run.test_link import convert

from ckptc.diagnostics import InputError
from ckptc.plan.order import forwards
from ckptc.run import write_behind
from ckptc.run.write_behind import WriteBehind
from ckptc.storage.checkpoint.orbax_writer import Entry, ItemsWriter
from golden import compile_case, differences, expected_of, known_cases
from restoring import restored

CASE = next(case for case in known_cases() if case.id == "llama3_1.scan")
PLAN = compile_case(CASE, memory=1 << 16)
CHUNK = tuple((0, c) for c in PLAN.arrays[0].chunk)


class Slow:
    """An `ItemsWriter`'s place: it looks at a chunk when a disk would be done with it."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error, self.written, self.threads = error, list[bytes](), set[int]()

    def write_chunk(self, array: int, index: tuple[int, ...], data: npt.NDArray[Any]) -> Entry:
        time.sleep(0.02)
        if self.error:
            raise self.error
        self.written.append(data.tobytes())
        self.threads.add(threading.get_ident())
        return Entry(f"{array}/{index}", len(self.written), data.nbytes)


Done = list[tuple[int, int, list[Entry], int]]


def put_all(writer: Any, size: int, chunks: int = 6) -> Done:
    """Units of three chunks, made in two buffers by turns, as the worker does."""
    buffers = [np.zeros(size, np.uint8), np.zeros(size, np.uint8)]
    done: Done = []
    with WriteBehind(PLAN, writer, lambda *unit: done.append(unit)) as sink:
        for k in range(chunks):
            buffers[k % 2][:] = k
            sink.put(0, CHUNK, buffers[k % 2])
            if k % 3 == 2:
                sink.end(k // 3, 0)
        sink.settle()
        for buffer in buffers:
            buffer[:] = 255  # somebody else's now
    return done


@pytest.mark.parametrize("size", [write_behind.LEAST, 16], ids=["from a thread", "at once"])
def test_every_chunk_is_written_before_its_buffer_is_used_again(size: int) -> None:
    writer = Slow()
    done = put_all(writer, size)
    assert [set(x) for x in writer.written] == [{k} for k in range(6)]
    assert [[e.offset for e in entries] for _, _, entries, _ in done] == [[1, 2, 3], [4, 5, 6]]
    assert [unit for unit, *_ in done] == [0, 1] and done[0][3] != done[1][3]
    assert (threading.get_ident() in writer.threads) == (size < write_behind.LEAST)


def test_what_writing_fails_with_is_raised_where_chunks_are_put() -> None:
    with pytest.raises(OSError, match="full"):
        put_all(Slow(OSError(errno.ENOSPC, "full")), write_behind.LEAST)


@pytest.mark.parametrize("size", [write_behind.LEAST, 16], ids=["from a thread", "at once"])
@pytest.mark.parametrize("then", ["put", "settle", "leave", "fail"])
def test_a_unit_whose_last_chunk_is_not_written_is_never_done(size: int, then: str) -> None:
    writer, done = Slow(), []
    chunk = np.zeros(size, np.uint8)
    with (
        pytest.raises(ValueError if then == "fail" and size == write_behind.LEAST else OSError),
        WriteBehind(PLAN, writer, lambda *unit: done.append(unit)) as sink,
    ):
        sink.put(0, CHUNK, chunk)
        sink.settle()
        writer.error = OSError(errno.EIO, "lost")
        sink.put(0, CHUNK, chunk)
        sink.end(7, 0)
        if then == "put":
            sink.put(0, CHUNK, chunk)
        elif then == "settle":
            sink.settle()
        elif then == "fail":
            raise ValueError("the next unit cannot be read")
    assert done == []


@pytest.mark.parametrize("size", [write_behind.LEAST, 16], ids=["from a thread", "at once"])
def test_a_unit_is_done_when_its_last_chunk_is_written_and_not_before(size: int) -> None:
    writer, done = Slow(), list[int]()
    with WriteBehind(PLAN, writer, lambda unit, *_: done.append(len(writer.written))) as sink:
        for unit in range(3):
            for _ in range(2):
                sink.put(0, CHUNK, np.zeros(size, np.uint8))
            sink.end(unit, 0)
        assert done == ([2, 4, 6] if size < write_behind.LEAST else [2, 4])  # the last chunk is still being written
    assert done == [2, 4, 6]


def test_a_unit_that_is_done_is_kept_when_the_next_one_fails() -> None:
    done = []
    with (
        pytest.raises(ValueError, match="cannot be read"),
        WriteBehind(PLAN, Slow(), lambda *u: done.append(u)) as sink,
    ):
        sink.put(0, CHUNK, np.zeros(write_behind.LEAST, np.uint8))
        sink.end(7, 0)
        raise ValueError("the next unit cannot be read")
    assert [unit for unit, *_ in done] == [7]


def test_a_run_whose_last_chunk_of_a_unit_fails_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, unit = ItemsWriter.write_chunk, forwards(PLAN)[0]
    last = tuple((h - 1) // c for (_, h), c in zip(unit.box, PLAN.arrays[unit.outputs[0]].chunk, strict=True))

    def full(self: ItemsWriter, number: int, index: tuple[int, ...], data: Any) -> Entry:
        if (number, index) == (unit.outputs[0], last):
            raise OSError(errno.ENOSPC, "full")
        return write(self, number, index, data)

    monkeypatch.setattr(write_behind, "LEAST", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ItemsWriter, "write_chunk", full)
        with pytest.raises(InputError) as caught:
            convert(PLAN, CASE.hf, tmp_path)
    assert caught.value.diagnostics[0].code == "disk-full"
    convert(PLAN, CASE.hf, tmp_path)
    assert differences(restored(tmp_path), expected_of(CASE)) == []


def test_a_run_that_writes_every_chunk_behind_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ItemsWriter.write_chunk

    def slow(*args: Any) -> Entry:
        time.sleep(0.001)  # in which the next chunk is made, and the next unit begun
        return write(*args)

    monkeypatch.setattr(ItemsWriter, "write_chunk", slow)
    monkeypatch.setattr(write_behind, "LEAST", 1)
    convert(PLAN, CASE.hf, tmp_path)
    assert differences(restored(tmp_path), expected_of(CASE)) == []
