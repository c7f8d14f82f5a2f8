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
        linked/<file>                source files that hold chunks as they are (`ckptc.io.links`)

Each process appends its chunks to one data file through an `ItemsWriter`, in any order and from any thread; a
chunk is then known by its key, offset and length. `close` writes the process's index. `finish` reads the
indexes of all processes back through TensorStore, proves that they hold every chunk exactly once, and writes
the index over all of them and the metadata. `commit` makes the directory durable and names it.

Memory: 10 bytes for each chunk of the checkpoint (18 where they are compressed), and one encoded index, about 13 bytes for each chunk.
File names, JSON fields and their values are what orbax-checkpoint 0.12.8 writes for MaxText's train state.
"""

from __future__ import annotations

import heapq
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from ckptc.diagnostics import fail
from ckptc.io import ocdbt, zarr3
from ckptc.io.bulk import BulkFile, place
from ckptc.io.compression import NONE, Encoder
from ckptc.io.links import LINKED, LinkedChunks
from ckptc.io.orbax_metadata import ONE_DEVICE, ArraySpec, Mesh, array_metadatas, sharding_metadata, tree_metadata

# Orbax lets nodes grow to 100 MB, and reads with a cache of 100 MB for all of them: a node near that size is
# evicted and decoded again and again (650,000 keys, 200 random reads: 27 s; with nodes of 1 MiB, 0.05 s).
NODE_BYTES = 1 << 20

_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_BUSY = -2  # instead of the offset of a chunk that is being written


class Entry(NamedTuple):
    """A chunk in the data file of its process: what a journal records."""

    key: str  # "<array name>/c/<index>/…"
    offset: int  # bytes from the start of the file
    length: int  # bytes


@dataclass(frozen=True, slots=True)
class WriterState:
    """What an `ItemsWriter` has written. A new writer that is given it goes on from there."""

    file: str  # the data file's name, 32 hex digits
    entries: tuple[Entry, ...]


class ItemsWriter:
    """One process's part of `<directory>/items`: a data file that grows chunk by chunk, and its index.

    `directory` is the unfinished checkpoint, what `commit` will rename. Without `resume`, what this process
    left there before is deleted; with it, the data file is cut back to the end of the last recorded chunk.

    Raises:
        ValueError: arrays that zarr or the tree cannot hold; `resume` records chunks that they do not have.
        RuntimeError: `resume` records chunks that the data file does not have.
    """

    def __init__(
        self,
        directory: Path,
        arrays: Sequence[ArraySpec],
        *,
        process: int = 0,
        resume: WriterState | None = None,
    ) -> None:
        self._chunks = _chunks(arrays)
        self._root = directory / "items" / f"ocdbt.process_{process}"
        self._lock = threading.Lock()
        self._thread = threading.local()  # each has an encoder
        self._closed = False
        self._end = 0  # of the data file, bytes
        for key, offset, length in resume.entries if resume else ():
            self._chunks.add(key, offset, length, 0)
            self._end = max(self._end, offset + length)
        if resume is None:
            shutil.rmtree(self._root, ignore_errors=True)
        self.file = resume.file if resume else secrets.token_hex(16)
        (self._root / "d").mkdir(parents=True, exist_ok=True)
        self._data = BulkFile(self._root / "d" / self.file)
        if (size := self._data.size) < self._end:
            self._data.abandon()
            raise RuntimeError(f"{self.file} has {size} bytes, the chunks recorded in it end at {self._end}")
        self._data.truncate(self._end)

    def write_chunk(self, array: int, index: tuple[int, ...], data: memoryview | npt.NDArray[Any]) -> Entry:
        """Append a chunk, from any thread, and say where it is.

        `array`: position in `arrays`; `index`: position in the array's grid; `data`: what
        `zarr3.Array.data` takes, written from where it is unless the array is compressed.

        Raises:
            ValueError: data of another size or type, or an index outside the grid.
            RuntimeError: the chunk is written already, or the writer is closed.
        """
        a, offsets = self._chunks.arrays[array], self._chunks.offsets[array]
        cell, view = a.cell(index), a.data(index, data)
        if a.compression != NONE:
            if not hasattr(self._thread, "encoder"):
                self._thread.encoder = Encoder()
            view = self._thread.encoder.encode(a.compression, view, a.itemsize)
        length = view.nbytes
        with self._lock:
            if self._closed or offsets[cell] != zarr3.ABSENT:
                raise RuntimeError("closed" if self._closed else f"{a.key(index)} is written already")
            offsets[cell] = _BUSY
            offset = place(self._end, length)
            self._end = offset + length
        try:
            self._data.write(offset, view)
        except BaseException:
            offsets[cell] = zarr3.ABSENT
            raise
        self._chunks.put(array, cell, offset, length)
        return Entry(a.key(index), offset, length)

    def sync(self) -> None:
        """Make the chunks written so far durable: to be done before a journal records them."""
        self._data.sync()

    def entries(self) -> Iterator[Entry]:
        """The chunks written so far, array by array, cell by cell."""
        for key, offset, length in self._chunks.by_cell():
            if offset >= 0:
                yield Entry(key, offset, length)

    def state(self) -> WriterState:
        """What a new writer needs to go on where this one is."""
        return WriterState(self.file, tuple(self.entries()))

    def close(self) -> None:
        """Make the data durable and write the index. A process that wrote no chunk leaves nothing behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._data.close()
        if not self._end:
            shutil.rmtree(self._root)
            return
        for stale in (self._root / "d").iterdir():  # an index that an interrupted `close` left
            if stale.name != self.file:
                stale.unlink()
        file = ocdbt.DataFile(b"", f"d/{self.file}".encode())
        _write_database(self._root, _entries(self._chunks, [file]))


