"""Which weights a file holds, without reading all of it: the digest of samples of its content, and what the system
says of it.

Size and header are the same in every fine-tune of a model. So blocks of each file are hashed: spread evenly from the
first byte after the header to the last, and one in the middle of each tensor, or of as many as there may be blocks,
since training may change some tensors alone; a small file whole. The places follow from the header and the size, so
the digest is the same on every machine, and costs a few milliseconds. Other weights have another one; a single element
that was edited may have the same, and that is what inode and times of change are compared for.

What is read for it is not left in the page cache, unless it was there: a run asks the cache for the beginning of what
it reads, to know whether to read past it (`ckptc.storage.source.direct`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.source import SourceFile
from ckptc.storage.source.files import (
    HEADER_THREADS,
    RECOMPILE,
    digest_of,
    header_blocks,
    open_regular,
    pread,
    read_start,
    refuse,
    resolve,
    shown,
    unreadable,
)
from ckptc.storage.source.sha256 import hub_sha256, sha256_of

BLOCK = 4096  # bytes: of a sample, and of a page
EVEN = 64  # samples spread over a file
TENSORS = 64  # samples in the middle of tensors
HEADER_MOST = 1 << 20  # bytes of a header whose tensors are looked for: those of the largest shards have a tenth
FILES = 4096  # of one directory that are sampled at most; of the others, names and sizes count
SAMPLED = "sampled-sha256:"
GENERATION = "generation:"  # of an object, as a bucket numbers them
WHOLE = "sha256:"  # of all of a file, as the Hub lists it

_OFFSETS = itemgetter("data_offsets")

Bounds = Sequence[tuple[int, int]]  # of tensors: [begin, end) in bytes, increasing


def content_of(path: Path, name: str) -> str:
    """What tells the weights of a safetensors file from others: `SourceFile.content`. Raises as `sample`."""
    size, head = read_start(path, name)
    begin = min(size, 8 + int.from_bytes(head[:8], "little"))
    known = bounds(b"".join(header_blocks(path, name, head))) if begin <= HEADER_MOST else []
    return sample(path, name, begin, known)


def sample(path: Path, name: str, begin: int, tensors: Bounds = (), even: int = EVEN) -> str:
    """The digest of samples of the file at `path` from byte `begin` on. Raises what `open_regular` raises, and
    `source-unreadable`.
    """
    descriptor, size = open_regular(path, name)
    try:
        with suppress(OSError, AttributeError):  # or the system would read ahead of each sample
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        digest = hashlib.sha256()
        for offset, length in places(size, begin, tensors, even):
            digest.update(_read(descriptor, offset, length))
    except OSError as error:
        raise unreadable(name, error) from None
    finally:
        os.close(descriptor)
    return SAMPLED + digest.hexdigest()


def sample_files(directory: Path, names: Iterable[str]) -> str:
    """The digest of samples of many files, of their names and sizes. Raises as `sample`."""
    sizes = {}
    for name in sorted(names):
        try:
            sizes[name] = os.stat(directory / name).st_size
        except OSError as error:
            raise unreadable(name, error) from None
    every = -(-len(sizes) // FILES) or 1
    chosen = list(sizes)[::every]
    even = max(2, min(EVEN, FILES // max(1, len(chosen))))
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        found = threads.map(lambda name: sample(directory / name, name, 0, even=even), chosen)
        content = [*map(list, sizes.items()), *found]
    return SAMPLED + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def places(size: int, begin: int, tensors: Bounds, even: int = EVEN) -> list[tuple[int, int]]:
    """Offset and length of each sample of a file of `size` bytes; `even` of them spread over it."""
    length = size - begin
    if length <= 0:
        return []
    if length <= 2 * even * BLOCK:
        return [(begin, length)]
    last = size - BLOCK
    found = {begin + (last - begin) * n // (even - 1) for n in range(even)}
    held = [(low, high) for low, high in tensors if begin <= low < high <= size]
    few = min(len(held), TENSORS)
    for n in range(few):
        low, high = held[n * len(held) // few]
        found.add(max(begin, min(last, (low + high - BLOCK) // 2)))
    return [(offset, BLOCK) for offset in sorted(found)]


def bounds(head: bytes) -> list[tuple[int, int]]:
    """Where the tensors of a safetensors file lie, from a header that was found valid when its digest was noted."""
    try:
        entries = json.loads(head[8:])
        entries.pop("__metadata__", None)
        return sorted((len(head) + int(low), len(head) + int(high)) for low, high in map(_OFFSETS, entries.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []  # it was not: a plan can say so of any file


def check_unchanged(directory: Path, files: Sequence[SourceFile]) -> None:
    """Raise unless every file still has the size, the header and the content it was recorded with.

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
        path = resolve(directory, file.name)
        if file.content.startswith(WHOLE):
            return _compare_whole(directory, path, file)
        size, head = read_start(path, file.name)
        digest = digest_of(header_blocks(path, file.name, head))
        notes = []
        if size != file.size:
            notes += [f"expected: {file.size} bytes", f"found: {size} bytes"]
        if digest != file.header_digest:
            notes += [f"expected: header {file.header_digest}", f"found: header {digest}"]
        if not notes and file.content.startswith(GENERATION):
            notes = [f"expected: {file.content}, of an object in a bucket", "found: a file, which has none"]
        if not notes and file.content.startswith(SAMPLED):
            content = content_of(path, file.name)
            if content != file.content:
                notes = [f"expected: content {file.content}", f"found: content {content}"]
        return _changed(file, notes)

    def compared(file: SourceFile) -> list[Diagnostic]:
        try:
            return compare(file)
        except InputError as error:
            return list(error.diagnostics)

    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        problems = [one for found in threads.map(compared, files) for one in found]
    if problems:
        raise InputError(problems)


