"""What a target array must be, the straight way: whole source tensors, and each op's `forward`, one after the other.

This is what verification holds a checkpoint against, so it shares nothing with the executor: no folded parts, no byte
ranges, no kernel. Tensors come from the safetensors library.

Memory: an array that stacks tensors (layers, experts) is made a block of them at a time. The axes that only count
tensors, from the source to the finished array, can be restricted everywhere at once: a leaf lists fewer tensors, and
the ops are the same with smaller sizes. So a block needs the tensors it is made of, and some copies of itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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

BLOCK = 32 << 20  # bytes of target made at once, where one tensor's share is less
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

    def get(self, name: str) -> Array:
        path = self._paths[name]
        try:
            with safe_open(path, framework="numpy") as opened:
                stored = opened.get_slice(name).get_dtype()
                if stored in _FLOAT8:
                    return _read_bytes(path, name).view(_FLOAT8[stored])
                return np.asarray(opened.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise fail("source-unreadable", f"{shown(path.name)} cannot be read: {error}") from None


class RemoteTensors:
    """Whole tensors of a source that is elsewhere, by name."""

    def __init__(self, source: Source) -> None:
        self._checkpoint = open_checkpoint(source)
        self._ranges = source.ranges(self._checkpoint.files, once=True)

    def get(self, name: str) -> Array:
        tensor = self._checkpoint.tensors[name]
        data = np.empty(tensor.end - tensor.begin, dtype=np.uint8)
        self._ranges.read_into(tensor.file, tensor.begin, data.data)
        return data.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape)


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


def blocks(target: Target, chunk: Sequence[int]) -> Iterator[tuple[Box, Node]]:
    """Boxes that cover the array, whole chunks each or up to its edge, and the nodes that make each."""
    type_ = target.type
    axes = [a.name for a in type_.axes]
    counting = _counting(target.node) if type_.nbytes > BLOCK else []
    at = {name: axes.index(name) for name in counting}
    share = prod(a.size for a in type_.axes if a.name not in at) * itemsize(type_.dtype)
    steps: dict[str, int] = {}
    for name in reversed(counting):
        size, least = type_.axes[at[name]].size, chunk[at[name]]
        steps[name] = min(size, least * max(1, BLOCK // (least * share)))
        share *= steps[name]
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


def _counting(node: Node) -> list[str]:
    """The axes that count tensors in every leaf, and are the same axis in every node up to the finished array."""
    leaf = node
    while isinstance(leaf, Apply):
        leaf = leaf.inputs[0]
    names = [a.name for a in leaf.grid] if isinstance(leaf, Leaf) else []
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
    """Whether every node has the axis, every leaf in its grid, and no op works along it. (A pattern that looked into it
    would have given it another name, or another size: then `restrict` raises.)"""
    if axis not in node.type.axes:
        return False
    if isinstance(node, Leaf):
        return axis in node.grid
    if isinstance(node, Apply):
        if getattr(node.op, "axis", None) == axis.name:
            return False
        return all(_has(child, axis) for child in node.inputs)
    return True


def restrict(node: Node, ranges: Ranges) -> Node:
    """The node with fewer tensors along axes that count them. Raises OpError when an op does not fit smaller sizes."""
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
    return Leaf(tuple(leaf.tensors[n] for n in numbers), grid, leaf.each, leaf.span, decoded)


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
