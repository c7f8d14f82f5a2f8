"""Whether a plan is consistent with itself: what a run may rely on without looking again.

The digest says that a plan is as it was written; this says that what was written can be run, whoever wrote it. Every part stays inside its array and
inside its tensors, the parts cover each output once, and every tensor lies inside its file. What follows from the kind alone is checked once for it;
what the layout asks for is in `ckptc.plan.check_layout`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isfinite, prod

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import fail
from ckptc.ops.codes import Found, check_beside, code_of
from ckptc.ops.nest import AxisMap, Part, restrict_part
from ckptc.ops.types import OpError, is_float, itemsize
from ckptc.plan.check_layout import PlanError, check_layout
from ckptc.plan.links import linked_bytes
from ckptc.plan.model import Decode, Kind, Orbax, Padding, Plan, Stored, Tensor

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


def check_plan(plan: Plan, name: str) -> None:
    """Raises InputError `invalid-plan` where the plan contradicts itself. `name` is how the message calls it."""
    try:
        _check(plan)
    except (PlanError, OpError, ValueError, IndexError, OverflowError) as error:
        reason = str(error) if len(str(error)) < 400 else f"{str(error)[:400]}…"
        raise fail("invalid-plan", f"{name} is not a plan that can be run: {reason}", help="compile it again") from None


def _check(plan: Plan) -> None:
    for source in plan.sources:
        for file in source.files:
            _check_file(file.name)
    for tensor in plan.tensors:
        _check_tensor(plan, tensor)
    for kind in plan.kinds:
        for stored in kind.sources:
            _check_stored(stored)
    furthest = _check_outputs(plan)
    whole = {o.kind for o in plan.outputs}
    for number, kind in enumerate(plan.kinds):
        check_kind(kind, furthest[number], number in whole)
        _check_mesh(plan, kind)
    counts = Counter(o.kind for o in plan.outputs)
    units = [prod(-(-n // u) for n, u in zip(k.shape, k.unit, strict=True)) for k in plan.kinds]
    if (count := sum(units[kind] * n for kind, n in counts.items())) > MAX_UNITS:
        raise PlanError(f"it has {count} units of work")
    _check_batches(plan)
    check_layout(plan)
    _check_twins(plan)
    for padding in plan.padding:
        _check_padding(plan, padding)
    _check_numbers(plan)


def _check_file(name: str) -> None:
    if name.startswith("/") or "\\" in name or any(p in ("", ".", "..") for p in name.split("/")):
        raise PlanError(f"`{name}` is not the name of a file inside a checkpoint")


def _check_tensor(plan: Plan, tensor: Tensor) -> None:
    if tensor.source >= len(plan.sources):
        raise PlanError(f"`{tensor.name}` is of source {tensor.source}, there are {len(plan.sources)}")
    source = plan.sources[tensor.source]
    if tensor.file >= len(source.files):
        raise PlanError(f"`{tensor.name}` is in file {tensor.file}, there are {len(source.files)}")
    if tensor.begin > tensor.end:
        raise PlanError(f"`{tensor.name}` ends before it begins")
    if source.format == "orbax" and (tensor.file, tensor.begin) != (-1, 0):
        raise PlanError(f"`{tensor.name}` is an array of chunks, and no range of a file")
    if tensor.file >= 0 and tensor.end > source.files[tensor.file].size:
        raise PlanError(f"`{tensor.name}` ends at byte {tensor.end}, past its file's end")


def _check_stored(stored: Stored) -> None:
    if stored.chunk is not None and (len(stored.chunk) != len(stored.shape) or stored.decode):
        raise PlanError(f"chunks {list(stored.chunk)} are not of an array {list(stored.shape)}")


def _check_outputs(plan: Plan) -> list[list[int]]:
    """Every output names the tensors that its kind reads, of their bytes. Returns, of each kind and each of its sources,
    the furthest element where an output begins."""
    if len({o.name for o in plan.outputs}) != len(plan.outputs):
        raise PlanError("two outputs have one name")
    furthest = [[0] * len(k.sources) for k in plan.kinds]
    needed = [[size for s in kind.sources for size in _sizes(s)] for kind in plan.kinds]
    stored = [(t.nbytes, plan.sources[t.source].format == "orbax") for t in plan.tensors]
    for name, position, tensors, begins in (
        (o.name, o.kind, o.tensors, o.begins) for o in (*plan.outputs, *plan.twins)
    ):
        if position >= len(plan.kinds):
            raise PlanError(f"`{name}` is of kind {position}, there are {len(plan.kinds)}")
        if max(tensors, default=0) >= max(1, len(stored)):
            raise PlanError(f"`{name}` names a tensor that is not there")
        if len(tensors) != len(needed[position]) or len(begins) not in (0, len(furthest[position])):
            raise PlanError(f"`{name}` does not name the tensors that its kind reads")
        for tensor, (wanted, chunks, most) in zip(tensors, needed[position], strict=True):
            size, found = stored[tensor][0], plan.tensors[tensor].name
            if size != wanted and not (most and size < wanted):
                raise PlanError(f"`{found}` has {size} bytes, `{name}` reads {wanted}")
            if stored[tensor][1] != chunks:
                raise PlanError(f"`{found}` is not stored as `{name}` reads it")
        if begins:
            furthest[position] = list(map(max, furthest[position], begins))
    return furthest


def _sizes(stored: Stored) -> list[tuple[int, bool, bool]]:
    """Of each tensor that an output names for a source: its bytes, whether it has chunks, and whether it may have less."""
    sizes = [(stored.nbytes, stored.chunk is not None, False)] * stored.count
    if stored.decode:
        _check_decode(stored, stored.decode)
        layout = code_of(stored.decode.code, stored.decode.settings).layout(stored.decode.shape)
        for beside, wanted in zip(stored.decode.beside, layout.beside, strict=True):
            sizes += [(prod(beside.shape) * itemsize(beside.dtype), False, wanted.most)] * stored.count
    return sizes


def _check_batches(plan: Plan) -> None:
    if not plan.batches:
        return
    if sorted(n for batch in plan.batches for n in batch) != list(range(len(plan.outputs))):
        raise PlanError("the batches do not make every output once")
    for batch in plan.batches:
        if len({(plan.outputs[n].kind, plan.outputs[n].tensors) for n in batch}) != 1:
            raise PlanError("the outputs of a batch are not alike")


def _check_twins(plan: Plan) -> None:
    outputs = {o.name: plan.kinds[o.kind] for o in plan.outputs} if plan.twins else {}
    for twin in plan.twins:
        kind, first = plan.kinds[twin.kind], outputs.get(twin.name)
        if first is None or (first.shape, first.dtype) != (kind.shape, kind.dtype):
            raise PlanError(f"there is no such output as the twin `{twin.name}`")


def _check_padding(plan: Plan, padding: Padding) -> None:
    shape, rank = padding.array.shape, len(padding.array.shape)
    _check_stored(padding.array)
    if padding.tensor >= len(plan.tensors) or len(padding.axes) != rank or padding.axis >= max(1, rank):
        raise PlanError("padding is not of a stored array")
    if any(a.stop > size for a, size in zip(padding.axes, shape, strict=True)):
        raise PlanError(f"padding is not inside {list(shape)}")
    tensor = plan.tensors[padding.tensor]
    if tensor.nbytes != padding.array.nbytes or plan.sources[tensor.source].format != "orbax":
        raise PlanError(f"`{tensor.name}` is not of the shape that its padding has")


def _check_numbers(plan: Plan) -> None:
    """Totals are those of the outputs, where they follow from them; no number is past what a file can have."""
    t, c = plan.totals, plan.choices
    counts = Counter(o.kind for o in plan.outputs)
    stated = (t.arrays, t.parameters, t.write_bytes)
    made = [(plan.kinds[kind], n) for kind, n in counts.items()]
    if stated != (len(plan.outputs), sum(k.size * n for k, n in made), sum(k.nbytes * n for k, n in made)):
        raise PlanError("its totals are not those of its arrays")
    if t.linked_bytes != sum(linked_bytes(k) * n for k, n in made):
        raise PlanError("its arrays do not link what its totals say")
    sizes = (f.size for source in plan.sources for f in source.files)
    numbers = (t.tensors, t.read_bytes, t.reread_bytes, t.write_bytes, t.peak_memory_bytes, c.memory, c.shards)
    if max(*numbers, *sizes) >= 1 << 63:
        raise PlanError("a number is larger than it can be")


def _check_mesh(plan: Plan, kind: Kind) -> None:
    """With a mesh, shards are those of the kind's spec, and whole chunks unless chunks are linked."""
    mesh = plan.layout.mesh if isinstance(plan.layout, Orbax) else ()
    sizes = dict(mesh)
    if len(sizes) != len(mesh):
        raise PlanError("its mesh has an axis twice")
    if not sizes:
        if kind.spec:
            raise PlanError(f"`{kind.rule}` is sharded over a mesh, and there is none")
        return
    names = [name for over in kind.spec for name in over]
    if len(set(names)) != len(names) or not sizes.keys() >= set(names):
        raise PlanError(f"`{kind.rule}` is not sharded over axes of the mesh, each once")
    found = tuple(prod(sizes[name] for name in over) for over in kind.spec) or (1,) * len(kind.shape)
    if found != kind.shards:
        raise PlanError(f"`{kind.rule}` has shards {list(kind.shards)}, its mesh makes {list(found)}")
    for size, shards, chunk in zip(kind.shape, found, kind.stored or kind.chunk, strict=True):
        # Chunks that lie in source files are what they are there.
        if size % shards or (shards > 1 and kind.link is None and size // shards % chunk):
            raise PlanError(f"shards of `{kind.rule}` are not whole chunks")


def check_kind(kind: Kind, begins: Sequence[int], whole: bool = True) -> None:
    """A kind's sizes fit each other, and its parts cover an output once, if it is `whole`, within its sources, wherever
    up to `begins` it begins. Raises PlanError."""
    try:
        _check_kind(kind, begins, whole)
    except (OpError, ValueError, IndexError, OverflowError) as error:
        raise PlanError(f"`{kind.rule}`: {error}") from None


def _check_kind(kind: Kind, begins: Sequence[int], whole: bool) -> None:
    rank = len(kind.shape)
    if prod(kind.shape) > MAX_ELEMENTS:
        raise ValueError("has too many elements to be one")
    if not len(kind.chunk) == len(kind.unit) == rank:
        raise ValueError("its chunk, unit and shape differ in length")
    for size, chunk, unit in zip(kind.shape, kind.chunk, kind.unit, strict=True):
        if chunk > unit or unit > size:
            raise ValueError(f"chunk {list(kind.chunk)} does not fit unit {list(kind.unit)} of {list(kind.shape)}")
    if kind.dtype not in DTYPES or kind.dtype in UNSTORED:
        raise ValueError(f"{kind.dtype} is no dtype of an array")
    for part in kind.parts:
        check_part(part, kind, begins)
    if not whole:  # twins may hold less than all of an output
        return
    if sum(p.size for p in kind.parts) != prod(kind.shape):
        raise ValueError("its parts do not cover it once")
    if len({p.axes for p in kind.parts}) != len(kind.parts):
        raise ValueError("two of its parts are one")
    if len(kind.parts) ** 2 <= MAX_PAIRS:
        for number, part in enumerate(kind.parts):
            box = tuple((a.start, a.stop) for a in part.axes)
            for other in kind.parts[:number]:
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
    if axis.size > MAX_INDICES:
        raise ValueError("an axis is longer than one can be")
    out = np.array([axis.start], dtype=np.int64)
    for f in axis.factors:
        out = (out[:, None] + np.arange(f.size, dtype=np.int64) * f.weight).reshape(-1)
    return out


def check_part(part: Part, kind: Kind, begins: Sequence[int]) -> None:
    """A part stays inside the output and inside its source. Raises ValueError or OpError."""
    if len(part.axes) != len(kind.shape):
        raise ValueError("a part has another number of axes")
    if min(part.base, part.first, *((part.source,) if part.source is not None else ())) < 0:
        raise ValueError("a part begins before its source")
    source = kind.sources[part.source] if part.source is not None else None
    last, last_tensor = part.base + (begins[part.source] if part.source is not None else 0), part.first
    if max([len(part.math), *(len(a.factors) for a in part.axes)]) > MAX_LOOPS:
        raise ValueError("a part of more steps than a mapping makes")
    for axis, size in zip(part.axes, kind.shape, strict=True):
        if axis.start < 0 or any(f.size < 1 or f.weight < 1 or f.step < 0 or f.tensor < 0 for f in axis.factors):
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
        if last_tensor >= source.count:
            raise ValueError(f"a part reads tensor {last_tensor} of {source.count}")
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


def _check_decode(source: Stored, decode: Decode) -> None:
    code = code_of(decode.code, decode.settings)
    if source.dtype not in code.dtypes or source.shape != code.stored(decode.shape):
        raise ValueError(f"{code.name} of {list(decode.shape)} is no {source.dtype}{list(source.shape)}")
    check_beside(code, decode.shape, [Found(b.dtype, b.shape) for b in decode.beside])
