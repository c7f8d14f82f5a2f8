"""Whether the plan of an export is consistent with itself; `ckptc.plan.check` says what that is for, and checks the rest.

Beside what holds of any plan: the files are laid out as `lay_out` does it, arrays of one batch differ in where their parts begin alone, and every
stored array that is read has its chunks.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ckptc.ops.types import itemsize
from ckptc.plan.check import PlanError, check_array, check_part, check_tensors
from ckptc.plan.model import Array, Plan
from ckptc.plan.outputs import DTYPES, INDEX, Outputs, Padding, header

CONFIG = "config.json"


def check_export(plan: Plan) -> None:
    """Raises PlanError, or what `check_array` raises."""
    outputs = plan.outputs
    if outputs is None:
        raise PlanError("it is of an export and has no outputs")
    names = [a.name for a in plan.arrays]
    if len(set(names)) != len(names):
        raise PlanError("two tensors have one name")
    for array in (*plan.arrays, *outputs.twins):
        _check_sources(plan, outputs, array)
    for array in plan.arrays:
        check_array(array)
    _check_files(plan, outputs)
    for batch in outputs.batches:
        if len({_likeness(plan.arrays[n]) for n in batch}) != 1:
            raise PlanError("the arrays of a batch are not alike")
    _check_twins(plan, outputs)
    for padding in outputs.padding:
        _check_padding(plan, outputs, padding)


def _check_sources(plan: Plan, outputs: Outputs, array: Array) -> None:
    if array.dtype not in DTYPES:
        raise PlanError(f"safetensors has no {array.dtype}")
    if any(p.source is None for p in array.parts):
        raise PlanError(f"a part of `{array.name}` has no source")
    for source in array.sources:
        if source.decode is not None or len(source.tensors) != 1:
            raise PlanError(f"a source of `{array.name}` is not one stored array")
        check_tensors(plan, array, source)
        _check_chunks(outputs, source.tensors[0], len(source.shape))


def _check_chunks(outputs: Outputs, tensor: int, rank: int) -> None:
    chunk = outputs.chunks.get(tensor)
    if chunk is None or len(chunk) != rank:
        raise PlanError(f"the chunks of stored array {tensor} are not given")


def _check_files(plan: Plan, outputs: Outputs) -> None:
    names = [f.name for f in outputs.files] + [f.name for f in outputs.companions]
    taken = {CONFIG, INDEX}
    for name in names:
        if name in taken or name in (".", "..") or not name.isprintable() or "/" in name or "\\" in name:
            raise PlanError(f"it cannot write a file `{name}`")
        taken.add(name)
    if any(f.name.endswith(".safetensors") for f in outputs.companions):
        raise PlanError("it copies weights")
    for file in outputs.files:
        arrays = plan.arrays[file.first : file.first + len(file.begins)]
        at = len(header(arrays))
        for array, begin in zip(arrays, file.begins, strict=True):
            if begin != at:
                raise PlanError(f"`{array.name}` does not begin at byte {begin} of {file.name}")
            at += array.nbytes
        if file.size != at:
            raise PlanError(f"{file.name} has {at} bytes, not {file.size}")


def _likeness(array: Array) -> object:
    """What arrays that are made together share."""
    parts = tuple(replace(p, base=0) for p in array.parts)
    sources = tuple((s.dtype, s.shape, s.tensors) for s in array.sources)
    return array.shape, array.dtype, array.unit, sources, parts


def _check_twins(plan: Plan, outputs: Outputs) -> None:
    arrays = {a.name: a for a in plan.arrays}
    for twin in outputs.twins:
        first = arrays.get(twin.name)
        if first is None or (first.shape, first.dtype) != (twin.shape, twin.dtype):
            raise PlanError(f"there is no such tensor as the twin `{twin.name}`")
        if len(twin.unit) != len(twin.shape) or not twin.parts:
            raise PlanError(f"the twin `{twin.name}` has another number of axes")
        for part in twin.parts:
            check_part(part, twin)


def _check_padding(plan: Plan, outputs: Outputs, padding: Padding) -> None:
    rank = len(padding.shape)
    if padding.tensor >= len(plan.tensors) or len(padding.box) != rank or padding.axis >= max(1, rank):
        raise PlanError("padding is not of a stored array")
    if any(not 0 <= low < high <= size for (low, high), size in zip(padding.box, padding.shape, strict=True)):
        raise PlanError(f"padding {list(padding.box)} is not inside {list(padding.shape)}")
    tensor = plan.tensors[padding.tensor]
    if tensor.end - tensor.begin != prod(padding.shape) * itemsize(padding.dtype):
        raise PlanError(f"`{tensor.name}` is not of the shape that its padding has")
    _check_chunks(outputs, padding.tensor, rank)
