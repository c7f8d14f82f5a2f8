"""zarr v3 arrays as TensorStore stores them: the text of `zarr.json`, chunks' keys, places and bytes.

Fields: zarr v3's core specification, "Array metadata", "Regular grids" and "Chunk key encoding". The text
(keys in alphabetical order, no spaces, the fill value written out) is TensorStore's own. Orbax nests chunks
in a `sharding_indexed` codec; here a chunk is a plain chunk, which every zarr v3 reader takes, and which is
nothing but the elements' bytes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ckptc.storage.formats.compression import NONE, codecs

_NUMPY_TYPES = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *(f"float{bits}" for bits in (16, 32, 64)),
    *(f"complex{bits}" for bits in (64, 128)),
)
_ML_TYPES = (
    "bfloat16",
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)
# TensorStore's zarr3 driver spells its data types as numpy and ml_dtypes do.
DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in _NUMPY_TYPES},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_TYPES},
}
ABSENT = -1  # instead of a chunk's offset

_FILL_VALUES: dict[str, Any] = {"b": False, "i": 0, "u": 0, "c": [0.0, 0.0]}  # by numpy's kind; else 0.0


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a zarr data type. ValueError when TensorStore's zarr v3 has no such type."""
    if name not in DTYPES:
        raise ValueError(f"`{name}` is not a zarr v3 data type; known are {', '.join(sorted(DTYPES))}")
    return DTYPES[name]


def bytes_codec(dtype: str) -> dict[str, Any]:
    """The codec that stores elements as their little-endian bytes; single bytes have no order to state."""
    if numpy_dtype(dtype).itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def transpose_codec(order: Sequence[int]) -> dict[str, Any]:
    """The codec that puts a chunk's axes in another order, before they are stored row-major: slowest first."""
    return {"name": "transpose", "configuration": {"order": list(order)}}


def array_metadata(
    shape: Sequence[int], dtype: str, chunk: Sequence[int], *, codecs: Sequence[dict[str, Any]] | None = None
) -> bytes:
    """The `zarr.json` of an array, UTF-8.

    `shape`, `chunk`: elements along each axis, of the array and of a chunk of its regular grid.
    `codecs`: zarr's codec list; by default the `bytes` codec alone.

    Raises:
        ValueError: an unknown dtype, or a chunk with an axis below 1 or of another number of axes.
    """
    if len(shape) != len(chunk) or min(chunk, default=1) < 1:
        raise ValueError(f"chunks of shape {tuple(chunk)} do not fit an array of shape {tuple(shape)}")
    metadata = {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [bytes_codec(dtype)] if codecs is None else list(codecs),
        "data_type": dtype,
        "fill_value": _FILL_VALUES.get(numpy_dtype(dtype).kind, 0.0),
        "node_type": "array",
        "shape": list(shape),
        "zarr_format": 3,
    }
    return json.dumps(metadata, separators=(",", ":"), sort_keys=True).encode()


def grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    """The number of chunks along each axis; the last one of an axis may reach beyond the array."""
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def chunk_key(index: Sequence[int]) -> str:
    """The key of a chunk below its array ("default" encoding): `c/0/3`, or `c` for an array without axes."""
    return "/".join(("c", *map(str, index)))


class Array:
    """An array: its chunks in the grid, in the key space, as bytes before they are compressed.

    A chunk's cell is the row-major number of its index in the grid. `order`: the axes, slowest first, in the order
    that a chunk's elements are stored in; by default the array's own.

    Raises:
        ValueError: as `array_metadata`, or a name that chunk keys cannot begin with.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        chunk: Sequence[int],
        order: Sequence[int] | None = None,
        compression: str = NONE,
    ) -> None:
        if not name or "/" in name:
            raise ValueError(f"`{name}` cannot be the name of an array: it is empty or has a slash")
        self.name = name
        self.shape = tuple(shape)
        self.chunk = tuple(chunk)
        self.metadata_key = f"{name}/zarr.json"
        self.order = None if order is None or list(order) == list(range(len(order))) else tuple(order)
        self.compression = compression
        before = [transpose_codec(self.order)] if self.order else []
        after = codecs(compression, numpy_dtype(dtype).itemsize)
        self.metadata = array_metadata(shape, dtype, chunk, codecs=[*before, bytes_codec(dtype), *after])
        self.grid = grid(shape, chunk)
        self.chunks = math.prod(self.grid)
        self.itemsize = numpy_dtype(dtype).itemsize
        self.chunk_bytes = math.prod(chunk) * self.itemsize  # chunks at the edge are whole too

    def key(self, index: Sequence[int]) -> str:
        """The chunk's key in the store, e.g. `params.params.w/c/0/3`."""
        return f"{self.name}/{chunk_key(index)}"

    def keys(self) -> Iterator[str]:
        """The key of every chunk, in the order of cells."""
        axes = [[f"/{i}" for i in range(n)] for n in self.grid]
        return (f"{self.name}/c" + "".join(index) for index in itertools.product(*axes))

    def cell(self, index: Sequence[int]) -> int:
        """The cell of a chunk. ValueError when the index is outside the grid."""
        cell = 0
        for i, n in zip(index, self.grid, strict=True):
            if not 0 <= i < n:
                raise ValueError(f"chunk {tuple(index)} of {self.name} is outside the grid {self.grid}")
            cell = cell * n + i
        return cell

    def data(self, index: Sequence[int], data: memoryview | npt.NDArray[Any]) -> memoryview:
        """The bytes of a chunk, not copied if `data` has them as they are.

        `data`: all bytes of a whole chunk, as they are stored; or an ndarray of the chunk's shape; or one of the part of the
        chunk that lies inside the array, which is padded to a whole chunk with the fill value, zero.

        Raises:
            ValueError: `data` is none of these.
        """
        if isinstance(data, np.ndarray):
            inside = tuple(min(c, n - i * c) for n, c, i in zip(self.shape, self.chunk, index, strict=True))
            fits = data.itemsize == self.itemsize and data.dtype.byteorder != ">"
            if not fits or data.shape not in (self.chunk, inside):
                raise ValueError(
                    f"chunk {tuple(index)} of {self.name} is {self.chunk} or {inside} elements of "
                    f"{self.itemsize} bytes, low bytes first, not {data.shape} of {data.dtype.str}"
                )
            if data.shape != self.chunk:
                whole = np.zeros(self.chunk, dtype=data.dtype)
                whole[tuple(map(slice, inside))] = data
                data = whole
            if self.order:
                data = data.transpose(self.order)
            # As uint8, since ml_dtypes' types have no buffers.
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        view = data.cast("B")
        if view.nbytes != self.chunk_bytes:
            raise ValueError(f"chunk {tuple(index)} of {self.name} has {self.chunk_bytes} bytes, not {view.nbytes}")
        return view


