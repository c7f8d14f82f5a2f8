"""An Orbax checkpoint, written at the level of its files.

    <directory>/                     becomes <out>/0 by `commit`
      _CHECKPOINT_METADATA           JSON: which handler reads `items`, times, custom metadata
      commit_success.txt
      items/
        _METADATA                    JSON: the tree's leaves and their types
        _sharding                    JSON: the sharding of each array, names in base64
        array_metadatas/process_0    JSON: shard and chunk shape of each array
        commit_success.txt
        manifest.ocdbt, d/<nodes>    OCDBT: every chunk of every process, by reference
        ocdbt.process_K/             OCDBT: what process K wrote
          manifest.ocdbt, d/<data>, d/<nodes>
        large/chunks                 chunks that are written in pieces, by all processes
        linked/<file>                source files that hold chunks as they are (`ckptc.storage.checkpoint.links`)

Each process appends its chunks to a data file through an `ItemsWriter`, in any order and from any thread; a chunk is
then known by its key, file, offset and length. Large chunks, of which a process makes only pieces at a time, lie in one
file for all, at places that are known beforehand. In an object store, which has no files that grow, a process writes many
(`ckptc.storage.sink.directory` says what a checkpoint's place can do). `close` writes the process's index. `finish` reads the
indexes of all processes back through TensorStore, proves that they hold every chunk exactly once, and writes
the index over all of them and the metadata, the markers of a finished checkpoint last. `ckptc.storage.sink.durable` makes a
local directory durable and names it.

Memory: 12 bytes for each chunk of the checkpoint (20 where they are compressed), and one encoded index, about 13 bytes for each chunk.
File names, JSON fields and their values are what orbax-checkpoint 0.12.8 writes for MaxText's train state.
"""

from __future__ import annotations

import heapq
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptc.storage.checkpoint.links import LINKED, LinkedChunks
from ckptc.storage.formats import ocdbt, zarr3
from ckptc.storage.formats.compression import NONE, Encoder
from ckptc.storage.formats.orbax_metadata import (
    ONE_DEVICE,
    ArraySpec,
    Mesh,
    array_metadatas,
    sharding_metadata,
    tree_metadata,
)
from ckptc.storage.sink.directory import Place
from ckptc.storage.sink.file import BulkFile

# Orbax lets nodes grow to 100 MB, and reads with a cache of 100 MB for all of them: a node near that size is
# evicted and decoded again and again (650,000 keys, 200 random reads: 27 s; with nodes of 1 MiB, 0.05 s).
NODE_BYTES = 1 << 20

_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
LARGE_FILE = "large/chunks"  # below `items`
_BUSY = -2  # instead of the offset of a chunk that is being written


class Entry(NamedTuple):
    """A chunk in a data file of its process: what a journal records."""

    key: str  # "<array name>/c/<index>/…"
    offset: int  # bytes from the start of the file
    length: int  # bytes
    file: int = 0  # of the writer's files, as `WriterState` has them


@dataclass(frozen=True, slots=True)
class LargeChunks:
    """Chunks that are written in pieces, in a file that all writers share."""

    size: int = 0  # bytes of the file; 0 where there is none
    at: Mapping[int, Callable[[Sequence[int]], int]] = field(default_factory=dict)  # of each array that has such
    # chunks, as a position in `arrays`, where in the file a piece begins, by its index in the grid of pieces


NO_LARGE = LargeChunks()


@dataclass(frozen=True, slots=True)
class WriterState:
    """What an `ItemsWriter` has written. A new writer that is given it goes on from there."""

    files: tuple[str, ...]  # the data files' names, 32 hex digits each
    entries: tuple[Entry, ...]


