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

from ckptc.io.orbax import Entry, ItemsWriter
from ckptc.run import behind
from ckptc.run.behind import WriteBehind
from golden import compile_case, differences, expected_of, known_cases
from restoring import restored

CASE = next(case for case in known_cases() if case.id == "llama3_1.scan")
PLAN = compile_case(CASE, memory=1 << 16)
CHUNK = (0,) * len(PLAN.arrays[0].shape)


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


def put_all(writer: Any, size: int, chunks: int = 6) -> tuple[list[Entry], int]:
    """Chunks made in two buffers by turns, as the worker does."""
    buffers = [np.zeros(size, np.uint8), np.zeros(size, np.uint8)]
    with WriteBehind(PLAN, writer) as sink:
        for k in range(chunks):
            buffers[k % 2][:] = k
            sink.put(0, CHUNK, buffers[k % 2])
        taken = sink.take()
        for buffer in buffers:
            buffer[:] = 255  # the next unit's
        return taken


@pytest.mark.parametrize("size", [behind.LEAST, 16], ids=["from a thread", "at once"])
def test_every_chunk_is_written_before_its_buffer_is_used_again(size: int) -> None:
    writer = Slow()
    entries, total = put_all(writer, size)
    assert [set(x) for x in writer.written] == [{k} for k in range(6)]
    assert [e.offset for e in entries] == [1, 2, 3, 4, 5, 6] and total > 0
    assert (threading.get_ident() in writer.threads) == (size < behind.LEAST)


def test_what_writing_fails_with_is_raised_where_chunks_are_put() -> None:
    with pytest.raises(OSError, match="full"):
        put_all(Slow(OSError(errno.ENOSPC, "full")), behind.LEAST)


def test_a_run_that_writes_every_chunk_behind_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ItemsWriter.write_chunk

    def slow(*args: Any) -> Entry:
        time.sleep(0.001)  # in which the next chunk is made, and the next unit begun
        return write(*args)

    monkeypatch.setattr(ItemsWriter, "write_chunk", slow)
    monkeypatch.setattr(behind, "LEAST", 1)
    convert(PLAN, CASE.hf, tmp_path)
    assert differences(restored(tmp_path), expected_of(CASE)) == []
