"""Whether a plan is consistent with itself: what a run may rely on without looking again.

The digest says that a plan is as it was written; this says that what was written can be run, whoever wrote it. Every part stays inside its array and
inside its tensors, the parts cover each array once, and every tensor lies inside its file. Arrays of different layers are alike, so each kind is
checked once.
"""

from __future__ import annotations

from itertools import pairwise
from math import isfinite, prod

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import fail
from ckptc.ops.codes import Found, check_beside, code_of
from ckptc.ops.nest import AxisMap, Part, restrict_part
from ckptc.ops.types import OpError, is_float, itemsize
from ckptc.plan.links import linked_bytes
from ckptc.plan.model import Array, Decode, Plan, Source
from ckptc.plan.stored import axis_order

# What arrays are stored in: the dtypes that both formats have. Tensors may be of a few more.
INTEGERS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
FLOATS = (
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
DTYPES = frozenset((*INTEGERS, *FLOATS, "complex64", "float8_e8m0fnu"))
UNSTORED = frozenset(("float8_e8m0fnu",))
MAX_ELEMENTS = 1 << 50  # of an array: more is no checkpoint
MAX_UNITS = 10_000_000  # of a plan; a unit is some megabytes
MAX_PAIRS = 20_000  # pairs of parts that are compared for overlaps; of more parts none may stand twice
MAX_INDICES = 1 << 26  # of an axis, where they are compared one by one
MAX_LOOPS = 64  # of an axis, and steps of arithmetic: mappings make a handful


class PlanError(ValueError):
    """A plan contradicts itself. The message says how."""


def check_plan(plan: Plan, name: str) -> None:
    """Raises InputError `invalid-plan` where the plan contradicts itself. `name` is how the message calls it."""
    try:
        _check(plan)
    except (PlanError, OpError, ValueError, IndexError, OverflowError) as error:
        reason = str(error) if len(str(error)) < 400 else f"{str(error)[:400]}…"
        raise fail("invalid-plan", f"{name} is not a plan that can be run: {reason}", help="compile it again") from None


def _check(plan: Plan) -> None:
    if plan.made.kind != "export" and plan.outputs is not None:
        raise PlanError("it is no export and has outputs of one")
    for file in plan.files:
        if file.name.startswith("/") or "\\" in file.name or any(p in ("", ".", "..") for p in file.name.split("/")):
            raise PlanError(f"`{file.name}` is not the name of a file inside a checkpoint")
    for tensor in plan.tensors:
        if tensor.file >= len(plan.files):
            raise PlanError(f"`{tensor.name}` is in file {tensor.file}, there are {len(plan.files)}")
        if plan.made.kind == "import" and tensor.file >= 0 and tensor.end > plan.files[tensor.file].size:
            raise PlanError(f"`{tensor.name}` ends at byte {tensor.end}, past its file's end")
    for array in plan.arrays:
        if any(p in (".", "..") or not p.isprintable() for p in array.path):
            raise PlanError(f"`{array.name}` is not the path of an array")
    if plan.made.kind == "export":
        from ckptc.plan.check_export import check_export  # which needs what is below

        check_export(plan)
    else:
        _check_import(plan)
    _check_numbers(plan)


def _check_import(plan: Plan) -> None:
    paths = [a.path for a in plan.arrays]
    if paths != sorted(set(paths)):
        raise PlanError("arrays are not in the order of their paths, each once")
    for before, path in pairwise(paths):
        if path[: len(before)] == before:
            raise PlanError(f"`{'/'.join(before)}` is an array and holds others")
    checked: set[object] = set()
    units = 0
    for array in plan.arrays:
        for source in array.sources:
            check_tensors(plan, array, source)
        sources = tuple(_kind(s) for s in array.sources)
        stored = (array.chunk, array.stored, array.unit, array.shards, array.spec, array.link)
        kind = (array.shape, array.dtype, stored, array.parts, sources)
        if kind not in checked:
            check_array(array)
            _check_mesh(plan, array)
            checked.add(kind)
        units += prod(-(-n // u) for n, u in zip(array.shape, array.unit, strict=True))
    if units > MAX_UNITS:
        raise PlanError(f"it has {units} units of work")


def _check_numbers(plan: Plan) -> None:
    """Totals are those of the arrays, where they follow from them; no number is past what a file can have."""
    t, c = plan.totals, plan.choices
    stated = (t.arrays, t.parameters, t.write_bytes)
    made = [kind for _, kind in plan.outputs.named()] if plan.outputs else plan.arrays
    found = (len(made), sum(a.size for a in made), sum(a.nbytes for a in made))
    if stated != found:
        raise PlanError("its totals are not those of its arrays")
    if t.linked_bytes != sum(map(linked_bytes, plan.arrays)):
        raise PlanError("its arrays do not link what its totals say")
    if (
        max(
            t.tensors,
            t.read_bytes,
            t.reread_bytes,
            t.write_bytes,
            t.peak_memory_bytes,
            c.memory,
            c.shards,
            *(f.size for f in plan.files),
        )
        >= 1 << 63
    ):
        raise PlanError("a number is larger than it can be")


def _check_mesh(plan: Plan, array: Array) -> None:
    """With a mesh, shards are those of the array's spec, and whole chunks unless chunks are linked."""
    sizes = dict(plan.choices.mesh)
    if len(sizes) != len(plan.choices.mesh):
        raise PlanError("its mesh has an axis twice")
    if not sizes:
        if array.spec:
            raise PlanError(f"`{array.name}` is sharded over a mesh, and there is none")
        return
    names = [name for over in array.spec for name in over]
    if len(set(names)) != len(names) or not sizes.keys() >= set(names):
        raise PlanError(f"`{array.name}` is not sharded over axes of the mesh, each once")
    found = tuple(prod(sizes[name] for name in over) for over in array.spec) or (1,) * len(array.shape)
    if found != array.shards:
        raise PlanError(f"`{array.name}` has shards {list(array.shards)}, its mesh makes {list(found)}")
    for size, shards, chunk in zip(array.shape, found, array.stored or array.chunk, strict=True):
        # Chunks that lie in source files are what they are there.
        if size % shards or (shards > 1 and array.link is None and size // shards % chunk):
            raise PlanError(f"shards of `{array.name}` are not whole chunks")


def _kind(source: Source) -> tuple[object, ...]:
    d = source.decode
    return (source.dtype, source.shape, len(source.tensors), d and (d.kind, tuple(len(b.tensors) for b in d.beside)))


def check_tensors(plan: Plan, array: Array, source: Source) -> None:
    """Every tensor of a source has the bytes of its shape and dtype. Raises PlanError, OpError or ValueError."""
    lists = [(source.tensors, source.shape, source.dtype, False)]
    if source.decode:
        _check_decode(source, source.decode)
        layout = code_of(source.decode.code, source.decode.settings).layout(source.decode.shape)
        wanted = zip(source.decode.beside, layout.beside, strict=True)
        lists += [(b.tensors, b.shape, b.dtype, w.most) for b, w in wanted]
    for positions, shape, dtype, most in lists:
        expected = prod(shape) * itemsize(dtype)
        for position in positions:
            tensor = plan.tensors[position]
            if tensor.end - tensor.begin != expected and not (most and tensor.end - tensor.begin < expected):
                found = tensor.end - tensor.begin
                raise PlanError(f"`{tensor.name}` has {found} bytes, `{array.name}` reads {expected}")


def check_array(array: Array) -> None:
    """An array's sizes fit each other, and its parts cover it once. Raises PlanError, OpError or ValueError."""
    try:
        _check_array(array)
    except (OpError, ValueError, IndexError, OverflowError) as error:
        raise PlanError(f"array `{array.name}`: {error}") from None


def _check_array(array: Array) -> None:
    rank = len(array.shape)
    if prod(array.shape) > MAX_ELEMENTS:
        raise ValueError("has too many elements to be one")
    if not len(array.chunk) == len(array.unit) == len(array.shards) == rank or len(array.axes) not in (0, rank):
        raise ValueError("its chunk, unit, shards and shape differ in length")
    for size, chunk, unit in zip(array.shape, array.chunk, array.unit, strict=True):
        if chunk > unit or unit > size or (unit % chunk and unit != size):
            raise ValueError(f"chunk {list(array.chunk)} does not fit unit {list(array.unit)} of {list(array.shape)}")
    if array.stored:
        _check_stored(array)
    if array.link is not None and (sorted(array.link) != list(range(rank)) or array.unit != array.chunk):
        raise ValueError(f"chunks cannot be stored in the order {list(array.link)} of its axes, and made one by one")
    if array.dtype not in DTYPES or array.dtype in UNSTORED:
        raise ValueError(f"{array.dtype} is no dtype of an array")
    for part in array.parts:
        check_part(part, array)
    if sum(p.size for p in array.parts) != prod(array.shape):
        raise ValueError("its parts do not cover it once")
    if len({p.axes for p in array.parts}) != len(array.parts):
        raise ValueError("two of its parts are one")
    if len(array.parts) ** 2 <= MAX_PAIRS:
        for number, part in enumerate(array.parts):
            box = tuple((a.start, a.stop) for a in part.axes)
            for other in array.parts[:number]:
                if any(_meet(part, inside, box) for inside in restrict_part(other, box)):
                    raise ValueError("two of its parts overlap")


def _check_stored(array: Array) -> None:
    """A large chunk is whole pieces, each of them a run of its bytes, and reaches past the array only where it is cut."""
    if len(array.stored) != len(array.shape) or array.link is not None:
        raise ValueError("its large chunks have another number of axes, or are linked")
    for size, piece, stored in zip(array.shape, array.chunk, array.stored, strict=True):
        if stored < piece or (stored % piece and stored != size) or (stored == piece and size % stored):
            raise ValueError(f"chunks {list(array.stored)} are not pieces {list(array.chunk)} of {list(array.shape)}")
    axis_order(array.chunk, array.stored)


def _meet(part: Part, inside: Part, box: tuple[tuple[int, int], ...]) -> bool:
    """Whether two parts share an element: whether their indices meet along every axis."""
    return all(
        bool(np.intersect1d(_indices(a), _indices(b) + low, assume_unique=True).size)
        for a, b, (low, _) in zip(part.axes, inside.axes, box, strict=True)
    )


def _indices(axis: AxisMap) -> npt.NDArray[np.int64]:
    """Every index of an axis that a part covers."""
    if axis.size > MAX_INDICES:
        raise ValueError("an axis is longer than one can be")
    out = np.array([axis.start], dtype=np.int64)
    for f in axis.factors:
        out = (out[:, None] + np.arange(f.size, dtype=np.int64) * f.weight).reshape(-1)
    return out


def check_part(part: Part, array: Array) -> None:
    """A part stays inside the array and inside its source. Raises ValueError or OpError."""
    if len(part.axes) != len(array.shape):
        raise ValueError("a part has another number of axes")
    source = array.sources[part.source] if part.source is not None else None
    last, last_tensor = part.base, part.first
    if max([len(part.math), *(len(a.factors) for a in part.axes)]) > MAX_LOOPS:
        raise ValueError("a part of more steps than a mapping makes")
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
        if last >= source.elements:
            raise ValueError(f"a part reads element {last} of a tensor of {source.elements}")
        if last_tensor >= len(source.tensors):
            raise ValueError(f"a part reads tensor {last_tensor} of {len(source.tensors)}")
        if source.decode:
            _check_decode(source, source.decode)
        elif source.dtype not in DTYPES:
            raise ValueError(f"{source.dtype} is no dtype of a tensor")
    for step, operand in part.math:
        if step == "cast":
            itemsize(str(operand))
            if not is_float(str(operand)):
                raise ValueError(f"a cast to {operand}")
        elif not isinstance(operand, int | float) or isinstance(operand, bool) or not isfinite(operand):
            raise ValueError(f"`{step}` by {operand!r}")


def _check_decode(source: Source, decode: Decode) -> None:
    if any(len(b.tensors) != len(source.tensors) for b in decode.beside):
        raise ValueError("tensors of codes and those beside them differ in number")
    code = code_of(decode.code, decode.settings)
    if source.dtype not in code.dtypes or source.shape != code.stored(decode.shape):
        raise ValueError(f"{code.name} of {list(decode.shape)} is no {source.dtype}{list(source.shape)}")
    check_beside(code, decode.shape, [Found(b.dtype, b.shape) for b in decode.beside])