class ItemsWriter:
    """One process's part of a checkpoint's `items`: data files that grow chunk by chunk, and their index.

    `place`: that of the unfinished checkpoint. Without `resume`, what this process left there before is deleted; with
    it, what lies behind the last recorded chunk is.

    Raises:
        ValueError: arrays that zarr or the tree cannot hold; `resume` records chunks that they do not have.
        RuntimeError: `resume` records chunks that the data file does not have.
    """

    def __init__(
        self,
        place: Place,
        arrays: Sequence[ArraySpec],
        *,
        process: int = 0,
        resume: WriterState | None = None,
        large: LargeChunks = NO_LARGE,
    ) -> None:
        self._chunks = _chunks(arrays)
        self._place, self._below = place, f"items/ocdbt.process_{process}/"
        self._lock = threading.Lock()
        self._thread = threading.local()  # each has an encoder
        self._closed = False
        end = 0
        for key, offset, length, file in resume.entries if resume else ():
            self._chunks.add(key, offset, length, file)
            end = max(end, offset + length)
        self.data = place.data(self._below, resume.files if resume else (), end)
        self.large = large
        self._large = place.reserved(f"items/{LARGE_FILE}", large.size) if large.size else None

    def write_chunk(self, array: int, index: tuple[int, ...], data: memoryview | npt.NDArray[Any]) -> Entry | None:
        """Append a chunk, from any thread, and say where it is; or write a piece of a large one where it belongs.

        `array`: position in `arrays`; `index`: position in the array's grid; `data`: what
        `zarr3.Array.data` takes, written from where it is unless the array is compressed.

        Raises:
            ValueError: data of another size or type, or an index outside the grid.
            RuntimeError: the chunk is written already, or the writer is closed.
        """
        if array in self.large.at:
            assert isinstance(data, np.ndarray) and self._large is not None
            self._write_piece(self._large, array, index, data)
            return None
        a, offsets = self._chunks.arrays[array], self._chunks.offsets[array]
        cell, view = a.cell(index), a.data(index, data)
        if a.compression != NONE:
            if not hasattr(self._thread, "encoder"):
                self._thread.encoder = Encoder()
            view = self._thread.encoder.encode(a.compression, view, a.itemsize)
        with self._lock:
            if self._closed or offsets[cell] != zarr3.ABSENT:
                raise RuntimeError("closed" if self._closed else f"{a.key(index)} is written already")
            offsets[cell] = _BUSY
        try:
            file, offset = self.data.append(view)
        except BaseException:
            offsets[cell] = zarr3.ABSENT
            raise
        self._chunks.put(array, cell, offset, view.nbytes, file)
        return Entry(a.key(index), offset, view.nbytes, file)

    def _write_piece(self, file: BulkFile, array: int, index: tuple[int, ...], data: npt.NDArray[Any]) -> None:
        """`data`: the piece, as far as it lies inside the array."""
        order = self._chunks.arrays[array].order
        flat = np.ascontiguousarray(data.transpose(order) if order else data).reshape(-1).view(np.uint8)
        file.write(self.large.at[array](index), flat.data)

    @property
    def eager(self) -> bool:
        """Whether what is written is made durable unasked, while more comes."""
        return self.data.eager

    @eager.setter
    def eager(self, eager: bool) -> None:
        self.data.eager = eager
        if self._large is not None:
            self._large.eager = eager

    def sync(self) -> None:
        """Make the chunks written so far durable: to be done before a journal records them."""
        self.data.sync()
        if self._large is not None:
            self._large.sync()

    def entries(self) -> Iterator[Entry]:
        """The chunks written so far, array by array, cell by cell."""
        for key, offset, length, file in self._chunks.by_cell():
            if offset >= 0:
                yield Entry(key, offset, length, file)

    def state(self) -> WriterState:
        """What a new writer needs to go on where this one is."""
        return WriterState(tuple(self.data.files), tuple(self.entries()))

    def close(self) -> None:
        """Make the data durable and write the index. A process that wrote no chunk leaves nothing behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._large is not None:
            self._large.close()
        if self.data.close():
            files = [ocdbt.DataFile(b"", f"d/{name}".encode()) for name in self.data.files]
            _write_database(self._place, self._below, _entries(self._chunks, files))


def finish(
    place: Place,
    arrays: Sequence[ArraySpec],
    *,
    custom_metadata: Mapping[str, Any],
    final: str,
    step: int = 0,
    writers: Collection[int] | None = None,
    mesh: Mesh = ONE_DEVICE,
    started: int | None = None,
    linked: Sequence[LinkedChunks] = (),
    linked_files: Sequence[str] = (),
    beside: Iterable[tuple[str, bytes]] = (),
    large: Sequence[LinkedChunks] = (),
    large_bytes: int = 0,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Join what closed writers left in `place` into a checkpoint. Of a local directory, only its name is missing then;
    in an object store, the checkpoint is there with the last file that this writes.

    `custom_metadata`: a JSON object for `_CHECKPOINT_METADATA`. `final`: the directory or URL that commit markers name.
    `writers`: the numbers of those that have written something, by default of all that are there. `mesh`: see
    `sharding_metadata`. `started`: when the conversion began, nanoseconds since the Unix epoch. `linked`: chunks that no
    process wrote; `linked_files`: the names below `items/linked` of the files that they lie in. `large`: the large chunks, all
    pieces of which are known to be written, and the size of the file that they lie in. `beside`: other
    files to keep, by their names below `items`. `check` is called before
    what is there makes way, and before the markers: it raises when that must not be. May be called again after it failed
    or was interrupted.

    Raises:
        RuntimeError: a chunk is missing, is there twice, or is not as `arrays` has it; an open writer, or one that is not
            among `writers`; an index that TensorStore cannot decode.
        InputError: what `place` raises.
    """
    chunks = _chunks(arrays)
    files: list[ocdbt.DataFile] = []
    kept: set[str] = set()  # names of what holds chunks and their indexes
    if writers is None:
        found = (re.match("items/ocdbt[.]process_([0-9]+)/", name) for name in place.names("items/ocdbt.process_"))
        writers = {int(match[1]) for match in found if match}
    for number in sorted(writers):
        kept |= _collect(place, number, chunks, files)
    first = len(files)
    files += [ocdbt.DataFile(f"{LINKED}/".encode(), name.encode()) for name in linked_files]
    for some in linked:
        chunks.place(some.array, some.cells, some.offsets, some.files + first)
    if large:
        if not place.holds(f"items/{LARGE_FILE}", large_bytes):
            raise RuntimeError(
                f"{LARGE_FILE} is not there, or shorter than the {large_bytes} bytes that it should hold"
            )
        folder, _, name = LARGE_FILE.rpartition("/")
        for some in large:
            chunks.place(some.array, some.cells, some.offsets, some.files + len(files))
        files.append(ocdbt.DataFile(f"{folder}/".encode(), name.encode()))
    missing = [key for key, offset, _, _ in chunks.by_cell() if offset < 0]
    if missing:
        raise RuntimeError(f"{len(missing)} chunks were not written, the first is {missing[0]}")

    check()
    place.supersede(kept)
    scalar = [  # the leaf `step`: Orbax stores it as an int64 without axes
        ocdbt.Entry(b"step/c", step.to_bytes(8, "little", signed=True)),
        ocdbt.Entry(b"step/zarr.json", zarr3.array_metadata((), "int64", ())),
    ]
    _write_database(place, "items/", heapq.merge(_entries(chunks, files), scalar))

    now = time.time_ns()
    checkpoint = {
        "item_handlers": {"items": _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now if started is None else started,
        "commit_timestamp_nsecs": now,
        "custom_metadata": dict(custom_metadata),
    }
    sharding = sharding_metadata(arrays, mesh)
    texts = {
        "items/_METADATA": json.dumps(tree_metadata(arrays)),
        "items/_sharding": json.dumps(sharding, separators=(",", ":")),
        "items/array_metadatas/process_0": json.dumps(array_metadatas(arrays)),
    }
    markers = {
        "items/commit_success.txt": f"Checkpoint commit was successful to {final}/items",
        "_CHECKPOINT_METADATA": json.dumps(checkpoint),
        "commit_success.txt": f"Checkpoint commit was successful to {final}",
    }
    for name, text in texts.items():
        place.write(name, text.encode())
    for name, content in beside:
        place.write(f"items/{name}", content)
    check()
    for name, text in markers.items():
        place.write(name, text.encode())


def indexed_bytes(place: Place) -> int:
    """Bytes of a checkpoint's chunks and of their index, as the index says itself. Raises what `Place.result` does."""
    import tensorstore as ts

    store = place.result(ts.KvStore.open(place.spec("items/")), "items/")
    root = place.result(ts.ocdbt.dump(store), "items/")["versions"][-1]["root"]
    return int(root["statistics"]["num_tree_bytes"]) + int(root["statistics"]["num_indirect_value_bytes"])


def _chunks(specs: Sequence[ArraySpec]) -> zarr3.Chunks:
    for a in specs:
        if not all(a.path) or a.path[:1] in ((), ("step",), ("opt_state",)):
            raise ValueError(f"{a.path} cannot be the path of an array beside `step` and `opt_state`")
        if len(a.partition) != len(a.shape):
            raise ValueError(f"{a.name} has shape {a.shape} and partition {a.partition}")
    return zarr3.Chunks(
        zarr3.Array(a.name, a.shape, a.dtype, a.chunk, a.order, compression=a.compression) for a in specs
    )


def _collect(place: Place, number: int, chunks: zarr3.Chunks, files: list[ocdbt.DataFile]) -> set[str]:
    """Add to `chunks` and `files` what one process wrote, as TensorStore decodes it from the index. Returns the names of
    the files that hold it, the index included."""
    import tensorstore as ts  # here, since processes that only move bytes start without it

    name = f"ocdbt.process_{number}"
    root, kept = f"items/{name}/", {f"items/{name}/manifest.ocdbt"}
    if not place.holds(f"{root}manifest.ocdbt", 1):
        raise RuntimeError(f"the writer of {name} was not closed")
    metadata = {a.metadata_key: a.metadata for a in chunks.arrays}
    known: dict[str, int] = {}  # the process's files, and their numbers
    ends: dict[str, int] = {}  # where the last chunk of each ends
    store = place.result(ts.KvStore.open(place.spec(root)), root)
    nodes = [(place.result(ts.ocdbt.dump(store), root)["versions"][-1]["root"]["location"], b"")]
    while nodes:
        location, prefix = nodes.pop()
        kept.add(root + _located(location)[0])
        node = place.result(ts.ocdbt.dump(store, location), root)
        for entry in node["entries"]:
            if node["height"]:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
                continue
            key = (prefix + entry["key"]).decode()
            if "inline_value" in entry:
                if metadata.get(key) != entry["inline_value"]:
                    raise RuntimeError(f"{name}: {key} is not that of the arrays to finish")
                continue
            file, offset, length = _located(entry["indirect_value"])
            if file not in known:
                known[file] = len(files)
                files.append(ocdbt.DataFile(f"{name}/".encode(), file.encode()))
            ends[file] = max(ends.get(file, 0), offset + length)
            try:
                chunks.add(key, offset, length, known[file])
            except ValueError as error:
                raise RuntimeError(f"{name}: {error}") from None
    for file, end in ends.items():
        if not place.holds(root + file, end):
            raise RuntimeError(f"{name}: {file} is not there, or ends before the {end} bytes that it should hold")
    return kept | {root + file for file in ends}


def _located(place: str) -> tuple[str, int, int]:
    """File, offset and length in TensorStore's "value:<base>:<file>:<offset>:<length>" or "btreenode:…", the base empty
    in a database of its own."""
    file, offset, length = place.rsplit(":", 2)
    return file.split(":", 2)[2], int(offset), int(length)


def _entries(chunks: zarr3.Chunks, files: Sequence[ocdbt.DataFile]) -> Iterator[ocdbt.Entry]:
    """The chunks that are there, and `zarr.json` of the arrays that have any, in the order of keys."""
    for a, there in chunks.by_key():
        for key, offset, length, file in there:
            yield ocdbt.Entry(key, ocdbt.Location(files[file], offset, length))
        if there or not a.chunks:
            yield ocdbt.Entry(a.metadata_key.encode(), a.metadata)


def _write_database(place: Place, below: str, entries: Iterable[ocdbt.Entry]) -> None:
    """Write the nodes and the manifest of an OCDBT database; its values are in place already."""
    nodes = f"d/{secrets.token_hex(16)}"
    tree = ocdbt.encode_tree(entries, ocdbt.DataFile(b"", nodes.encode()), max_node_bytes=NODE_BYTES)
    place.write(below + nodes, *tree.nodes)
    config = ocdbt.Config(secrets.token_bytes(16))
    place.write(f"{below}manifest.ocdbt", ocdbt.encode_manifest(config, tree, time.time_ns()))
