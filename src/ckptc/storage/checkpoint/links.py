"""Hard links from a checkpoint to the source files that hold some of its chunks.

    items/linked/<name>              the source's file of that name, under a second name: the same bytes on the disk
    items/manifest.ocdbt             says of a chunk: that file, its offset, its length

A hard link needs both names on one file system. Symbolic links are followed first: in the Hub's cache a shard is a link
to a blob. The file itself is not touched, not even its permissions, since they are the source's too; so a program that
opens the source's file and writes into it changes the checkpoint. One that writes a new file and renames it, as
download clients do, or deletes it, does not. What a file's size and time of change were is kept with the checkpoint.

`link(2)`: https://pubs.opengroup.org/onlinepubs/9699919799/functions/link.html. That OCDBT takes files of any name:
TensorStore's documentation of the format, "Data file table" (a base path and a relative path).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ir.source import SourceFile
from ckptc.storage.source.content import content_of
from ckptc.storage.source.files import refuse, resolve, shown

LINKED = "linked"  # below `items`
_NONE = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class LinkedChunks:
    """Chunks of one array that lie in linked files."""

    array: int  # position among the checkpoint's
    cells: npt.NDArray[Any]  # int64[n]: row-major numbers in the array's grid
    files: npt.NDArray[Any]  # int64[n]: positions among the linked files' names
    offsets: npt.NDArray[Any]  # int64[n]: bytes from the start of the file


@dataclass(frozen=True, slots=True)
class LinkedFile:
    """What is kept of a linked file: size in bytes, time of the last change of its content in nanoseconds, and what tells
    its content from others' (`SourceFile.content`)."""

    size: int
    mtime: int
    content: str = ""


def link_files(source: Path, files: Iterable[SourceFile], items: Path) -> dict[str, LinkedFile]:
    """Links files of the directory `source` into `items`, instead of what was linked there before.

    Raises InputError: `cannot-link`, in the system's words, and `source-changed`.
    """
    folder = items / LINKED
    shutil.rmtree(folder, ignore_errors=True)
    out = {}
    for file in files:
        # Resolved here: whether link(2) follows a symbolic link is up to the system.
        original, link = Path(os.path.realpath(resolve(source, file.name))), folder / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original, link)
        except OSError as error:
            raise _cannot_link(original, items, error) from None
        status = link.stat()
        if status.st_size != file.size:
            help = "put the file back as it was, or compile the plan again from these files"
            raise refuse(
                "source-changed",
                f"{shown(file.name)} is not the file the plan was made from",
                f"{file.size} bytes",
                f"{status.st_size} bytes",
                help,
            )
        out[file.name] = LinkedFile(status.st_size, status.st_mtime_ns, file.content)
    return out


def _cannot_link(original: Path, items: Path, error: OSError) -> InputError:
    """Why a file cannot be linked. Raises what is no matter of links, such as a full disk."""
    copied = "compile it again without `--link`, which copies"
    if error.errno == errno.EXDEV:
        reason = "they are on different file systems, or mounts of one"
        help = f"choose an --output on the file system of {original.parent}, or {copied}"
    elif error.errno in _NONE:
        reason = (
            f"{error.strerror}: the file system has no hard links, or the system lets only a file's owner make them"
        )
        help = f"own the files, or put them and the --output on a file system with hard links, or {copied}"
    elif error.errno == errno.EMLINK:
        reason = "it has as many names as its file system allows"
        help = f"remove other checkpoints that are linked to it, or {copied}"
    else:
        raise error
    return fail("cannot-link", f"{original} cannot be linked into {items}: {reason}", help=help)


def changed(items: Path, files: Mapping[str, Any]) -> list[Diagnostic]:
    """A diagnostic for each linked file that is not as it was. `files`: by name, [size, mtime, content], as `record` made them."""
    problems = []
    for name, kept in sorted(files.items()):
        try:
            path = resolve(items / LINKED, name)
            status = path.stat()
            found: object = [status.st_size, status.st_mtime_ns]
            if isinstance(kept, list) and found == kept[:2] and kept[2:] != [""]:
                found = [*kept[:2], content_of(path, name)]
            elif isinstance(kept, list):
                found = [status.st_size, status.st_mtime_ns, *kept[2:]]
        except OSError as error:
            found = error.strerror
        except InputError as error:
            found = error.diagnostics[0].message
        if found != kept:
            notes = (f"expected: {_said(kept)}", f"found: {_said(found)}")
            message = (
                f"{LINKED}/{name} is not as it was when it was linked: arrays that lie in it may have other values"
            )
            help = "`ckptc verify PLAN --output DIR` compares with the source; convert again if that has changed, too"
            problems.append(Diagnostic("linked-changed", message, None, notes, help))
    return problems


def record(files: Mapping[str, LinkedFile]) -> dict[str, Sequence[int | str]]:
    """The files as JSON has them."""
    return {name: [file.size, file.mtime, file.content] for name, file in files.items()}


def _said(value: object) -> str:
    if isinstance(value, list) and len(value) == 3:
        return f"{value[0]} bytes, changed at {value[1]} ns since 1970, content {value[2] or 'not noted'}"
    return str(value)
