"""Bytes of shard files: reads into the caller's buffers, and whether the files are still the same ones.

Reading is `preadv` straight into a buffer the caller reuses: no page faults on fresh memory, no shared file
position, so any number of threads read at once. Descriptors are opened when first needed and kept, up to a
bound, because opening a file costs a round trip on network disks.

What a plan says of a file is its size and the digest of its header. `check_unchanged` compares both before a
run; `RangeReader` compares the size again whenever it opens a file. Tensor data rewritten in place under the
same header is not noticed: that would take reading all of it.

Shard names come from an index or a plan, which are input: only `resolve` makes a path of one.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.source import SourceFile

MAX_HEADER = 100_000_000  # bytes of JSON; the limit of the safetensors reference reader
HEADER_THREADS = 16  # headers read at once: opening files waits, on network disks, rather than works
_RECOMPILE = "put the file back as it was, or compile the plan again from these files"
_FIRST_READ = 1 << 16  # bytes; most headers fit, so most files need one read


def shown(text: str) -> str:
    """`text` in backticks, safe to print: a header may name tensors with any characters, at any length."""
    if len(text) > 200:
        text = text[:200] + "…"
    return f"`{text}`" if text.isprintable() else f"`{text.encode('unicode_escape').decode('ascii')}`"


def problem(code: str, message: str, expected: str, found: str, help: str) -> Diagnostic:
    """A diagnostic in the form all of a checkpoint's have: what was expected, what was found, what to do."""
    return Diagnostic(code, message, None, (f"expected: {expected}", f"found: {found}"), help)


def refuse(code: str, message: str, expected: str, found: str, help: str) -> InputError:
    """An `InputError` of one `problem`, ready to raise."""
    return InputError([problem(code, message, expected, found, help)])


def resolve(directory: Path, name: str) -> Path:
    """The path of a checkpoint's file. Raises `unsafe-path` for a name that could lead out of `directory`.

    Only the name is judged. A symbolic link inside the directory may point anywhere: its owner put it there,
    and the Hugging Face cache is made of such links.
    """
    parts = name.split("/")
    if not all(parts) or "." in parts or ".." in parts or "\0" in name or not is_text(name):
        raise refuse(
            "unsafe-path",
            f"{shown(name)} is not the name of a file inside the checkpoint",
            "a relative path with forward slashes, without `.` or `..`",
            shown(name),
            "correct the name; be wary of a checkpoint that names files elsewhere",
        )
    return directory / name


def is_text(text: str) -> bool:
    """False for strings that UTF-8 cannot encode: JSON may escape half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_regular(path: Path, name: str) -> tuple[int, int]:
    """Open a regular file for reading: its descriptor, which the caller closes, and its size in bytes.

    Raises `source-missing` when there is none (a symbolic link to nothing counts), `source-unreadable` when
    the system refuses or the path is a directory, a pipe or a device.
    """
    try:
        # Non-blocking, or opening a named pipe would wait for a writer; no effect on regular files.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise refuse(
            "source-missing",
            f"{shown(name)} does not exist",
            f"a file at {path}",
            _absence(path),
            "download the file again, or give the directory that holds it",
        ) from None
    except OSError as error:
        raise unreadable(name, error) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise refuse(
                "source-unreadable",
                f"{shown(name)} is not a regular file",
                "a file",
                f"mode {stat.filemode(status.st_mode)}",
                "move it away, or give the directory that holds the checkpoint",
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _absence(path: Path) -> str:
    with suppress(OSError):
        return f"a symbolic link to `{os.readlink(path)}`, which is absent"
    return "nothing"


def unreadable(name: str, error: OSError) -> InputError:
    """The operating system refused to open or read `name`: its words, as a `source-unreadable` to raise."""
    reason = error.strerror or str(error)
    return refuse(
        "source-unreadable",
        f"{shown(name)} cannot be read: {reason}",
        "a readable file",
        reason,
        "check the file's permissions and the disk it lies on",
    )


def read_start(path: Path, name: str) -> tuple[int, bytes]:
    """A file's size in bytes; its length field (u64, little-endian) and as many bytes after it as it says.

    Nothing is judged here: fewer bytes come back where the file ends early, and only the first 64 KiB when
    the length is no header's. Raises as `open_regular`.
    """
    descriptor, size = open_regular(path, name)
    try:
        head = pread(descriptor, min(size, _FIRST_READ), 0)
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER:
            return size, head
        if 8 + length > len(head):
            head += pread(descriptor, min(size, 8 + length) - len(head), len(head))
        return size, head[: 8 + length]
    except OSError as error:
        raise unreadable(name, error) from None
    finally:
        os.close(descriptor)


def pread(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes from `offset`, fewer only where the file ends."""
    parts = []
    while count > 0 and (part := os.pread(descriptor, count, offset)):
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return b"".join(parts)


def header_digest(head: bytes) -> str:
    """`SourceFile.header_digest` of a file whose length field and JSON are `head`."""
    return "sha256:" + hashlib.sha256(head).hexdigest()


