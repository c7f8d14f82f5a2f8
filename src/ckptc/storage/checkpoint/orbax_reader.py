"""Orbax checkpoints as training leaves them: listed from their metadata, and read by boxes. `ckptc.storage.checkpoint.steps` finds them.

The arrays lie in an OCDBT database, or in a directory for each. `_METADATA` lists the leaves of the tree with their
keys; an array's own metadata (`zarr.json`, or `.zarray` of zarr v2) says its shape, dtype and chunks. An array is named
by its keys, joined with dots. TensorStore reads any of it; here a box is read chunk by chunk, into memory of the
caller's, so that no more than a few chunks are held besides. Arrays whose chunks are stored as they are, as those are
that ckptc writes, are read from the files themselves (`ckptc.storage.checkpoint.orbax_chunks`), at a third of the cost and without
TensorStore. Formats: orbax-checkpoint 0.11 to 0.12, both of its APIs.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ir.saved import OPTIMIZER, Saved, SavedArray
from ckptc.ir.source import SourceFile
from ckptc.storage.checkpoint.orbax_chunks import PlainReader, Slices, decoded, pieces
from ckptc.storage.checkpoint.orbax_index import PlainIndex, list_chunks
from ckptc.storage.checkpoint.steps import MANIFEST, MAX_JSON, METADATA, STEP_METADATA, Step, find_step
from ckptc.storage.checkpoint.sums import Axes, Noted, Sums, noted
from ckptc.storage.formats.zarr3 import numpy_dtype
from ckptc.storage.source.content import Status, sample_files, statuses
from ckptc.storage.source.files import header_digest, open_regular, pread, refuse, resolve, shown

ARRAY_METADATA = "array_metadatas"
INDEX_CACHE = 100_000_000  # bytes of OCDBT index nodes kept at most: as Orbax itself does
OPEN_MOST = 256  # arrays kept open

_ARRAYS = ("jax.Array", "np.ndarray", "scalar")  # value types with data; other leaves are empty


def open_saved(given: Path, optimizer: bool = False) -> tuple[Saved, Step]:
    """What is saved in `given` or below it, and where that is. Reads metadata only.

    The optimizer's arrays are counted; with `optimizer`, they are listed with the others.

    Raises what `find_step` raises, `orbax-json`, `orbax-array`, and what `open_regular` raises.
    """
    step = find_step(given)
    items = step.items
    files: list[SourceFile] = []
    leaves, zarr3, ocdbt = _tree(items, files)
    reader = ArrayReader(items, zarr3, ocdbt, PlainIndex())
    left = [path for path in leaves if path[0] in OPTIMIZER and not optimizer]
    custom = _custom(step.directory)
    known = noted(custom)
    paths = [path for path in leaves if path[0] not in OPTIMIZER or optimizer]
    arrays = tuple(_in_pieces(a, known.get(a.name)) for a in reader.describe(paths))
    if ocdbt:
        files.append(_identity(items, MANIFEST, weights=True))
    else:
        name = "zarr.json" if zarr3 else ".zarray"
        files += [_identity(items, f"{'.'.join(a.path)}/{name}", weights=True) for a in arrays]
    place = os.path.relpath(items, given)
    place = "" if place == "." else place
    return Saved(tuple(sorted(files, key=lambda f: f.name)), arrays, len(left), custom, place), step


def _in_pieces(array: SavedArray, known: Noted | None) -> SavedArray:
    """With the pieces in which ckptc has written large chunks as its chunks: each is a run of bytes, read alone."""
    if known is None or known.piece is None or len(known.piece) != len(array.chunk):
        return array
    columns = zip(known.piece, array.chunk, array.shape, strict=True)
    fits = all(p <= c and (c % p == 0 or c >= n) for p, c, n in columns)
    return replace(array, chunk=known.piece) if fits else array


def check_saved(items: Path, files: Sequence[SourceFile]) -> None:
    """Raises `source-changed` unless every metadata file is what it was, and describes the same weights."""
    problems: list[Diagnostic] = []
    help = "put the checkpoint back as it was, or compile the plan again from this one"
    for file in files:
        now = _identity(items, file.name, weights=bool(file.content))
        if (now.size, now.header_digest) != (file.size, file.header_digest):
            error = refuse(
                "source-changed",
                f"{shown(file.name)} is not the file the plan was made from",
                f"{file.size} bytes, {file.header_digest}",
                f"{now.size} bytes, {now.header_digest}",
                help,
            )
            problems += error.diagnostics
        elif now.content != file.content:
            message = f"the weights that {shown(file.name)} describes are not those that the plan was made from"
            error = refuse("source-changed", message, f"content {file.content}", f"content {now.content}", help)
            problems += error.diagnostics
    if problems:
        raise InputError(problems)


def list_plain(items: Path) -> PlainIndex:
    """Where the chunks of the arrays of `items` lie that can be read without TensorStore, which this itself uses."""
    leaves, zarr3, ocdbt = _tree(items, [])
    return list_chunks(items, [".".join(path) for path in leaves]) if zarr3 and ocdbt else PlainIndex()


def open_reader(items: Path, plain: PlainIndex | None = None, sums: Sums | None = None) -> ArrayReader:
    """A reader of the arrays of `items`. `plain`: what `list_plain` has found, if it has been asked already; `sums`: what
    is told of the chunks that are read.
    """
    _, zarr3, ocdbt = _tree(items, [])
    return ArrayReader(items, zarr3, ocdbt, list_plain(items) if plain is None else plain, sums)


def noted_sums(items: Path) -> dict[str, Noted]:
    """The checksums that the checkpoint of `items` carries, by array."""
    return noted(_custom(find_step(items).directory))


def _identity(items: Path, name: str, weights: bool = False) -> SourceFile:
    """A metadata file; with `weights`, what tells those that it describes from others, too."""
    data = _read(items, name)
    content = sample_files(items, _described(items, name)) if weights else ""
    return SourceFile(name, len(data), header_digest(data), content)


def _described(items: Path, name: str) -> list[str]:
    """The files that hold what a metadata file describes: of a database, all in directories below the items but Orbax's
    metadata, with the index; of an array, all in its directory."""
    folders = [items / name.rpartition("/")[0]] if name != MANIFEST else [p for p in items.iterdir() if p.is_dir()]
    below = (p for folder in folders if folder.name != ARRAY_METADATA for p in folder.rglob("*"))
    return [p.relative_to(items).as_posix() for p in below if p.is_file()]


def statuses_of(items: Path, files: Sequence[SourceFile]) -> dict[str, Status]:
    """What the system says of metadata files, and of the files with the weights that they describe."""
    names = {f.name for f in files} | {name for f in files if f.content for name in _described(items, f.name)}
    return statuses(items, sorted(names))


def _read(items: Path, name: str) -> bytes:
    descriptor, size = open_regular(resolve(items, name), name)
    try:
        if size > MAX_JSON:
            raise refuse(
                "orbax-json",
                f"{items / name} is too large to be metadata",
                f"at most {MAX_JSON} bytes",
                f"{size} bytes",
                "is it a checkpoint of Orbax?",
            )
        return pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


def _json(items: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_read(items, name))
    except (ValueError, RecursionError) as error:
        raise fail(
            "orbax-json", f"{items / name} is not valid JSON: {error}", help="is the checkpoint whole?"
        ) from None
    if not isinstance(value, dict):
        raise fail("orbax-json", f"{items / name} is not a JSON object", help="is the checkpoint whole?")
    return value


def _custom(step: Path) -> Mapping[str, Any]:
    if not (step / STEP_METADATA).is_file():
        return {}
    custom = _json(step, STEP_METADATA).get("custom_metadata")
    return custom if isinstance(custom, dict) else {}


def _tree(items: Path, files: list[SourceFile]) -> tuple[list[tuple[str, ...]], bool, bool]:
    """The paths of all arrays, and how they are stored: as zarr v3, in OCDBT."""
    ocdbt = (items / MANIFEST).is_file()
    metadata = _json(items, METADATA)
    files.append(_identity(items, METADATA))
    leaves = metadata.get("tree_metadata")
    try:
        assert isinstance(leaves, dict)
        paths = [
            tuple(str(key["key"]) for key in leaf["key_metadata"])
            for leaf in leaves.values()
            if leaf["value_metadata"]["value_type"] in _ARRAYS and not leaf["value_metadata"].get("skip_deserialize")
        ]
    except (AssertionError, KeyError, TypeError):
        raise fail("orbax-json", f"{items / METADATA} lists no tree", help="is the checkpoint whole?") from None
    return [p for p in sorted(paths) if p], bool(metadata.get("use_zarr3", False)), ocdbt


def _reason(error: Exception) -> str:
    """TensorStore's words, without the specification that it ends with, and the lines of its own that older ones add."""
    return re.split(r" \[(?:source locations|tensorstore_spec)=", str(error), maxsplit=1)[0][:300]


