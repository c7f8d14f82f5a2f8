"""The OCDBT format, encoded: B+tree nodes and manifests as bytes; nothing is read, nothing is written.

An OCDBT database is a directory with a `manifest.ocdbt` and data files under `d/`. The manifest names the
root of a B+tree; its leaves hold keys with either the value itself (inline) or the place of the value in a
data file; interior nodes hold the first key of each child and the child's place. So a program that has
appended its values to a file of its own needs only to say where each one is: `encode_tree` turns sorted
entries into nodes, `encode_manifest` names their root, and any OCDBT reader opens the result.

Layout of every field: the specification in TensorStore's documentation, "ocdbt Key-Value Store driver",
section "Storage format". What it leaves open (order of the data file table, the prefix that a node leaves
out, the size estimate behind `max_decoded_node_bytes`) follows TensorStore's writer: a node of the same entries
is equal to its own, byte for byte. Where one node ends and the next begins is free.

Nodes store columns (all key lengths, all offsets, …), and columns are encoded with numpy: that is what makes
trees of hundreds of thousands of entries a matter of seconds. Nodes are not compressed. A node states its own
compression in its header, so the manifest's configuration, which is for later writers, can be Orbax's.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

MANIFEST_MAGIC = 0x0CDB3A2A
NODE_MAGIC = 0x0CDB20DE
MAX_KEY_LENGTH = 65535  # bytes: TensorStore refuses longer keys
MAX_ARITY = 1024 * 1024  # entries of a node: TensorStore refuses more

_T = TypeVar("_T")

# TensorStore's estimate of a decoded entry, in bytes, without the key and the name of the data file.
_LEAF_ENTRY_BYTES = 16  # with the value itself
_LEAF_REFERENCE_BYTES = 32  # with a place
_INTERIOR_ENTRY_BYTES = 56


class DataFile(NamedTuple):
    """A data file of the database: its path from the database's root is `base + relative`.

    `base` also goes before the paths that nodes in that file refer to. It is empty, or the place of
    another database that this one refers into.
    """

    base: bytes  # e.g. b"ocdbt.process_0/"
    relative: bytes  # e.g. b"d/" and 32 hex digits


class Location(NamedTuple):
    """A run of bytes in a data file."""

    file: DataFile
    offset: int  # bytes from the start of the file
    length: int  # bytes


class Entry(NamedTuple):
    """A key and its value: the bytes themselves, or where they are."""

    key: bytes
    value: bytes | Location


@dataclass(frozen=True, slots=True)
class Statistics:
    """Totals of a subtree, kept by its parent."""

    keys: int
    tree_bytes: int  # encoded nodes, the subtree's own root included
    value_bytes: int  # values stored out of line


@dataclass(frozen=True, slots=True)
class Child:
    """An encoded node, as its parent refers to it."""

    key: bytes  # the first key of the subtree, whole
    prefix: int  # bytes of `key` that all keys of the subtree share and that the node leaves out
    location: Location
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class Tree:
    """An encoded B+tree: `nodes` in the order in which they lie in one data file, the root last."""

    nodes: tuple[bytes, ...]
    root: Child
    height: int  # of the root; 0 when the root is a leaf


@dataclass(frozen=True, slots=True)
class Config:
    """What a manifest says of its database. The defaults are what Orbax's databases say."""

    uuid: bytes  # 16 bytes
    max_inline_value_bytes: int = 1024
    max_decoded_node_bytes: int = 100_000_000
    version_tree_arity_log2: int = 4
    zstd_level: int | None = 0  # None: later writers do not compress


