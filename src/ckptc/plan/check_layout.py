"""Whether what a plan makes fits the layout that it becomes: the tree of an Orbax checkpoint, or safetensors files.

`ckptc.plan.check` says what that is for, and checks the rest.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from ckptc.plan.files import CONFIG, DTYPES, INDEX, header
from ckptc.plan.model import Kind, Orbax, Plan, Safetensors
from ckptc.plan.stored import axis_order


class PlanError(ValueError):
    """A plan contradicts itself. The message says how."""


def check_layout(plan: Plan) -> None:
    """Raises PlanError, or ValueError."""
    if isinstance(plan.layout, Orbax):
        _check_orbax(plan, plan.layout)
    else:
        _check_safetensors(plan, plan.layout)


def _check_orbax(plan: Plan, layout: Orbax) -> None:
    paths = [tuple(o.name.split("/")) for o in plan.outputs]
    for path in paths:
        if any(p in ("", ".", "..") or not p.isprintable() for p in path):
            raise PlanError(f"`{'/'.join(path)}` is not the path of an array")
    if paths != sorted(paths):
        raise PlanError("arrays are not in the order of their paths")
    for before, path in pairwise(paths):
        if path[: len(before)] == before:
            raise PlanError(f"`{'/'.join(before)}` is an array and holds others")
    if plan.batches and layout.link:
        raise PlanError("linked arrays are not made together")
    for kind in plan.kinds:
        _check_chunks(kind, layout)


def _check_chunks(kind: Kind, layout: Orbax) -> None:
    rank = len(kind.shape)
    if len(kind.shards) != rank or len(kind.axes) not in (0, rank):
        raise PlanError(f"`{kind.rule}`: its shards, axes and shape differ in length")
    for size, chunk, unit in zip(kind.shape, kind.chunk, kind.unit, strict=True):
        if unit % chunk and unit != size:
            raise PlanError(
                f"`{kind.rule}`: chunk {list(kind.chunk)} does not fit unit {list(kind.unit)} of {list(kind.shape)}"
            )
    if kind.link is not None and (sorted(kind.link) != list(range(rank)) or kind.unit != kind.chunk):
        raise PlanError(
            f"`{kind.rule}`: chunks cannot be stored in the order {list(kind.link)} of its axes, and made one by one"
        )
    if kind.stored:
        _check_large_chunks(kind)
    if kind.link is not None and not layout.link:
        raise PlanError(f"`{kind.rule}` links, and its checkpoint does not")


def _check_large_chunks(kind: Kind) -> None:
    """Pieces make up chunks, and lie in them as runs of bytes. Raises PlanError or ValueError."""
    if len(kind.stored) != len(kind.shape) or kind.link is not None:
        raise PlanError(f"`{kind.rule}`: large chunks are not of its shape, or linked")
    for size, piece, stored in zip(kind.shape, kind.chunk, kind.stored, strict=True):
        if stored < piece or (stored % piece and stored != size) or (stored == piece and size % stored):
            raise PlanError(
                f"`{kind.rule}`: chunks {list(kind.stored)} are not pieces {list(kind.chunk)} of {list(kind.shape)}"
            )
    axis_order(kind.chunk, kind.stored)


def _check_safetensors(plan: Plan, layout: Safetensors) -> None:
    for kind in plan.kinds:
        if kind.dtype not in DTYPES:
            raise PlanError(f"safetensors has no {kind.dtype}")
        if kind.link is not None:
            raise PlanError(f"`{kind.rule}` links, which safetensors files cannot")
    names = [f.name for f in layout.files] + [f.name for f in layout.companions]
    taken = {CONFIG, INDEX}
    for name in names:
        if name in taken or name in ("", ".", "..") or not name.isprintable() or "/" in name or "\\" in name:
            raise PlanError(f"it cannot write a file `{name}`")
        taken.add(name)
    if any(f.name.endswith(".safetensors") for f in layout.companions):
        raise PlanError("it copies weights")
    ends = list(accumulate(f.count for f in layout.files))
    if ends[-1:] != [len(plan.outputs)]:
        held = ends[-1] if ends else 0
        raise PlanError(f"its files hold {held} of {len(plan.outputs)} tensors")
    sizes = [k.nbytes for k in plan.kinds]
    for file, end in zip(layout.files, ends, strict=True):
        tensors = plan.outputs[end - file.count : end]
        length = len(header(tensors, plan.kinds))
        if file.header != length:
            raise PlanError(f"the header of {file.name} has {length} bytes, not {file.header}")
        if file.size != (size := length + sum(sizes[t.kind] for t in tensors)):
            raise PlanError(f"{file.name} has {size} bytes, not {file.size}")
