"""What a source is: the files of a checkpoint, wherever they lie.

A source names its files, reads their beginnings and small files whole, says what tells its weights from others, and
reads ranges of bytes into the caller's buffers. A directory of this machine is one (`directory`), a repository of the
Hugging Face Hub another (`hub`), a place in a bucket a third (`bucket`); `opened` tells them apart by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ckptc.diagnostics import InputError
from ckptc.ir.source import SourceFile

Start = tuple[int, bytes]  # a file's size in bytes, and its first bytes: the length of its header, and what fits of it


class Ranges(Protocol):
    """Byte ranges of some files. Safe from several threads; a context manager."""

    @property
    def bytes_read(self) -> int:
        """Bytes delivered into buffers so far, those of reads that then failed included."""
        ...

    @property
    def from_disk(self) -> bool:
        """Whether reads wait for this machine's disk, so that writes to it should not be hurried."""
        ...

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `offset` of the file with this position on. Raises InputError."""
        ...

    def close(self) -> None:
        """May be called again."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Source(Protocol):
    """The files of a checkpoint. Its text is its name, as a user may give it."""

    @property
    def local(self) -> Path | None:
        """The directory on this machine that holds the files, if one does."""
        ...

    def names(self) -> list[str]:
        """The names of its files, sorted. Raises InputError where there is no such source."""
        ...

    def read(self, name: str, most: int) -> Iterator[bytes] | None:
        """The content of a small file, a block at a time; None where there is none. Raises InputError for one of more
        than `most` bytes, or that cannot be read."""
        ...

    def starts(self, names: Sequence[str]) -> Iterator[tuple[str, Start | InputError]]:
        """The beginnings of files, in the order of `names`. Several are read at once, and only some are held."""
        ...

    def header(self, name: str, head: bytes) -> Iterator[bytes]:
        """The length field and the header of the file that begins with `head`, a block at a time."""
        ...

    def identified(self, file: SourceFile) -> SourceFile:
        """The file with what tells its weights from others under the same header: `SourceFile.content`."""
        ...

    def ranges(self, files: Sequence[SourceFile], once: bool) -> Ranges:
        """A reader of ranges of these files. `once`: hardly a byte will be asked for twice."""
        ...

    def check_unchanged(self, files: Sequence[SourceFile]) -> None:
        """Raises InputError (`source-changed`, `source-missing`) unless every file is what it was."""
        ...


def opened(name: str | Path) -> Source:
    """The source of this name: `gs://bucket/path`, `hf://org/repo[@revision]`, or `org/repo` where no such directory is;
    else a directory."""
    from ckptc.storage.source.bucket import Bucket, is_bucket
    from ckptc.storage.source.directory import Directory
    from ckptc.storage.source.hub import Repository, is_repository

    if is_bucket(name):
        return Bucket(str(name))
    return Repository(str(name)) if is_repository(name) else Directory(Path(name))


def as_source(given: Source | Path) -> Source:
    """A source, which a directory's path stands for, too."""
    from ckptc.storage.source.directory import Directory

    return Directory(given) if isinstance(given, Path) else given
