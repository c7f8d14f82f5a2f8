"""Where the chunks of a checkpoint lie, for those arrays whose chunks are nothing but their elements' bytes.

    manifest ─ nodes ─► key -> bytes of a file     OCDBT, decoded by TensorStore (`ts.ocdbt.dump`)
    <array>/zarr.json ─► shape, chunks, codecs     zarr v3

An array is plain whose codecs are `bytes`, low bytes first, alone or after a `transpose`, or within `sharding_indexed`
(as Orbax stores what it does not compress), and whose fill value is zero. Of those, chunks are known here by cell, the
row-major number in the array's grid, and `ckptc.storage.checkpoint.orbax_chunks` reads them from their files. Every other array, and
every checkpoint whose database cannot be listed, is left to TensorStore, which then says what is wrong.

Nothing here is trusted: what lies where is compared with the files' sizes when it is read. Memory: 32 bytes for each
chunk, and one decoded node at a time.

Formats: TensorStore's documentation, "ocdbt Key-Value Store driver", "Storage format", and "zarr3 Driver"; zarr v3's
specification, with its codecs `bytes`, `transpose` and `sharding_indexed` (zarr-specs.readthedocs.io).
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import InputError
from ckptc.ir.source import SourceFile
from ckptc.storage.formats.zarr3 import DTYPES, bytes_codec
from ckptc.storage.source.files import open_regular, resolve

MOST = 1 << 18  # keys of a database that are listed: 100,000 take about a second
MOST_INLINE = 16 << 20  # bytes of chunks that lie in the index itself
INLINE = -1  # instead of the number of a chunk's file
_SHARD_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_ZEROS = ("0", "0.0", "false", "[0.0, 0.0]")

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a plain array is stored."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    order: tuple[int, ...]  # a chunk's axes in the order in which they are stored, slowest first
    shard: tuple[int, ...] | None  # chunks that lie together behind one key, with an index of their own; None: single

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of what one key holds."""
        return self.shard or self.chunk


@dataclass(frozen=True, slots=True)
class PlainArray:
    """A plain array, and where each of its keys' values is; those that are nowhere are zeros."""

    layout: Layout
    cells: Numbers  # int64[n], increasing
    files: Numbers  # int64[n]: positions in `PlainIndex.files`, or INLINE
    offsets: Numbers  # int64[n]: bytes from the start of the file, or in `PlainIndex.inline`
    lengths: Numbers  # int64[n]: bytes


@dataclass(frozen=True)
class PlainIndex:
    """The plain arrays of one checkpoint, by their names in the store."""

    files: tuple[SourceFile, ...] = ()  # below the items; without digests, and of size -1 where there is none
    inline: bytes = b""  # values that the index itself holds, one after the other
    arrays: Mapping[str, PlainArray] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "files": [(f.name, f.size) for f in self.files],
            "inline": self.inline.hex(),
            "arrays": {
                name: [
                    [a.layout.shape, a.layout.dtype, a.layout.chunk, a.layout.order, a.layout.shard],
                    *(column.tobytes().hex() for column in (a.cells, a.files, a.offsets, a.lengths)),
                ]
                for name, a in self.arrays.items()
            },
        }

    @staticmethod
    def of(record: Mapping[str, Any]) -> PlainIndex:
        """What was recorded."""
        arrays = {}
        for name, (layout, *columns) in record["arrays"].items():
            shape, dtype, chunk, order, shard = layout
            numbers = [np.frombuffer(bytes.fromhex(c), dtype=np.int64) for c in columns]
            arrays[name] = PlainArray(
                Layout(tuple(shape), dtype, tuple(chunk), tuple(order), None if shard is None else tuple(shard)),
                *numbers,
            )
        files = tuple(SourceFile(name, size, "") for name, size in record["files"])
        return PlainIndex(files, bytes.fromhex(record["inline"]), arrays)


def list_chunks(items: Path, names: Sequence[str]) -> PlainIndex:
    """Lists those of the arrays `names` of the OCDBT database in `items` that are plain; none where the database is
    damaged, is none, or is too large. Uses TensorStore, in this process.
    """
    try:
        return _List(items, names).index()
    except Exception:  # of TensorStore, which has no common class, or of fields that are not there
        return PlainIndex()


