"""What a target array must be, the straight way: whole source tensors, and each op's `forward`, one after the other.

This is what verification holds a checkpoint against, so it shares nothing with the executor: no folded parts, no byte
ranges, no kernel. Tensors come from the safetensors library.

Memory: an array is made a block at a time. An axis that is the same in every node, from the source to the finished
array, and that no op works along, can be restricted everywhere at once: where it counts tensors (layers, experts) a leaf
lists fewer of them, where it is an axis of each tensor a leaf reads a slice, and the ops are the same with smaller sizes.
So a block needs the slices that it is made of, and some copies of itself. Codes are decoded a tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ckptc.diagnostics import fail
from ckptc.ir.graph import Apply, Fill, Leaf, Node, Target
from ckptc.ops.base import Op
from ckptc.ops.rearrange import Rearrange, SizedGroup
from ckptc.ops.types import Axis, OpError, TensorType, itemsize, numpy_dtype
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from ckptc.storage.source.base import Source
from ckptc.storage.source.files import resolve, shown

Array = npt.NDArray[Any]
Box = tuple[tuple[int, int], ...]  # [low, high) for each axis
Ranges = Mapping[str, tuple[int, int]]  # by the name of an axis that counts tensors

BLOCK = 16 << 20  # bytes of target made at once: more gains nothing
# The library's numpy interface has no 8-bit floats. Its names for them, and theirs.
_FLOAT8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


class Tensors:
    """Whole tensors of a checkpoint's files, by name."""

    def __init__(self, directory: Path, files: Sequence[str]) -> None:
        self._paths: dict[str, Path] = {}
        for name in files:
            path = resolve(directory, name)
            try:
                with safe_open(path, framework="numpy") as opened:
                    self._paths.update(dict.fromkeys(opened.keys(), path))
            except (OSError, SafetensorError) as error:
                raise fail("source-unreadable", f"{shown(name)} cannot be read: {error}") from None

    def get(self, name: str, box: Box | None = None, shape: tuple[int, ...] = ()) -> Array:
        """A tensor, or a box of it; `shape`: what the tensor is taken to be, if there is a box."""
        path = self._paths[name]
        try:
            with safe_open(path, framework="numpy") as opened:
                stored = opened.get_slice(name)
                at = None if box is None else tuple(slice(low, high) for low, high in box)
                if stored.get_dtype() in _FLOAT8:
                    values = _read_bytes(path, name).view(_FLOAT8[stored.get_dtype()])
                elif at is not None and tuple(stored.get_shape()) == shape:
                    return np.asarray(stored[at])
                else:
                    values = np.asarray(opened.get_tensor(name))
                return values if at is None else np.asarray(values.reshape(shape)[at])
        except (OSError, SafetensorError) as error:
            raise fail("source-unreadable", f"{shown(path.name)} cannot be read: {error}") from None


class RemoteTensors:
    """Whole tensors of a source that is elsewhere, by name."""

    def __init__(self, source: Source) -> None:
        self._checkpoint = open_checkpoint(source)
        self._ranges = source.ranges(self._checkpoint.files, once=True)

    def get(self, name: str, box: Box | None = None, shape: tuple[int, ...] = ()) -> Array:
        """As `Tensors.get`. Of a box, the rows along the first axis that hold it are read."""
        tensor = self._checkpoint.tensors[name]
        rows = box[0] if box and tensor.shape == shape else (0, tensor.shape[0] if tensor.shape else 1)
        row = (tensor.end - tensor.begin) // max(1, tensor.shape[0] if tensor.shape else 1)
        data = np.empty((rows[1] - rows[0]) * row, dtype=np.uint8)
        self._ranges.read_into(tensor.file, tensor.begin + rows[0] * row, data.data)
        values = data.view(numpy_dtype(tensor.dtype)).reshape(
            (rows[1] - rows[0], *tensor.shape[1:]) if tensor.shape else ()
        )
        if box is None:
            return values
        if tensor.shape != shape:
            return np.asarray(values.reshape(shape)[tuple(slice(low, high) for low, high in box)])
        return np.asarray(values[(slice(None), *(slice(low, high) for low, high in box[1:]))])


def tensors_of(source: Source, files: Sequence[str]) -> Tensors | RemoteTensors:
    """The tensors of these files of a source."""
    return RemoteTensors(source) if source.local is None else Tensors(source.local, files)


def _read_bytes(path: Path, name: str) -> Array:
    """The bytes of a tensor whose elements are single bytes, as the format's description says where they are."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        return np.frombuffer(file.read(end - begin), dtype=np.uint8).reshape(entry["shape"])


@dataclass(frozen=True, slots=True)
class Slice(Leaf):
    """A leaf of whose tensors a box is read."""

    box: Box = ()
    whole: tuple[int, ...] = ()  # the shape of each tensor


def blocks(target: Target, chunk: Sequence[int], most: int | None = None) -> Iterator[tuple[Box, Node]]:
    """Boxes that cover the array, whole chunks each or up to its edge, and the nodes that make each. Of `most` bytes, if the
    ops allow: by default BLOCK.
    """
    type_, most = target.type, BLOCK if most is None else most
    axes = [a.name for a in type_.axes]
    counting = _restrictable(target.node) if type_.nbytes > most else []
    at = {name: axes.index(name) for name in counting}
    block = prod(chunk[at[a.name]] if a.name in at else a.size for a in type_.axes) * itemsize(type_.dtype)
    steps: dict[str, int] = {}
    for name in reversed(counting):
        size, least = type_.axes[at[name]].size, min(chunk[at[name]], type_.axes[at[name]].size)
        steps[name] = min(size, least * max(1, most // block))
        block = -(-block // least) * steps[name]
    choices = [
        [
            (low, min(low + steps[name], type_.axes[at[name]].size))
            for low in range(0, type_.axes[at[name]].size, steps[name])
        ]
        for name in counting
    ]
    for point in product(*choices):
        ranges = dict(zip(counting, point, strict=True))
        box = tuple(ranges.get(a.name, (0, a.size)) for a in type_.axes)
        yield box, restrict(target.node, ranges)


def make(node: Node, tensors: Tensors | RemoteTensors) -> Array:
    """The node's array."""
    if isinstance(node, Fill):
        return np.full(node.type.shape, np.float32(node.value), dtype=np.float32)
    if isinstance(node, Leaf):
        return _leaf(node, tensors)
    arrays = [make(child, tensors) for child in node.inputs]
    with np.errstate(all="ignore"):
        return node.op.forward(arrays, [child.type for child in node.inputs])


