"""A directory of this machine as a source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ckptc.diagnostics import InputError
from ckptc.ir.source import SourceFile
from ckptc.storage.source.base import Ranges, Start
from ckptc.storage.source.content import check_unchanged, content_of
from ckptc.storage.source.files import (
    BLOCK,
    HEADER_THREADS,
    header_blocks,
    open_regular,
    pread,
    read_start,
    refuse,
    resolve,
    shown,
    unreadable,
)

AHEAD = 256  # files whose first 64 KiB are held
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Directory:
    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def local(self) -> Path:
        return self.path

    def names(self) -> list[str]:
        """Raises `missing-directory`, or `source-unreadable`."""
        try:
            return sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise refuse(
                "missing-directory",
                f"{self.path} is not a directory",
                "a directory with config.json and *.safetensors",
                "a file" if isinstance(error, NotADirectoryError) else "nothing",
                "give the directory that holds the weights",
            ) from None
        except OSError as error:
            raise unreadable(str(self.path), error) from None

    def read(self, name: str, most: int) -> Iterator[bytes] | None:
        """Raises `source-missing` for a link to nothing, `too-large`, and as `open_regular`."""
        path = self.path / name
        return self._blocks(path, name, most) if os.path.lexists(path) else None

    def _blocks(self, path: Path, name: str, most: int) -> Iterator[bytes]:
        descriptor, size = open_regular(path, name)
        try:
            if size > most:
                message = f"{shown(name)} is too large to be what its name says"
                help = "copy it again from where the checkpoint was published"
                raise refuse("too-large", message, f"at most {most} bytes", f"{size} bytes", help)
            at = 0
            while block := pread(descriptor, min(BLOCK, size - at), at):
                yield block
                at += len(block)
        except OSError as error:
            raise unreadable(name, error) from None
        finally:
            os.close(descriptor)

    def starts(self, names: Sequence[str]) -> Iterator[tuple[str, Start | InputError]]:
        def start(name: str) -> Start | InputError:
            try:
                return read_start(resolve(self.path, name), name)
            except InputError as error:
                return error

        return ahead(start, names)

    def header(self, name: str, head: bytes) -> Iterator[bytes]:
        return header_blocks(resolve(self.path, name), name, head)

    def identified(self, file: SourceFile) -> SourceFile:
        return replace(file, content=content_of(resolve(self.path, file.name), file.name))

    def ranges(self, files: Sequence[SourceFile], once: bool) -> Ranges:
        from ckptc.storage.source.ranges import RangeReader  # which brings numpy, that headers do not need

        return RangeReader(self.path, files, once=once)

    def check_unchanged(self, files: Sequence[SourceFile]) -> None:
        check_unchanged(self.path, files)


def ahead(read: Callable[[str], _Read], names: Sequence[str]) -> Iterator[tuple[str, _Read]]:
    """Each name with what `read` gives, in order. A few are read at once, and no more than some hundred are held."""
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        for begin in range(0, len(names), AHEAD):
            some = names[begin : begin + AHEAD]
            yield from zip(some, threads.map(read, some), strict=True)