class _List:
    """A listing under way."""

    def __init__(self, items: Path, names: Sequence[str]) -> None:
        import tensorstore as ts  # here: reading plain arrays does not need it

        self._ts, self._items = ts, items
        base = {"driver": "file", "path": f"{items.resolve()}/"}
        self._base = ts.KvStore.open(base).result()
        reading = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        texts = [(name, reading.read(f"{name}/zarr.json")) for name in names]
        found = ((name, layout_of(bytes(text.result().value))) for name, text in texts)
        self._layouts = {name: layout for name, layout in found if layout is not None}
        self._rows = {name: array("q") for name in self._layouts}  # four numbers for each key: as of `PlainArray`
        self._files: dict[str, int] = {}  # by base and name, as the database writes them
        self._inline = bytearray()

    def index(self) -> PlainIndex:
        if not self._layouts:
            return PlainIndex()
        for key, value in self._entries():
            name, _, at = key.decode().rpartition("/c")
            if name not in self._layouts:
                continue
            place = self._inlined(value) if isinstance(value, bytes) else self._place(value)
            self._rows[name].extend((_cell(at, self._layouts[name]), *place))
        arrays = {}
        for name, rows in self._rows.items():
            table = np.array(rows, dtype=np.int64).reshape(-1, 4)
            table = table[np.argsort(table[:, 0], kind="stable")]
            if (np.diff(table[:, 0]) > 0).all() and (table[:, 2:] >= 0).all():
                arrays[name] = PlainArray(self._layouts[name], *(np.ascontiguousarray(c) for c in table.T))
        return PlainIndex(tuple(map(self._sized, self._files)), bytes(self._inline), arrays)

    def _inlined(self, value: bytes) -> tuple[int, int, int]:
        at = len(self._inline)
        self._inline += value
        if len(self._inline) > MOST_INLINE:
            raise ValueError("too many values lie in the index")
        return INLINE, at, len(value)

    def _place(self, text: str) -> tuple[int, int, int]:
        """From `value:<base>:<file>:<offset>:<length>`, the file's number, the offset and the length."""
        file, offset, length = text.rsplit(":", 2)
        return self._files.setdefault(file, len(self._files)), int(offset), int(length)

    def _entries(self) -> Iterator[tuple[bytes, bytes | str]]:
        """Every key with its value, or the text that says where that is. ValueError where the tree is none."""
        version = self._ts.ocdbt.dump(self._base).result()["versions"][-1]
        nodes, known, keys = [(version["root"]["location"], b"", version["root_height"])], set(), 0
        while nodes:
            location, prefix, height = nodes.pop()
            if location in known:
                raise ValueError("a node is there twice: no tree, and perhaps without end")
            known.add(location)
            node = self._ts.ocdbt.dump(self._base, location).result()
            keys += len(node["entries"])
            if node["height"] != height or keys > MOST:
                raise ValueError("no tree, or too large a one")
            for entry in node["entries"]:
                if height:
                    nodes.append((entry["location"], prefix + entry["subtree_common_prefix"], height - 1))
                elif "inline_value" in entry:
                    yield prefix + entry["key"], entry["inline_value"]
                else:
                    yield prefix + entry["key"], entry["indirect_value"]

    def _sized(self, text: str) -> SourceFile:
        """A file as it is now, from `value:<base>:<file>`, in which other characters than letters and a few more are
        written as `%` and two hex digits. Reading it asks whether it is still so large.
        """
        kind, base, file = text.split(":")
        if kind != "value":
            raise ValueError(f"no value: {text}")
        name, size = unquote_to_bytes(base + file).decode(), -1
        with suppress(InputError):  # whoever reads the file is told
            descriptor, size = open_regular(resolve(self._items, name), name)
            os.close(descriptor)
        return SourceFile(name, size, "")


def layout_of(text: bytes) -> Layout | None:
    """What a `zarr.json` says, if the array is plain."""
    try:
        found = json.loads(text)
        names = {"zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs"}
        optional = {"fill_value", "attributes", "dimension_names"}
        if not names <= found.keys() or found.keys() - names - optional:
            return None
        dtype, codecs = found["data_type"], found["codecs"]
        shape, chunk = _sizes(found["shape"], 0), _regular(found["chunk_grid"])
        nested = found["chunk_key_encoding"]
        separator = nested.pop("configuration", {}).get("separator", "/")
        if found["zarr_format"] != 3 or (nested, separator) != ({"name": "default"}, "/"):
            return None
        if dtype not in DTYPES or len(chunk) != len(shape) or json.dumps(found["fill_value"]) not in _ZEROS:
            return None
        shard = None
        if len(codecs) == 1 and codecs[0]["name"] == "sharding_indexed":
            sharding = codecs[0]["configuration"]
            if sharding.pop("index_location", "end") != "end" or sharding.pop("index_codecs") != _SHARD_INDEX:
                return None
            shard, chunk = chunk, _sizes(sharding["chunk_shape"], 1)
            if len(chunk) != len(shard) or any(s % c for s, c in zip(shard, chunk, strict=True)):
                return None
            codecs = sharding["codecs"]
        order = tuple(range(len(shape)))
        if len(codecs) == 2 and codecs[0]["name"] == "transpose":
            order = _sizes(codecs[0]["configuration"]["order"], 0)
            codecs = codecs[1:]
        if sorted(order) != list(range(len(shape))) or codecs not in ([bytes_codec(dtype)], [_LITTLE]):
            return None
        return Layout(shape, dtype, chunk, order, shard)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


_LITTLE = bytes_codec("int16")


def _regular(grid: Mapping[str, Any]) -> tuple[int, ...]:
    if grid["name"] != "regular":
        raise ValueError("another grid")
    return _sizes(grid["configuration"]["chunk_shape"], 1)


def _sizes(values: Any, least: int) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int or not least <= v < 1 << 62 for v in values):
        raise ValueError("not sizes")
    if prod(max(1, v) for v in values) >= 1 << 62:
        raise ValueError("too large")
    return tuple(values)


def _cell(key: str, layout: Layout) -> int:
    """The cell of a key's end, `/0/3`. ValueError for what no array of this layout has."""
    index = [int(i) for i in key.split("/")[1:]]
    if "".join(f"/{i}" for i in index) != key:
        raise ValueError(f"no key of a chunk: {key}")
    cell = 0
    for i, n, c in zip(index, layout.shape, layout.stored, strict=True):
        if not 0 <= i < -(-n // c):
            raise ValueError(f"no chunk of the array: {key}")
        cell = cell * -(-n // c) + i
    return cell