def _changed(file: SourceFile, notes: Sequence[str]) -> list[Diagnostic]:
    if not notes:
        return []
    message = f"{shown(file.name)} is not the file the plan was made from"
    return [Diagnostic("source-changed", message, None, tuple(notes), RECOMPILE)]


def _compare_whole(directory: Path, path: Path, file: SourceFile) -> list[Diagnostic]:
    """A file of the Hub, known by the digest of all of it, that was downloaded: its client notes the digest."""
    descriptor, size = open_regular(path, file.name)
    os.close(descriptor)
    if size != file.size:
        return _changed(file, [f"expected: {file.size} bytes", f"found: {size} bytes"])
    digest = WHOLE + (hub_sha256(directory, file.name) or sha256_of(path, file.name))
    return _changed(
        file, [f"expected: content {file.content}", f"found: content {digest}"] if digest != file.content else []
    )


def _read(descriptor: int, offset: int, length: int) -> bytes:
    """As `pread`; and the page cache has no more of it than before."""
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is not None:
        buffer = bytearray(length)
        with suppress(OSError):  # the cache does not have it, or the file system cannot say
            if os.preadv(descriptor, [buffer], offset, nowait) == length:
                return bytes(buffer)
    data = pread(descriptor, length, offset)
    with suppress(OSError, AttributeError):
        first = offset - offset % BLOCK
        os.posix_fadvise(descriptor, first, -(-(offset + length) // BLOCK) * BLOCK - first, os.POSIX_FADV_DONTNEED)
    return data


# -- what the system says -------------------------------------------------------------------------------------


class Status(NamedTuple):
    """A file as the system sees it. Writing sets both times; a program can set `mtime` back, but not `ctime`, which
    follows every change of the other fields, too."""

    device: int
    inode: int
    size: int  # bytes
    mtime: int  # nanoseconds since 1970, as is
    ctime: int
    mode: int
    owner: int
    group: int
    links: int

    @staticmethod
    def of(path: Path) -> Status:
        """Raises OSError."""
        s = os.stat(path)
        return Status(
            s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_mode, s.st_uid, s.st_gid, s.st_nlink
        )

    def differs(self, now: Status) -> str | None:
        """What says that the content may have changed since, in words; None where nothing does.

        A device may get another number when it is mounted again. `ctime` alone says nothing where owner or permissions
        changed, nor of a file with several names, which others may make and remove (`--link`).
        """
        if self.size != now.size:
            return f"{self.size} bytes then, {now.size} now"
        if self.mtime != now.mtime:
            return f"last written {_moment(self.mtime)} then, {_moment(now.mtime)} now"
        if self.inode != now.inode:
            return f"another file of that name: inode {self.inode} then, {now.inode} now"
        if self.ctime != now.ctime and self[5:] == now[5:] and self.links == 1:
            return f"last changed {_moment(self.ctime)} then, {_moment(now.ctime)} now"
        return None


def _moment(nanoseconds: int) -> str:
    return f"{nanoseconds / 10**9:.9f} s since 1970"


def statuses(directory: Path, names: Iterable[str]) -> dict[str, Status]:
    """Of the files below `directory` that are there."""
    found = {}
    for name in names:
        with suppress(OSError):
            found[name] = Status.of(directory / name)
    return found


def changed_since(before: dict[str, Status], now: dict[str, Status]) -> list[str]:
    """A line for each file that may have other content than before."""
    lines = []
    for name, then in before.items():
        found = now.get(name)
        words = "no longer there" if found is None else then.differs(found)
        if words:
            lines.append(f"{name}: {words}")
    return lines


def first_of(lines: Sequence[str], most: int = 8) -> list[str]:
    """The first few lines, and how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]