def _leaf(leaf: Leaf, tensors: Tensors | RemoteTensors) -> Array:
    def one(number: int) -> Array:
        if isinstance(leaf, Slice):
            return tensors.get(leaf.tensors[number], leaf.box, leaf.whole)
        values = tensors.get(leaf.tensors[number])
        if leaf.decoded is None:
            return values
        d = leaf.decoded
        with np.errstate(all="ignore"):
            return d.code.forward([values, *(tensors.get(b.tensors[number]) for b in d.beside)], leaf.each.shape)

    if len(leaf.tensors) == 1:
        return one(0).reshape(leaf.type.shape)
    out: Array | None = None
    for number in range(len(leaf.tensors)):
        array = one(number)
        if out is None:
            out = np.empty((len(leaf.tensors), *leaf.each.shape), dtype=array.dtype)
        out[number] = array
    assert out is not None
    return out.reshape(leaf.type.shape)


def _restrictable(node: Node) -> list[str]:
    """The axes that every leaf has, and that are the same axis in every node up to the finished array: those that count
    tensors, then those of each tensor."""
    leaf = node
    while isinstance(leaf, Apply):
        leaf = leaf.inputs[0]
    names = [a.name for a in leaf.type.axes] if isinstance(leaf, Leaf) else []
    return [name for name in names if _can_restrict(node, name)]


def _can_restrict(node: Node, name: str) -> bool:
    """Whether a node restricted to one point of an axis is one point of the node along the axis of that name."""
    size = next((a.size for a in node.type.axes if a.name == name), None)
    try:
        shape = tuple(1 if a.name == name else a.size for a in node.type.axes)
        return size is not None and _has(node, Axis(name, size)) and restrict(node, {name: (0, 1)}).type.shape == shape
    except OpError:
        return False


def _has(node: Node, axis: Axis) -> bool:
    """Whether every node has the axis, leaves that are decoded in their grid, and no op works along it. (A pattern that looked into it
    would have given it another name, or another size: then `restrict` raises.)"""
    if axis not in node.type.axes:
        return False
    if isinstance(node, Leaf):
        return axis in node.grid or node.decoded is None
    if isinstance(node, Apply):
        if getattr(node.op, "axis", None) == axis.name:
            return False
        return all(_has(child, axis) for child in node.inputs)
    return True


def restrict(node: Node, ranges: Ranges) -> Node:
    """The node with less along axes that `_restrictable` names. Raises OpError when an op does not fit smaller sizes."""
    if not ranges:
        return node
    if isinstance(node, Leaf):
        return _restrict_leaf(node, ranges)
    if isinstance(node, Fill):
        return replace(node, type=_smaller(node.type, ranges))
    inputs = tuple(restrict(child, ranges) for child in node.inputs)
    op = _resized(node.op, ranges)
    return Apply(op, inputs, op.infer([child.type for child in inputs]), node.span)


def _restrict_leaf(leaf: Leaf, ranges: Ranges) -> Leaf:
    spans = [range(*ranges.get(a.name, (0, a.size))) for a in leaf.grid]
    numbers = []
    for point in product(*spans):
        number = 0
        for i, axis in zip(point, leaf.grid, strict=True):
            number = number * axis.size + i
        numbers.append(number)
    decoded = leaf.decoded
    if decoded is not None:
        beside = tuple(replace(b, tensors=tuple(b.tensors[n] for n in numbers)) for b in decoded.beside)
        decoded = replace(decoded, beside=beside)
    grid = tuple(Axis(a.name, len(s)) for a, s in zip(leaf.grid, spans, strict=True))
    tensors = tuple(leaf.tensors[n] for n in numbers)
    if all(a.name not in ranges for a in leaf.each.axes):
        return Leaf(tensors, grid, leaf.each, leaf.span, decoded)
    box = tuple(ranges.get(a.name, (0, a.size)) for a in leaf.each.axes)
    return Slice(tensors, grid, _smaller(leaf.each, ranges), leaf.span, decoded, box, leaf.each.shape)


def _smaller(type_: TensorType, ranges: Ranges) -> TensorType:
    return type_.with_axes(tuple(_axis(a, ranges) for a in type_.axes))


def _axis(axis: Axis, ranges: Ranges) -> Axis:
    low, high = ranges.get(axis.name, (0, axis.size))
    return Axis(axis.name, high - low)


def _resized(op: Op, ranges: Ranges) -> Op:
    """The same op where those axes are smaller: only a pattern knows their sizes."""
    if not isinstance(op, Rearrange):
        return op

    def side(groups: tuple[SizedGroup, ...]) -> tuple[SizedGroup, ...]:
        return tuple(tuple(_axis(a, ranges) for a in g) for g in groups)

    return Rearrange(side(op.left), side(op.right))
