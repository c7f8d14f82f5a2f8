"""Files of a checkpoint: their paths and their beginnings.

Shard names come from an index or a plan, which are input: only `resolve` makes a path of one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ckptc.diagnostics import Diagnostic, InputError, fail

MAX_HEADER = 100_000_000  # bytes of JSON; the limit of the safetensors reference reader
HEADER_THREADS = 16  # files looked into at once: opening them waits, on network disks, rather than works
NOT_UTF8 = "choose a directory whose path is UTF-8; where it is and the locale is another, set PYTHONUTF8=1"
RECOMPILE = "put the file back as it was, or compile the plan again from these files"
FIRST_READ = 1 << 16  # bytes; most headers fit, so most files need one read
BLOCK = 1 << 20  # bytes of a longer header that are held at once


def shown(text: str) -> str:
    """`text` in backticks, safe to print: a header may name tensors with any characters, at any length."""
    if len(text) > 200:
        text = text[:200] + "…"
    return f"`{text}`" if text.isprintable() else f"`{text.encode('unicode_escape').decode('ascii')}`"


def listed(names: Sequence[str], most: int = 8, count: int | None = None) -> str:
    """Names for a message: the first few, then how many more. `count`: of all, where `names` are but the first."""
    count = len(names) if count is None else count
    more = f" and {count - most} more" if count > most else ""
    return ", ".join(map(shown, names[:most])) + more


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
    """The operating system refused to open or read `name`: its words, as a `source-unreadable` to raise; `system-refused`
    where this process has too many files open, which is no fault of the file's."""
    reason = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        help = "allow more open files (`ulimit -n`), or use fewer --jobs"
        return fail("system-refused", f"the system refused to open {shown(name)}: {reason}", help=help)
    return refuse(
        "source-unreadable",
        f"{shown(name)} cannot be read: {reason}",
        "a readable file",
        reason,
        "check the file's permissions and the disk it lies on",
    )


def read_start(path: Path, name: str) -> tuple[int, bytes]:
    """A file's size in bytes; its length field (u64, little-endian) and the header after it, of which `header_blocks`
    reads what lies behind the first 64 KiB.

    Nothing is judged here: fewer bytes come back where the file ends early. Raises as `open_regular`.
    """
    descriptor, size = open_regular(path, name)
    try:
        head = pread(descriptor, min(size, FIRST_READ), 0)
    except OSError as error:
        raise unreadable(name, error) from None
    finally:
        os.close(descriptor)
    length = int.from_bytes(head[:8], "little")
    return size, head if length > MAX_HEADER else head[: 8 + length]


def header_blocks(path: Path, name: str, head: bytes) -> Iterator[bytes]:
    """The length field and the header of a file whose `read_start` is `head`, a block at a time.

    Raises as `open_regular`. Fewer bytes come where the file ends early.
    """
    yield head
    end = 8 + int.from_bytes(head[:8], "little")
    if len(head) < FIRST_READ or len(head) >= end or end > 8 + MAX_HEADER:
        return
    descriptor, _ = open_regular(path, name)
    try:
        at = len(head)
        while at < end and (block := pread(descriptor, min(BLOCK, end - at), at)):
            yield block
            at += len(block)
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
    return digest_of([head])


def digest_of(blocks: Iterable[bytes]) -> str:
    """The digest of bytes that come in blocks."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return "sha256:" + digest.hexdigest()