class Chunks:
    """Where the chunks of a store's arrays are: of each array, by cell, an offset, a file's number and a length.

    Offsets are in bytes; one below zero says that the chunk is nowhere. Memory: 12 bytes for each chunk, of arrays
    that are compressed 20.

    Raises:
        ValueError: two arrays of one name.
    """

    def __init__(self, arrays: Iterable[Array]) -> None:
        self.arrays = tuple(arrays)
        self.offsets = [np.full(a.chunks, ABSENT, dtype=np.int64) for a in self.arrays]
        self._files = [np.zeros(a.chunks, dtype=np.int32) for a in self.arrays]
        self._lengths = [np.zeros(a.chunks, dtype=np.int64) if a.compression != NONE else None for a in self.arrays]
        self._by_name = {a.name: i for i, a in enumerate(self.arrays)}
        if len(self._by_name) != len(self.arrays):
            raise ValueError("two arrays have the same name")

    def locate(self, key: str) -> tuple[int, int]:
        """The position of the array and the cell of the chunk of this key. ValueError when there is none."""
        name, *index = key.split("/")
        if name not in self._by_name or index[:1] != ["c"]:
            raise ValueError(f"no array has a chunk {key}")
        array = self._by_name[name]
        return array, self.arrays[array].cell(list(map(int, index[1:])))

    def add(self, key: str, offset: int, length: int, file: int) -> None:
        """Say where a chunk is. ValueError when no array has it, it has another length, or it is known."""
        array, cell = self.locate(key)
        self.check_length(array, key, length)
        if self.offsets[array][cell] != ABSENT:
            raise ValueError(f"{key} is there twice")
        self.put(array, cell, offset, length, file)

    def place(self, array: int, cells: npt.NDArray[Any], offsets: npt.NDArray[Any], files: npt.NDArray[Any]) -> None:
        """Say where some of an array's chunks are: int64[n] each. ValueError when one of them is known."""
        if (self.offsets[array][cells] != ABSENT).any():
            raise ValueError(f"a chunk of {self.arrays[array].name} is there twice")
        self.offsets[array][cells], self._files[array][cells] = offsets, files

    def put(self, array: int, cell: int, offset: int, length: int, file: int) -> None:
        """Say where a chunk is that nobody else writes."""
        lengths = self._lengths[array]
        if lengths is not None:
            lengths[cell] = length
        self._files[array][cell] = file
        self.offsets[array][cell] = offset

    def check_length(self, array: int, key: str, length: int) -> None:
        """ValueError where a chunk of the array cannot be stored in so many bytes."""
        a = self.arrays[array]
        if length < 1 or (a.compression == NONE and length != a.chunk_bytes):
            raise ValueError(f"{key} has {length} bytes, not {a.chunk_bytes}")

    def _columns(self, array: int) -> Iterator[tuple[str, int, int, int]]:
        """Key, offset, length and file of every cell of an array."""
        a, lengths = self.arrays[array], self._lengths[array]
        stored = itertools.repeat(a.chunk_bytes, a.chunks) if lengths is None else lengths.tolist()
        return zip(a.keys(), self.offsets[array].tolist(), stored, self._files[array].tolist(), strict=True)

    def by_cell(self) -> Iterator[tuple[str, int, int, int]]:
        """Every chunk's key, offset, length and file, array by array, cell by cell."""
        for array in range(len(self.arrays)):
            yield from self._columns(array)

    def by_key(self) -> Iterator[tuple[Array, list[tuple[bytes, int, int, int]]]]:
        """The arrays in the order of their keys; of each, key, offset, length and file of the chunks there are."""
        # In keys, names end with a slash: "a.b/…" comes after "a.b.c/…", since a dot sorts before it.
        for number, a in sorted(enumerate(self.arrays), key=lambda item: item[1].metadata_key.encode()):
            yield a, sorted((k.encode(), o, length, f) for k, o, length, f in self._columns(number) if o >= 0)