def check_unchanged(directory: Path, files: Sequence[SourceFile]) -> None:
    """Raise unless every file still has the size and the header it was recorded with.

    One diagnostic per file: `source-changed`, whose notes say what differs, or `source-missing`,
    `source-unreadable`.
    """
    if not os.path.isdir(directory):
        raise refuse(
            "source-missing",
            f"the checkpoint's directory {directory} does not exist",
            f"a directory with {len(files)} files",
            "nothing",
            "give the directory where the checkpoint is now",
        )

    def compare(file: SourceFile) -> list[Diagnostic]:
        try:
            size, head = read_start(resolve(directory, file.name), file.name)
        except InputError as error:
            return list(error.diagnostics)
        digest = header_digest(head)
        notes = []
        if size != file.size:
            notes += [f"expected: {file.size} bytes", f"found: {size} bytes"]
        if digest != file.header_digest:
            notes += [f"expected: header {file.header_digest}", f"found: header {digest}"]
        if not notes:
            return []
        message = f"{shown(file.name)} is not the file the plan was made from"
        return [Diagnostic("source-changed", message, None, tuple(notes), _RECOMPILE)]

    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        problems = [one for found in threads.map(compare, files) for one in found]
    if problems:
        raise InputError(problems)


class _Open:
    """An open descriptor and the reads under way on it; it is closed only when there are none."""

    __slots__ = ("descriptor", "readers")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.readers = 0


class RangeReader:
    """Byte ranges of a checkpoint's files. Safe from several threads; a context manager that closes them.

    At most `max_open` descriptors are kept, the most recently used ones; more are open only while more than
    `max_open` files are being read at the same moment.
    """

    def __init__(self, directory: Path, files: Sequence[SourceFile], max_open: int = 64) -> None:
        self._directory = directory
        self._files = tuple(files)
        self._max_open = max(1, max_open)
        self._open: OrderedDict[int, _Open] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()  # guards `_open`, `_closed`, `_bytes_read`; never held while reading
        self._closed = False
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes delivered into buffers so far, those of reads that then failed included."""
        return self._bytes_read

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, C-contiguous, any format) from byte `offset` of `files[file]` on.

        Raises `InputError`: `source-missing`, `source-truncated`, `source-changed` or `source-unreadable`;
        the buffer's content is then unspecified. Raises ValueError for an index or offset no file has, or
        once closed.
        """
        if not 0 <= file < len(self._files) or not 0 <= offset < 1 << 63:
            raise ValueError(f"no file {file} or no offset {offset}: there are {len(self._files)} files")
        if buffer.readonly or not buffer.c_contiguous:
            raise ValueError("the buffer must be writable and C-contiguous")
        if buffer.nbytes == 0:  # which `cast` refuses
            return
        with buffer.cast("B") as view:
            entry = self._acquire(file)
            done = 0
            try:
                while done < len(view):  # Linux reads at most 2 GiB a call, and less when interrupted
                    count = os.preadv(entry.descriptor, [view[done:]], offset + done)
                    if count == 0:
                        size = os.fstat(entry.descriptor).st_size
                        raise self._wrong_size("source-truncated", file, size, offset + len(view))
                    done += count
            except OSError as error:
                raise unreadable(self._files[file].name, error) from None
            finally:
                self._release(file, entry, done)

    def close(self) -> None:
        """Close every descriptor, those being read from as soon as their read ends. May be called again."""
        with self._lock:
            self._closed = True
            self._shrink(0)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _acquire(self, file: int) -> _Open:
        with self._lock:
            if (entry := self._claim(file)) is not None:
                return entry
        # Not under the lock: opening may take as long as a read. Two threads may open one file; one wins.
        opened = self._open_file(file)
        with self._lock:
            try:
                entry = self._claim(file)
            except ValueError:
                os.close(opened)
                raise
            if entry is not None:
                os.close(opened)
                return entry
            self._shrink(self._max_open - 1)
            entry = self._open[file] = _Open(opened)
            entry.readers = 1
            return entry

    def _claim(self, file: int) -> _Open | None:
        """The entry of an open file, claimed for one more read. Called with the lock held."""
        if self._closed:
            raise ValueError("the reader is closed")
        entry = self._open.get(file)
        if entry is not None:
            entry.readers += 1
            self._open.move_to_end(file)
        return entry

    def _release(self, file: int, entry: _Open, count: int) -> None:
        with self._lock:
            entry.readers -= 1
            self._bytes_read += count
            self._shrink(0 if self._closed else self._max_open)

    def _shrink(self, most: int) -> None:
        """Close idle files, least recently used first, until `most` are open or none is idle. Lock held."""
        excess = len(self._open) - most
        if excess <= 0:
            return
        for file in [file for file, entry in self._open.items() if entry.readers == 0][:excess]:
            os.close(self._open.pop(file).descriptor)

    def _open_file(self, file: int) -> int:
        record = self._files[file]
        descriptor, size = open_regular(resolve(self._directory, record.name), record.name)
        try:
            if size < record.size:
                raise self._wrong_size("source-truncated", file, size, record.size)
            if size > record.size:
                raise self._wrong_size("source-changed", file, size, record.size)
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):  # advice only; some file systems take none
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _wrong_size(self, code: str, file: int, size: int, needed: int) -> InputError:
        name = shown(self._files[file].name)
        message = f"{name} is truncated: byte {needed} is needed but the file is only {size} bytes"
        if code == "source-changed":
            message = f"{name} is not the file the plan was made from"
        return refuse(
            code,
            message,
            f"{max(needed, self._files[file].size)} bytes",
            f"{size} bytes",
            _RECOMPILE,
        )
