"""Whether a plan is consistent with itself: what a run may rely on without looking again.

The digest says that a plan is as it was written; this says that what was written can be run, whoever wrote it. Every part stays inside its array and
inside its tensors, the parts cover each array once, and every tensor lies inside its file. Arrays of different layers are alike, so each kind is
checked once.
"""

from __future__ import annotations

from math import prod

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import InputError, fail
from ckptc.ops.nest import AxisMap, Part, restrict_part
from ckptc.ops.types import OpError, is_float, itemsize
from ckptc.plan.model import Array, Plan, Source

MAX_ELEMENTS = 1 << 50  # of an array: more is no checkpoint
MAX_PAIRS = 20_000  # pairs of parts that are compared for overlaps; more parts are compared by count alone


def check_plan(plan: Plan, name: str) -> None:
    """Raises InputError `invalid-plan` where the plan contradicts itself. For plans from safetensors to Orbax."""
    for file in plan.files:
        if file.name.startswith("/") or "\\" in file.name or any(p in ("", ".", "..") for p in file.name.split("/")):
            raise _refuse(name, f"`{file.name}` is not the name of a file inside a checkpoint")
    for tensor in plan.tensors:
        if tensor.file >= len(plan.files):
            raise _refuse(name, f"`{tensor.name}` is in file {tensor.file}, there are {len(plan.files)}")
        if tensor.file >= 0 and tensor.end > plan.files[tensor.file].size:
            raise _refuse(name, f"`{tensor.name}` ends at byte {tensor.end}, past its file's end")
    paths = [a.path for a in plan.arrays]
    if paths != sorted(set(paths)):
        raise _refuse(name, "arrays are not in the order of their paths, each once")
    checked: set[object] = set()
    for array in plan.arrays:
        if any(p in (".", "..") or "\0" in p for p in array.path):
            raise _refuse(name, f"`{array.name}` is not the path of an array")
        for source in array.sources:
            _check_tensors(plan, array, source, name)
        kind = (
            array.shape,
            array.dtype,
            array.chunk,
            array.unit,
            array.shards,
            array.parts,
            tuple(_kind(s) for s in array.sources),
        )
        if kind not in checked:
            try:
                _check_array(array)
            except (OpError, ValueError, IndexError, OverflowError) as error:
                raise _refuse(name, f"array `{array.name}`: {error}") from None
            checked.add(kind)


def _refuse(name: str, reason: str) -> InputError:
    return fail("invalid-plan", f"{name} is not a plan that can be run: {reason}", help="compile it again")


def _kind(source: Source) -> tuple[object, ...]:
    d = source.decode
    return (source.dtype, source.shape, len(source.tensors), d and (d.op, d.block, d.dtype, d.shape, len(d.tensors)))


def _check_tensors(plan: Plan, array: Array, source: Source, name: str) -> None:
    lists = [(source.tensors, source.shape, source.dtype)]
    if source.decode:
        lists.append((source.decode.tensors, source.decode.shape, source.decode.dtype))
    for positions, shape, dtype in lists:
        try:
            expected = prod(shape) * itemsize(dtype)
        except OpError as error:
            raise _refuse(name, f"array `{array.name}`: {error}") from None
        for position in positions:
            tensor = plan.tensors[position]
            if tensor.end - tensor.begin != expected:
                raise _refuse(
                    name, f"`{tensor.name}` has {tensor.end - tensor.begin} bytes, its shape and dtype {expected}"
                )


def _check_array(array: Array) -> None:
    rank = len(array.shape)
    if prod(array.shape) > MAX_ELEMENTS:
        raise ValueError("has too many elements to be one")
    if not len(array.chunk) == len(array.unit) == len(array.shards) == rank or len(array.axes) not in (0, rank):
        raise ValueError("its chunk, unit, shards and shape differ in length")
    for size, chunk, unit in zip(array.shape, array.chunk, array.unit, strict=True):
        if chunk > unit or unit > size or (unit % chunk and unit != size):
            raise ValueError(f"chunk {list(array.chunk)} does not fit unit {list(array.unit)} of {list(array.shape)}")
    itemsize(array.dtype)
    for part in array.parts:
        _check_part(part, array)
    if sum(p.size for p in array.parts) != prod(array.shape):
        raise ValueError("its parts do not cover it once")
    if len(array.parts) ** 2 <= MAX_PAIRS:
        for number, part in enumerate(array.parts):
            box = tuple((a.start, a.stop) for a in part.axes)
            for other in array.parts[:number]:
                if any(_meet(part, inside, box) for inside in restrict_part(other, box)):
                    raise ValueError("two of its parts overlap")


def _meet(part: Part, inside: Part, box: tuple[tuple[int, int], ...]) -> bool:
    """Whether two parts share an element: whether their indices meet along every axis."""
    return all(
        bool(np.intersect1d(_indices(a), _indices(b) + low, assume_unique=True).size)
        for a, b, (low, _) in zip(part.axes, inside.axes, box, strict=True)
    )


def _indices(axis: AxisMap) -> npt.NDArray[np.int64]:
    """Every index of an axis that a part covers."""
    out = np.array([axis.start], dtype=np.int64)
    for f in axis.factors:
        out = (out[:, None] + np.arange(f.size, dtype=np.int64) * f.weight).reshape(-1)
    return out


def _check_part(part: Part, array: Array) -> None:
    if len(part.axes) != len(array.shape):
        raise ValueError("a part has another number of axes")
    source = array.sources[part.source] if part.source is not None else None
    last, last_tensor = part.base, part.first
    for axis, size in zip(part.axes, array.shape, strict=True):
        if any(f.size < 1 or f.weight < 1 for f in axis.factors):
            raise ValueError("a loop without iterations, or that does not move")
        extent = 1
        for f in reversed(axis.factors):
            if f.weight < extent:
                raise ValueError("the loops of an axis overlap")
            extent += (f.size - 1) * f.weight
        if axis.start + extent > size:
            raise ValueError(f"a part reaches index {axis.start + extent - 1} of an axis of {size}")
        last += sum((f.size - 1) * f.step for f in axis.factors)
        last_tensor += sum((f.size - 1) * f.tensor for f in axis.factors)
    if source is not None:
        if last >= _elements(source):
            raise ValueError(f"a part reads element {last} of a tensor of {_elements(source)}")
        if last_tensor >= len(source.tensors):
            raise ValueError(f"a part reads tensor {last_tensor} of {len(source.tensors)}")
        if source.decode and len(source.decode.tensors) != len(source.tensors):
            raise ValueError("values and scales differ in number")
    for step, operand in part.math:
        if step == "cast":
            itemsize(str(operand))
            if not is_float(str(operand)):
                raise ValueError(f"a cast to {operand}")
        elif not isinstance(operand, int | float):
            raise ValueError(f"`{step}` by {operand!r}")


def _elements(source: Source) -> int:
    """Elements of one tensor, decoded: a byte of mxfp4 holds two."""
    size = prod(source.shape)
    return size * 2 if source.decode and source.decode.op == "dequant_mxfp4" else size
