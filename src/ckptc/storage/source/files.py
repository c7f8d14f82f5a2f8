"""Files of a checkpoint: their paths, their beginnings, and whether they are still the same ones.

What a plan says of a file is its size and the digest of its header. `check_unchanged` compares both before a
run. Tensor data rewritten in place under the same header is not noticed: that would take reading all of it.

Shard names come from an index or a plan, which are input: only `resolve` makes a path of one.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.source import SourceFile

MAX_HEADER = 100_000_000  # bytes of JSON; the limit of the safetensors reference reader
HEADER_THREADS = 16  # headers read at once: opening files waits, on network disks, rather than works
RECOMPILE = "put the file back as it was, or compile the plan again from these files"
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
        return [Diagnostic("source-changed", message, None, tuple(notes), RECOMPILE)]

    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        problems = [one for found in threads.map(compare, files) for one in found]
    if problems:
        raise InputError(problems)