def encode_tree(entries: Iterable[Entry], file: DataFile, *, offset: int = 0, max_node_bytes: int) -> Tree:
    """Encode entries as a B+tree whose nodes will lie one after the other in `file`, from `offset` on.

    Entries come in strictly increasing order of their keys. A node ends before its decoded size, estimated as
    TensorStore does but with its keys whole, exceeds `max_node_bytes`. Of a generator, two leaves are held at a time.

    Raises:
        ValueError: no entries, keys out of order or too long.
    """
    nodes: list[bytes] = []

    def place(node: bytes, key: bytes, prefix: int, keys: int, tree_bytes: int, value_bytes: int) -> Child:
        nonlocal offset
        nodes.append(node)
        location = Location(file, offset, len(node))
        offset += len(node)
        return Child(key, prefix, location, Statistics(keys, tree_bytes + len(node), value_bytes))

    level: list[Child] = []
    last: bytes | None = None
    for leaf, alone in _groups(entries, _leaf_entry_bytes, max_node_bytes, least=1):
        first = leaf[0].key
        if last is not None and first <= last:
            raise ValueError(f"keys are not strictly increasing at {first!r}")
        last = leaf[-1].key
        prefix = 0 if alone else _common(first, last)
        values = sum(e.value.length for e in leaf if isinstance(e.value, Location))
        level.append(place(encode_leaf(leaf, prefix), first, prefix, len(leaf), 0, values))
    if not level:
        raise ValueError("a tree needs at least one entry")
    height = 0
    while len(level) > 1:
        height += 1
        below, level = level, []
        for group, alone in _groups(below, _child_bytes, max_node_bytes, least=2):
            first = group[0].key
            # A node leaves out at most what every child's subtree has in common, and the root nothing.
            common = min(_common(first, group[-1].key), min(c.prefix for c in group))
            prefix = 0 if alone else common
            sums = [c.statistics for c in group]
            keys, tree_bytes = sum(s.keys for s in sums), sum(s.tree_bytes for s in sums)
            node = encode_interior(group, prefix, height)
            level.append(place(node, first, prefix, keys, tree_bytes, sum(s.value_bytes for s in sums)))
    return Tree(tuple(nodes), level[0], height)


def encode_leaf(entries: Sequence[Entry], prefix: int) -> bytes:
    """A node of height 0. `prefix`: how many leading bytes, common to all keys, its parent supplies."""
    places = [e.value for e in entries if isinstance(e.value, Location)]
    inline = [e.value for e in entries if isinstance(e.value, bytes)]
    table, ids = _data_files([p.file for p in places])
    body = [
        b"\0",  # height
        table,
        varints([len(entries)]),
        *_keys([e.key for e in entries], prefix),
        varints([len(e.value) if isinstance(e.value, bytes) else e.value.length for e in entries]),
        bytes([isinstance(e.value, Location) for e in entries]),  # the kind: 0 inline, 1 out of line
        varints([ids[p.file] for p in places]),
        varints([p.offset for p in places]),
        *inline,
    ]
    return _frame(NODE_MAGIC, b"".join(body))


def encode_interior(children: Sequence[Child], prefix: int, height: int) -> bytes:
    """A node of height >= 1. `prefix`: as for leaves, and at most every child's own."""
    table, ids = _data_files([c.location.file for c in children])
    lengths, suffixes, text = _keys([c.key for c in children], prefix)
    body = [
        bytes([height]),
        table,
        varints([len(children)]),
        lengths,
        suffixes,
        varints([c.prefix - prefix for c in children]),
        text,
        varints([ids[c.location.file] for c in children]),
        varints([c.location.offset for c in children]),
        varints([c.location.length for c in children]),
        varints([c.statistics.keys for c in children]),
        varints([c.statistics.tree_bytes for c in children]),
        varints([c.statistics.value_bytes for c in children]),
    ]
    return _frame(NODE_MAGIC, b"".join(body))


def encode_manifest(config: Config, tree: Tree, commit_time: int) -> bytes:
    """The single-file manifest of a database whose only version, generation 1, is `tree`.

    `commit_time`: nanoseconds since the Unix epoch.
    """
    root, statistics = tree.root.location, tree.root.statistics
    table, ids = _data_files([root.file])
    compression = b"\0" if config.zstd_level is None else b"\x01" + struct.pack("<i", config.zstd_level)
    body = [
        config.uuid,
        b"\0",  # manifest kind: single file
        varints([config.max_inline_value_bytes, config.max_decoded_node_bytes]),
        bytes([config.version_tree_arity_log2]),
        compression,
        table,
        varints([1, 1]),  # one version inline, its generation number
        bytes([tree.height]),
        varints([ids[root.file], root.offset, root.length]),
        varints([statistics.keys, statistics.tree_bytes, statistics.value_bytes]),
        struct.pack("<Q", commit_time),
        b"\0",  # no older versions
    ]
    return _frame(MANIFEST_MAGIC, b"".join(body))


