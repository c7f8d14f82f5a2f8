"""The sources of a plan, open in one worker: a range of a safetensors file, or a box of an Orbax array, read into the
caller's memory.

Where the chunks of an Orbax checkpoint lie is found out by TensorStore, which has threads: in a forked process, before
workers are forked (`Place.plain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from ckptc.ir.source import SourceFile
from ckptc.plan.model import Plan, Source, Stored, Tensor
from ckptc.storage.checkpoint.orbax_index import PlainIndex
from ckptc.storage.checkpoint.orbax_reader import ArrayReader, open_reader
from ckptc.storage.checkpoint.sums import Sums
from ckptc.storage.source import base as files
from ckptc.storage.source.base import Ranges


@dataclass(frozen=True)
class Place:
    """Where a source of a plan lies on this machine."""

    source: files.Source  # of safetensors files, or the directory of an Orbax checkpoint's items
    plain: PlainIndex | None = None  # where the chunks of an Orbax checkpoint lie
    sums: Sums | None = None  # what is told of the chunks that are read


def files_of(source: Source) -> list[SourceFile]:
    return [SourceFile(f.name, f.size, f.header, f.content) for f in source.files]


def _local(place: Place) -> Path:
    assert place.source.local is not None, "arrays of chunks are read on this machine"
    return place.source.local


class Readers:
    """Of each source of a plan, by its position. A context manager that closes them. Not for several threads at once."""

    def __init__(self, readers: Sequence[Ranges | ArrayReader]) -> None:
        self._readers = readers

    @staticmethod
    def of(plan: Plan, places: Sequence[Place]) -> Readers:
        once = not plan.totals.reread_bytes
        return Readers(
            [
                open_reader(_local(place), place.plain, place.sums)
                if source.format == "orbax"
                else place.source.ranges(files_of(source), once)
                for source, place in zip(plan.sources, places, strict=True)
            ]
        )

    def read_range(self, tensor: Tensor, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes of a tensor from one of them on."""
        reader = self._readers[tensor.source]
        assert not isinstance(reader, ArrayReader)
        reader.read_into(tensor.file, tensor.begin + offset, view)

    def read_box(
        self,
        tensor: Tensor,
        axes: Sequence[tuple[int, int, int]],
        chunk: Sequence[int],
        out: npt.NDArray[Any],
        in_flight: int,
    ) -> None:
        """As `ArrayReader.read`, of an array of chunks."""
        reader = self._readers[tensor.source]
        assert isinstance(reader, ArrayReader)
        reader.read(tuple(tensor.name.split("/")), axes, chunk, out, in_flight)

    def order(self, tensor: Tensor, stored: Stored) -> tuple[int, ...] | None:
        """The axes of an array, slowest first, in the order in which its chunks are read with the least work; None: its
        own."""
        reader = self._readers[tensor.source]
        assert isinstance(reader, ArrayReader)
        return reader.order(tuple(tensor.name.split("/")), stored.dtype)

    def read_for_sums(self, missing: tuple[str, tuple[tuple[int, int, int], ...]]) -> None:
        """As `ArrayReader.read_for_sums`, of whichever source has chunks."""
        next(r for r in self._readers if isinstance(r, ArrayReader)).read_for_sums(missing)

    @property
    def bytes_read(self) -> int:
        """Bytes read of files, and of chunks as they are decoded."""
        return sum(r.bytes_read for r in self._readers)

    @property
    def from_disk(self) -> bool:
        """Whether anything was read past the page cache."""
        return any(r.from_disk for r in self._readers if not isinstance(r, ArrayReader))

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