def finish(
    directory: Path,
    arrays: Sequence[ArraySpec],
    *,
    custom_metadata: Mapping[str, Any],
    step: int = 0,
    processes: int = 1,
    final: Path | None = None,
    mesh: Mesh = ONE_DEVICE,
    started: int | None = None,
    linked: Sequence[LinkedChunks] = (),
    linked_files: Sequence[str] = (),
) -> None:
    """Join what `processes` closed writers left in `directory` into a checkpoint; only its name is missing.

    `custom_metadata`: a JSON object for `_CHECKPOINT_METADATA`. `final`: the directory that commit markers
    name, by default `directory`. `started`: when the conversion began, nanoseconds since the Unix epoch.
    `mesh`: see `sharding_metadata`. `linked`: chunks that no process wrote; `linked_files`: the names below
    `items/linked` of the files that they lie in. May be called again after it failed or was interrupted.

    Raises:
        RuntimeError: a chunk is missing, is there twice, or is not as `arrays` has it; an open writer.
        ValueError: TensorStore cannot decode an index.
    """
    chunks, items = _chunks(arrays), directory / "items"
    files: list[ocdbt.DataFile] = []
    for path in sorted(items.glob("ocdbt.process_*")):
        if int(path.name.rpartition("_")[2]) >= processes:
            raise RuntimeError(f"{path.name} is there, but only {processes} processes took part")
        _collect(path, chunks, files)
    first = len(files)
    files += [ocdbt.DataFile(f"{LINKED}/".encode(), name.encode()) for name in linked_files]
    for some in linked:
        chunks.place(some.array, some.cells, some.offsets, some.files + first)
    missing = [key for key, offset, _ in chunks.by_cell() if offset < 0]
    if missing:
        raise RuntimeError(f"{len(missing)} chunks were not written, the first is {missing[0]}")

    shutil.rmtree(items / "d", ignore_errors=True)
    scalar = [  # the leaf `step`: Orbax stores it as an int64 without axes
        ocdbt.Entry(b"step/c", step.to_bytes(8, "little", signed=True)),
        ocdbt.Entry(b"step/zarr.json", zarr3.array_metadata((), "int64", ())),
    ]
    _write_database(items, heapq.merge(_entries(chunks, files), scalar))

    now = time.time_ns()
    checkpoint = {
        "item_handlers": {"items": _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now if started is None else started,
        "commit_timestamp_nsecs": now,
        "custom_metadata": dict(custom_metadata),
    }
    final = final or directory
    sharding = sharding_metadata(arrays, mesh)
    texts = {
        "items/_METADATA": json.dumps(tree_metadata(arrays)),
        "items/_sharding": json.dumps(sharding, separators=(",", ":")),
        "items/array_metadatas/process_0": json.dumps(array_metadatas(arrays)),
        "items/commit_success.txt": f"Checkpoint commit was successful to {final / 'items'}",
        "_CHECKPOINT_METADATA": json.dumps(checkpoint),
        "commit_success.txt": f"Checkpoint commit was successful to {final}",
    }
    for name, text in texts.items():
        _write(directory / name, text.encode())


def make_durable(directory: Path) -> None:
    """Has the system write all of a directory to the disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def commit(partial: Path, final: Path) -> None:
    """Make everything in `partial` durable, then give it its final name: after a crash, all is there or none.

    Raises:
        InputError: `output-exists`: there is something at `final`.
    """
    if final.exists():
        raise fail("output-exists", f"the output `{final}` exists", help="choose another one, or remove it")
    make_durable(partial)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(partial, final)
    _sync(final.parent)
    _sync(partial.parent)


def _chunks(specs: Sequence[ArraySpec]) -> zarr3.Chunks:
    for a in specs:
        if not all(a.path) or a.path[:1] in ((), ("step",), ("opt_state",)):
            raise ValueError(f"{a.path} cannot be the path of an array beside `step` and `opt_state`")
        if len(a.partition) != len(a.shape):
            raise ValueError(f"{a.name} has shape {a.shape} and partition {a.partition}")
    return zarr3.Chunks(
        zarr3.Array(a.name, a.shape, a.dtype, a.chunk, a.order, compression=a.compression) for a in specs
    )


def _collect(root: Path, chunks: zarr3.Chunks, files: list[ocdbt.DataFile]) -> None:
    """Add to `chunks` and `files` what one process wrote, as TensorStore decodes it from the index."""
    import tensorstore as ts  # here, since processes that only move bytes start without it

    if not (root / "manifest.ocdbt").exists():
        raise RuntimeError(f"the writer of {root.name} was not closed")
    metadata = {a.metadata_key: a.metadata for a in chunks.arrays}
    known: dict[str, tuple[int, int]] = {}  # the process's files: number, bytes
    store = ts.KvStore.open({"driver": "file", "path": f"{root}/"}).result()
    nodes = [(ts.ocdbt.dump(store).result()["versions"][-1]["root"]["location"], b"")]
    while nodes:
        location, prefix = nodes.pop()
        node = ts.ocdbt.dump(store, location).result()
        for entry in node["entries"]:
            if node["height"]:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
                continue
            key = (prefix + entry["key"]).decode()
            if "inline_value" in entry:
                if metadata.get(key) != entry["inline_value"]:
                    raise RuntimeError(f"{root.name}: {key} is not that of the arrays to finish")
                continue
            # "value:<base>:<file>:<offset>:<length>", the base empty in a database of its own
            file, offset, length = entry["indirect_value"].removeprefix("value::").rsplit(":", 2)
            if file not in known:
                known[file] = len(files), (root / file).stat().st_size
                files.append(ocdbt.DataFile(f"{root.name}/".encode(), file.encode()))
            number, size = known[file]
            if int(offset) + int(length) > size:
                raise RuntimeError(f"{root.name}: {key} ends beyond the {size} bytes of {file}")
            try:
                chunks.add(key, int(offset), int(length), number)
            except ValueError as error:
                raise RuntimeError(f"{root.name}: {error}") from None


def _entries(chunks: zarr3.Chunks, files: Sequence[ocdbt.DataFile]) -> Iterator[ocdbt.Entry]:
    """The chunks that are there, and `zarr.json` of the arrays that have any, in the order of keys."""
    for a, there in chunks.by_key():
        for key, offset, length, file in there:
            yield ocdbt.Entry(key, ocdbt.Location(files[file], offset, length))
        if there or not a.chunks:
            yield ocdbt.Entry(a.metadata_key.encode(), a.metadata)


def _write_database(root: Path, entries: Iterable[ocdbt.Entry]) -> None:
    """Write the nodes and the manifest of an OCDBT database; its values are in place already."""
    nodes = f"d/{secrets.token_hex(16)}"
    tree = ocdbt.encode_tree(entries, ocdbt.DataFile(b"", nodes.encode()), max_node_bytes=NODE_BYTES)
    _write(root / nodes, *tree.nodes)
    config = ocdbt.Config(secrets.token_bytes(16))
    _write(root / "manifest.ocdbt", ocdbt.encode_manifest(config, tree, time.time_ns()))


def _write(path: Path, *parts: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(parts)
    _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
