"""Large pieces past the page cache, and what is read back."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptc.storage.sink import file as bulk
from ckptc.storage.sink.file import ALIGN, BOUNCE, HUGE, LEAST, BulkFile, page_buffer, place

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes here")


def noise(size: int, shift: int = 0) -> memoryview:
    """`size` random bytes, `shift` bytes after the beginning of a page."""
    buffer = page_buffer(size + shift)
    buffer[:] = np.random.default_rng(size).integers(0, 256, buffer.size, dtype=np.uint8)
    return buffer[shift:].data


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Direct writes on any file system that has them; what was written so, as offset and length."""
    monkeypatch.setattr(os, "major", lambda device: 1)
    said: list[tuple[int, int]] = []
    write = bulk._write

    def watched(descriptor: int, offset: int, view: memoryview) -> None:
        flags = int(
            next(x for x in Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("\n") if "flags" in x).split()[1],
            8,
        )
        if flags & os.O_DIRECT:
            said.append((offset, len(view)))
        write(descriptor, offset, view)

    monkeypatch.setattr(bulk, "_write", watched)
    return said


@pytest.mark.parametrize("shift", [0, 2])
def test_pieces_of_any_size_are_written_whole(tmp_path: Path, direct: list[tuple[int, int]], shift: int) -> None:
    pieces = [noise(n, shift) for n in (LEAST, 10, LEAST + 17, BOUNCE + ALIGN + 3, 0, 5000, LEAST * 2)]
    file = BulkFile(tmp_path / "f")
    end, places = 0, []
    for piece in pieces:
        places.append(place(end, len(piece)))
        file.write(places[-1], piece)
        end = places[-1] + len(piece)
    file.close()
    written = (tmp_path / "f").read_bytes()
    assert len(written) == end
    assert [written[at : at + len(p)] for at, p in zip(places, pieces, strict=True)] == [bytes(p) for p in pieces]
    assert sum(length for _, length in direct) == sum(len(p) // ALIGN * ALIGN for p in pieces if len(p) >= LEAST)


def test_large_pieces_begin_at_blocks_and_small_ones_leave_no_gap() -> None:
    assert [place(5, LEAST), place(ALIGN, LEAST), place(5, LEAST - 1), place(0, LEAST)] == [ALIGN, ALIGN, 5, 0]


def test_memory_that_is_refused_is_no_error_of_a_disk() -> None:
    with pytest.raises(MemoryError):
        page_buffer(1 << 50)  # more than there are addresses


def test_a_file_system_that_refuses_direct_writes_gets_others(
    tmp_path: Path, direct: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(descriptor: int, offset: int, view: memoryview) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("ckptc.storage.sink.file._write_bounced", refusing)
    file, piece = BulkFile(tmp_path / "f"), noise(LEAST, 1)
    file.write(0, piece)
    file.close()
    assert (tmp_path / "f").read_bytes() == bytes(piece) and not direct


def test_a_full_disk_is_no_reason_to_write_again(
    tmp_path: Path, direct: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = BulkFile(tmp_path / "f")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        file.write(0, noise(LEAST))
    file.abandon()


def test_without_a_block_device_the_page_cache_takes_all(
    tmp_path: Path, direct: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "major", lambda device: 0)
    file, piece = BulkFile(tmp_path / "f"), noise(LEAST)
    file.write(0, piece)
    file.close()
    assert (tmp_path / "f").read_bytes() == bytes(piece) and not direct


def test_threads_write_side_by_side(tmp_path: Path, direct: list[tuple[int, int]]) -> None:
    file, pieces = BulkFile(tmp_path / "f"), [noise(LEAST + 512 * k, k) for k in range(8)]
    places, end = [], 0
    for piece in pieces:
        places.append(place(end, len(piece)))
        end = places[-1] + len(piece)
    threads = [threading.Thread(target=file.write, args=x) for x in zip(places, pieces, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    written = (tmp_path / "f").read_bytes()
    assert all(written[at : at + len(p)] == bytes(p) for at, p in zip(places, pieces, strict=True))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
@pytest.mark.parametrize(("size", "asked"), [(HUGE, True), (5 * HUGE + 1, True), (HUGE - 1, False)])
def test_large_buffers_ask_for_huge_pages(size: int, asked: bool) -> None:
    """Or a disk gets its writes in small requests. `hg` in smaps(5): the kernel has been asked for them."""
    buffer = page_buffer(size)
    at, flags, inside = buffer.ctypes.data, "", False
    for line in Path("/proc/self/smaps").read_text("ascii").splitlines():
        low, dash, high = line.split(" ")[0].partition("-")
        if dash:
            inside = int(low, 16) <= at < int(high, 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert flags and ("hg" in flags.split()) == asked
    assert buffer.size == size and at % ALIGN == 0


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Syncs that last until the second event; the first says that one has begun."""
    begun, over = threading.Event(), threading.Event()

    def fdatasync(descriptor: int) -> None:
        begun.set()
        assert over.wait(20)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    yield begun, over
    over.set()


def test_while_a_disk_empties_its_cache_the_page_cache_takes_what_is_written(
    tmp_path: Path, direct: list[tuple[int, int]], held: tuple[threading.Event, threading.Event]
) -> None:
    begun, over = held
    file, other, piece = BulkFile(tmp_path / "f"), BulkFile(tmp_path / "g"), noise(LEAST)
    syncing = threading.Thread(target=file.sync)
    syncing.start()
    assert begun.wait(20)
    other.write(0, piece)
    assert not direct
    over.set()
    syncing.join()
    other.write(LEAST, piece)
    assert direct == [(LEAST, LEAST)]
    file.close()
    other.close()
    assert (tmp_path / "g").read_bytes() == bytes(piece) * 2


def test_other_processes_syncs_are_seen(tmp_path: Path, direct: list[tuple[int, int]]) -> None:
    read, write = os.pipe()
    begun, say = os.pipe()
    child = os.fork()
    if not child:
        with bulk._syncing():
            os.write(say, b"x")
            os.read(read, 1)
        os._exit(0)
    file, piece = BulkFile(tmp_path / "f"), noise(LEAST)
    os.read(begun, 1)
    file.write(0, piece)
    os.write(write, b"x")
    os.waitpid(child, 0)
    assert not direct
    file.write(LEAST, piece)
    assert direct == [(LEAST, LEAST)]
    file.close()


def test_files_are_synced_while_they_grow(
    tmp_path: Path, direct: list[tuple[int, int]], held: tuple[threading.Event, threading.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(bulk, "EAGER", 3 * LEAST)
    begun, over = held
    file, piece = BulkFile(tmp_path / "f"), noise(LEAST)
    for k in range(3):
        assert not begun.is_set()
        file.write(k * LEAST, piece)
    assert begun.wait(20)
    file.write(3 * LEAST, piece)  # which does not wait for it
    over.set()
    file.close()
    assert (tmp_path / "f").read_bytes() == bytes(piece) * 4


def test_files_that_are_not_eager_are_synced_when_asked_to(
    tmp_path: Path, direct: list[tuple[int, int]], held: tuple[threading.Event, threading.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(bulk, "EAGER", LEAST)
    begun, over = held
    file, piece = BulkFile(tmp_path / "f"), noise(LEAST)
    file.eager = False
    for k in range(3):
        file.write(k * LEAST, piece)
    assert file._eager is None and not begun.is_set()
    over.set()
    file.sync()
    assert begun.is_set()
    file.close()


@pytest.mark.parametrize("asked", ["sync", "close"])
def test_a_sync_that_begins_meanwhile_takes_no_error_from_the_one_that_was_asked_for(
    tmp_path: Path, direct: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """The system tells whoever comes first, and nobody else."""
    told: list[str] = []

    def sync(descriptor: int) -> None:
        name = threading.current_thread().name
        if name == "asked":  # on its way to the system; another thread writes meanwhile, and begins a sync of its own
            file.write(0, noise(LEAST))
            assert file._eager is not None
            file._eager.join(0.2)
        if not told:
            told.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(bulk, "EAGER", LEAST)
    file, failed = BulkFile(tmp_path / "f"), []

    def ask() -> None:
        try:
            getattr(file, asked)()
        except OSError as error:
            failed.append(error.errno)

    thread = threading.Thread(target=ask, name="asked")
    thread.start()
    thread.join()
    assert failed == [errno.EIO]


@pytest.mark.parametrize("last", ["write", "settle", "sync", "close"])
def test_what_a_sync_that_nobody_asked_for_fails_with_is_raised(
    tmp_path: Path, direct: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """The system says it once."""
    said: list[int] = []

    def fdatasync(descriptor: int) -> None:
        said.append(descriptor)
        if len(said) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(bulk, "EAGER", LEAST)
    file, piece = BulkFile(tmp_path / "f"), noise(LEAST)
    file.write(0, piece)
    assert file._eager is not None
    file._eager.join()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        file.write(LEAST, piece) if last == "write" else getattr(file, last)()
