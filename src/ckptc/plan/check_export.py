"""Whether the plan of an export is consistent with itself; `ckptc.plan.check` says what that is for, and checks the rest.

Beside what holds of any plan: the tensors of each kind lie within their stored arrays, wherever they begin; the files
are laid out as `lay_out` does it; those of one batch lie in the same stored arrays.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

from msgspec.structs import replace

from ckptc.ops.types import itemsize
from ckptc.plan.check import PlanError, check_array, check_part
from ckptc.plan.model import Array, Plan, Source
from ckptc.plan.outputs import DTYPES, INDEX, Kind, Outputs, Padding, Stored, header

CONFIG = "config.json"


def check_export(plan: Plan) -> None:
    """Raises PlanError, or what `check_array` raises."""
    outputs = plan.outputs
    if outputs is None:
        raise PlanError("it is of an export and has no outputs")
    if plan.arrays:
        raise PlanError("it is of an export and makes arrays")
    if len({t.name for t in outputs.tensors}) != len(outputs.tensors):
        raise PlanError("two tensors have one name")
    _check_kinds(plan, outputs)
    _check_files(outputs)
    _check_batches(outputs)
    _check_twins(outputs)
    for padding in outputs.padding:
        _check_padding(plan, padding)


def _check_kinds(plan: Plan, outputs: Outputs) -> None:
    furthest = [[0] * len(k.sources) for k in outputs.kinds]  # where the last tensor of each kind begins
    sizes = [[prod(s.shape) * itemsize(s.dtype) for s in k.sources] for k in outputs.kinds]
    stored = [t.end - t.begin for t in plan.tensors]
    whole = {t.kind for t in outputs.tensors}
    for name, position, places in (*outputs.tensors, *outputs.twins):
        last = furthest[position]
        for n, size in enumerate(sizes[position]):
            place, begin = places[2 * n], places[2 * n + 1]
            if stored[place] != size:
                found = plan.tensors[place].name
                raise PlanError(f"`{found}` has {stored[place]} bytes, `{name}` reads {size}")
            if begin > last[n]:
                last[n] = begin
    for number, kind in enumerate(outputs.kinds):
        if kind.dtype not in DTYPES:
            raise PlanError(f"safetensors has no {kind.dtype}")
        if any(p.source is None for p in kind.parts):
            raise PlanError(f"a part of `{kind.rule}` has no source")
        for source in kind.sources:
            _check_stored(source)
        array = _array(kind, furthest[number])
        if number in whole:
            check_array(array)
        elif len(kind.unit) != len(kind.shape):
            raise PlanError(f"`{kind.rule}`: unit and shape differ in length")
        else:  # twins may hold less than all of a tensor
            for part in array.parts:
                check_part(part, array)


def _check_stored(stored: Stored) -> None:
    if len(stored.chunk) != len(stored.shape):
        raise PlanError(f"chunks {list(stored.chunk)} are not of an array {list(stored.shape)}")


def _array(kind: Kind, begins: list[int]) -> Array:
    """A tensor of a kind as an array of its own, where it begins at `begins`."""
    shape = kind.shape
    return Array(
        path=(kind.rule,),
        shape=shape,
        dtype=kind.dtype,
        chunk=kind.unit,
        unit=kind.unit,
        shards=(1,) * len(shape),
        axes=(),
        rule=kind.rule,
        ops=kind.ops,
        sources=tuple(Source(s.dtype, s.shape, (0,)) for s in kind.sources),
        parts=tuple(replace(p, base=p.base + begins[p.source or 0]) for p in kind.parts),
    )


def _check_files(outputs: Outputs) -> None:
    names = [f.name for f in outputs.files] + [f.name for f in outputs.companions]
    taken = {CONFIG, INDEX}
    for name in names:
        if name in taken or name in (".", "..") or not name.isprintable() or "/" in name or "\\" in name:
            raise PlanError(f"it cannot write a file `{name}`")
        taken.add(name)
    if any(f.name.endswith(".safetensors") for f in outputs.companions):
        raise PlanError("it copies weights")
    ends = list(accumulate(f.count for f in outputs.files))
    if ends[-1:] != [len(outputs.tensors)]:
        raise PlanError("its files do not hold every tensor once")
    sizes = [k.nbytes for k in outputs.kinds]
    for file, end in zip(outputs.files, ends, strict=True):
        tensors = outputs.tensors[end - file.count : end]
        length = len(header(tensors, outputs.kinds))
        if file.header != length:
            raise PlanError(f"the header of {file.name} has {length} bytes, not {file.header}")
        if file.size != (size := length + sum(sizes[t.kind] for t in tensors)):
            raise PlanError(f"{file.name} has {size} bytes, not {file.size}")


def _check_batches(outputs: Outputs) -> None:
    if sorted(n for batch in outputs.batches for n in batch) != list(range(len(outputs.tensors))):
        raise PlanError("the batches do not make every tensor once")
    for batch in outputs.batches:
        if len({(outputs.tensors[n].kind, outputs.tensors[n].arrays) for n in batch}) != 1:
            raise PlanError("the tensors of a batch are not alike")


def _check_twins(outputs: Outputs) -> None:
    tensors = {t.name: outputs.kinds[t.kind] for t in outputs.tensors} if outputs.twins else {}
    for twin in outputs.twins:
        kind, first = outputs.kinds[twin.kind], tensors.get(twin.name)
        if first is None or (first.shape, first.dtype) != (kind.shape, kind.dtype):
            raise PlanError(f"there is no such tensor as the twin `{twin.name}`")


def _check_padding(plan: Plan, padding: Padding) -> None:
    shape, rank = padding.array.shape, len(padding.array.shape)
    _check_stored(padding.array)
    if padding.tensor >= len(plan.tensors) or len(padding.axes) != rank or padding.axis >= max(1, rank):
        raise PlanError("padding is not of a stored array")
    if any(a.stop > size for a, size in zip(padding.axes, shape, strict=True)):
        raise PlanError(f"padding is not inside {list(shape)}")
    tensor = plan.tensors[padding.tensor]
    if tensor.end - tensor.begin != prod(shape) * itemsize(padding.array.dtype):
        raise PlanError(f"`{tensor.name}` is not of the shape that its padding has")