def varints(values: Sequence[int]) -> bytes:
    """Unsigned LEB128 of each value: seven bits a byte, low bits first; the top bit says that more follow."""
    v = np.array(values, dtype=np.uint64)
    most = max(values, default=0)
    if most < 128:
        return v.astype(np.uint8).tobytes()
    sizes = np.ones(v.size, dtype=np.int64)
    width = -(-most.bit_length() // 7)
    for k in range(1, width):
        sizes += v >= np.uint64(1 << 7 * k)
    starts = np.cumsum(sizes) - sizes
    out = np.empty(int(sizes.sum()), dtype=np.uint8)
    for k in range(width):
        live = sizes > k
        seven = (v[live] >> np.uint64(7 * k)) & np.uint64(0x7F)
        out[starts[live] + k] = seven | ((sizes[live] > k + 1).astype(np.uint64) << np.uint64(7))
    return out.tobytes()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, reflected polynomial 0x82F63B78) of `data`.

    The data is cut into rows of equal length, all rows advance two bytes a step, then neighbours are joined
    pair by pair: without its initial value the CRC is linear, so crc(a + b) = crc(a + zeros) ^ crc(b).
    """
    if len(data) < 4:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = int(_byte_table()[(crc ^ byte) & 0xFF]) ^ crc >> 8
        return crc ^ 0xFFFFFFFF
    # Rows about as long as there are rows, so that numpy calls are few. Zeros in front change nothing.
    log_width = min(10, len(data).bit_length() // 2 + 2)
    width = 1 << log_width
    log_rows = (-(-len(data) // width) - 1).bit_length()
    padded = np.zeros(width << log_rows, dtype=np.uint8)
    start = padded.size - len(data)
    padded[start:] = np.frombuffer(data, dtype=np.uint8)
    padded[start : start + 4] ^= 0xFF  # the initial value, 0xFFFFFFFF, as a part of the message
    table = _word_table()
    crcs = np.zeros(1 << log_rows, dtype=np.uint32)
    for word in np.ascontiguousarray(padded.view("<u2").reshape(-1, width // 2).T):
        crcs = table[(crcs ^ word) & np.uint32(0xFFFF)] ^ (crcs >> np.uint32(16))
    for k in range(log_rows):
        crcs = _apply(_zeros(log_width + k), crcs[0::2]) ^ crcs[1::2]
    return int(crcs[0]) ^ 0xFFFFFFFF


@functools.cache
def _byte_table() -> npt.NDArray[np.uint32]:
    """The CRC's 256 remainders of one byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0)) ^ (table >> np.uint32(1))
    return table


@functools.cache
def _word_table() -> npt.NDArray[np.uint32]:
    """The CRC's 65,536 remainders of two bytes."""
    one = _byte_table()
    words = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(2):
        words = one[words & 0xFF] ^ (words >> np.uint32(8))
    return words


@functools.cache
def _zeros(log_bytes: int) -> npt.NDArray[np.uint32]:
    """The CRC after 2**log_bytes zero bytes, as 32 columns: what becomes of each single bit."""
    if log_bytes == 0:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        column: npt.NDArray[np.uint32] = _byte_table()[bits & 0xFF] ^ (bits >> np.uint32(8))
        return column
    half = _zeros(log_bytes - 1)
    return _apply(half, half)