def _ocdbt(items: Path, path: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{items.resolve()}/"}
    return {"driver": "ocdbt", "base": base, "path": path, "cache_pool": "cache_pool#index"}


class ArrayReader:
    """Boxes of the arrays of one checkpoint, by the arrays' paths. Not for several threads."""

    def __init__(self, items: Path, zarr3: bool, ocdbt: bool, plain: PlainIndex, sums: Sums | None = None) -> None:
        self._items, self._zarr3, self._ocdbt, self._sums = items, zarr3, ocdbt, sums
        self._plain = PlainReader(items, plain)
        self._open: OrderedDict[tuple[str, ...], Any] = OrderedDict()
        self.bytes_read = 0  # of decoded chunks

    def close(self) -> None:
        """Closes the files that plain arrays lie in."""
        self._plain.close()

    @cached_property
    def _ts(self) -> Any:
        import tensorstore as ts  # here: plain arrays do not need it

        return ts

    @cached_property
    def _context(self) -> Any:
        # No chunk is kept once it has been copied out.
        return self._ts.Context(
            {"cache_pool": {"total_bytes_limit": 0}, "cache_pool#index": {"total_bytes_limit": INDEX_CACHE}}
        )

    def describe(self, paths: Sequence[tuple[str, ...]]) -> Iterator[SavedArray]:
        """What the arrays' own metadata says. Raises `orbax-array`."""
        waiting: deque[tuple[tuple[str, ...], Any]] = deque()
        for path in paths:
            waiting.append((path, self._ts.open(self._spec(path), open=True, context=self._context)))
            if len(waiting) > 64:
                yield self._described(*waiting.popleft())
        for path, future in waiting:
            yield self._described(path, future)

    def _described(self, path: tuple[str, ...], future: Any) -> SavedArray:
        array = self._result(path, future)
        chunk = array.chunk_layout.read_chunk.shape or array.shape
        return SavedArray(path, tuple(array.shape), array.dtype.name, tuple(int(c) for c in chunk))

    def _result(self, path: tuple[str, ...], future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:  # TensorStore raises ValueError, and others for what the system refuses
            name = "/".join(path)
            raise fail(
                "orbax-array",
                f"the array {shown(name)} cannot be read: {_reason(error)}",
                help="is the checkpoint whole?",
            ) from None

    def _spec(self, path: tuple[str, ...]) -> dict[str, Any]:
        name = ".".join(path) + "/"
        store = (
            _ocdbt(self._items, name) if self._ocdbt else {"driver": "file", "path": f"{self._items.resolve()}/{name}"}
        )
        return {"driver": "zarr3" if self._zarr3 else "zarr", "kvstore": store}

    def order(self, path: tuple[str, ...], dtype: str) -> tuple[int, ...] | None:
        """The axes in the order in which a plain array's chunks store them, slowest first, where that is not their own: a
        box in memory of that order is filled without moving elements."""
        return self._plain.order(path) if self._plain.has(path, np.dtype(numpy_dtype(dtype))) else None

    def read(
        self,
        path: tuple[str, ...],
        axes: Sequence[tuple[int, int, int]],
        chunk: Sequence[int],
        out: npt.NDArray[Any],
        in_flight: int,
    ) -> None:
        """Fills `out` with the indices start + i·stride, i below count, of each of `axes`, in pieces of whole chunks.

        `out`: of the counts' shape and the array's dtype, contiguous in any order of its axes. `in_flight`: bytes of chunks that may be held beside it; one
        is always held.
        """

        def note(index: Slices, place: Slices) -> None:
            if self._sums is not None:
                at: Any = (*place, ...)  # with `...` an array without axes stays one
                self._sums.note("/".join(path), index, out[at])

        if self._plain.has(path, out.dtype):
            shape = self._plain.read(path, axes, out, note)
            self.bytes_read += out.itemsize * sum(decoded(index, chunk, shape) for index, _ in pieces(axes, chunk))
            return
        if path not in self._open:
            self._open[path] = self._result(path, self._ts.open(self._spec(path), open=True, context=self._context))
            if len(self._open) > OPEN_MOST:
                self._open.popitem(last=False)
        array = self._open[path]
        if array.rank != len(axes):
            name, help = shown("/".join(path)), "compile the plan again"
            raise fail("orbax-array", f"the array {name} has {array.rank} axes, the plan reads {len(axes)}", help=help)
        target, origin = self._ts.array(out, copy=False, write=True), self._ts.d[:].translate_to[0]
        most = max(1, in_flight // max(1, 2 * prod(chunk) * out.itemsize))  # a chunk is held as stored and as decoded
        pending: deque[tuple[Any, Slices, Slices]] = deque()

        def finish() -> None:
            writing, index, place = pending.popleft()
            self._result(path, writing)
            note(index, place)

        for index, place in pieces(axes, chunk):
            if len(pending) >= most:
                finish()
            pending.append((target[place][origin].write(array[index][origin]), index, place))
            self.bytes_read += out.itemsize * decoded(index, chunk, array.shape)
        while pending:
            finish()

    def read_for_sums(self, missing: tuple[str, Axes]) -> None:
        """Reads a chunk for the sake of its checksum: one of `Sums.missing`."""
        assert self._sums is not None
        name, axes = missing
        array = self._sums.array(name)
        out = np.empty([count for _, _, count in axes], dtype=numpy_dtype(array.dtype))
        self.read(tuple(name.split("/")), axes, array.chunk, out, 0)