def _apply(columns: npt.NDArray[np.uint32], crcs: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A linear map on 32-bit words, given by its columns, applied to each of `crcs`."""
    out = np.zeros_like(crcs)
    for bit in range(32):
        out ^= ((crcs >> np.uint32(bit)) & np.uint32(1)) * columns[bit]
    return out


def _frame(magic: int, body: bytes) -> bytes:
    """Header, body and checksum, the same for nodes and manifests. Version 0, compression 0 (none)."""
    framed = struct.pack(">I", magic) + struct.pack("<Q", len(body) + 18) + b"\0\0" + body
    return framed + struct.pack("<I", crc32c(framed))


def _keys(keys: list[bytes], prefix: int) -> tuple[bytes, bytes, bytes]:
    """The key columns: length shared with the key before (but for the first), length of the rest, the rest.

    Lengths exclude the `prefix` that the parent supplies.
    """
    if any(a >= b for a, b in itertools.pairwise(keys)):
        raise ValueError(f"keys are not strictly increasing between {keys[0]!r} and {keys[-1]!r}")
    longest = max(map(len, keys))
    if longest > MAX_KEY_LENGTH:
        raise ValueError(f"a key of {longest} bytes exceeds the format's {MAX_KEY_LENGTH}")
    shared = [prefix, *_shared_lengths(keys, longest)]
    rest = [key[n:] for key, n in zip(keys, shared, strict=True)]
    return varints([n - prefix for n in shared[1:]]), varints(list(map(len, rest))), b"".join(rest)


def _shared_lengths(keys: list[bytes], longest: int) -> list[int]:
    """For each key but the first, how many leading bytes it shares with the one before it."""
    if longest * len(keys) > 1 << 24:  # keys so long that a table of them would be too big
        return [_common(a, b) for a, b in itertools.pairwise(keys)]
    table = np.array(keys, dtype=f"S{max(1, longest)}").view(np.uint8).reshape(len(keys), -1)
    # One more column, which always differs, ends the comparison with a key that only adds zero bytes.
    differs = np.ones((len(keys) - 1, table.shape[1] + 1), dtype=bool)
    np.not_equal(table[1:], table[:-1], out=differs[:, :-1])
    first = differs.argmax(axis=1).tolist()
    return [min(n, len(a), len(b)) for n, (a, b) in zip(first, itertools.pairwise(keys), strict=True)]


def _data_files(files: Iterable[DataFile]) -> tuple[bytes, dict[DataFile, int]]:
    """The table of the data files that a node refers to, prefix-compressed, and each file's index in it."""
    names = sorted(set(files))
    shared: list[int] = []
    for before, after in itertools.pairwise(names):
        # The shared part reaches into the relative path only where both base paths are the same.
        n = _common(before.base, after.base)
        shared.append(n + _common(before.relative, after.relative) if before.base == after.base else n)
    rest = [(f.base + f.relative)[n:] for f, n in zip(names, [0, *shared], strict=False)]
    columns = [
        varints([len(names)]),
        varints(shared),
        varints(list(map(len, rest))),
        varints([len(f.base) for f in names]),
        *rest,
    ]
    return b"".join(columns), {f: i for i, f in enumerate(names)}


def _common(a: bytes, b: bytes) -> int:
    """The number of leading bytes that two strings share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _leaf_entry_bytes(entry: Entry) -> int:
    key, value = entry
    if isinstance(value, bytes):
        return _LEAF_ENTRY_BYTES + len(key) + len(value)
    file = value.file
    return _LEAF_REFERENCE_BYTES + len(key) + len(file.base) + len(file.relative)


def _child_bytes(child: Child) -> int:
    file = child.location.file
    return _INTERIOR_ENTRY_BYTES + len(child.key) + len(file.base) + len(file.relative)


def _groups(items: Iterable[_T], size: Callable[[_T], int], limit: int, least: int) -> Iterator[tuple[list[_T], bool]]:
    """Cut `items` into nodes of at least `least` items and, beyond that, at most `limit` bytes.

    With each comes whether it is the only one, and so the root: the last group is held back to know it.
    """
    held: list[_T] = []
    group: list[_T] = []
    total = 0
    for item in items:
        n = size(item)
        if (total + n > limit and len(group) >= least) or len(group) == MAX_ARITY:
            if held:
                yield held, False
            held, group, total = group, [], 0
        group.append(item)
        total += n
    if held:
        yield held, False
    if group:
        yield group, not held
