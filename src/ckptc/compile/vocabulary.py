"""Ops as a mapping writes them, as typed ops: names resolved to sizes, expressions to numbers."""

from __future__ import annotations

from typing import Any

from ckptc.compile.scope import Names, Scope
from ckptc.ops import (
    Add,
    Axis,
    Cast,
    Concat,
    Interleave,
    Op,
    OpError,
    Pad,
    PermuteRope,
    Rearrange,
    ReshapeHeads,
    Resize,
    Scale,
    Slice,
    Split,
    SplitLast,
    Stack,
    TensorType,
    Transpose,
)  # fmt: skip
from ckptc.ops.rearrange import SizedGroup
from ckptc.spec.mapping import OpSpec


def build_op(spec: OpSpec, input: TensorType, batch: int, scope: Scope, names: Names) -> Op:
    """The op, for an input whose first `batch` axes are stacking axes that patterns do not mention.

    Raises InputError for names and expressions, OpError when the op cannot be made of its argument.
    """
    argument, where = spec.argument, spec.where
    sizes = {a.name: a.size for a in input.axes if a.name}

    def integer(value: Any) -> int:
        return scope.integer(value, names, where)

    def axes(text: str) -> tuple[Axis, ...]:
        return tuple(Axis(n, scope.size(n, sizes, text, where)) for n in text.split())

    match spec.name:
        case "rearrange":
            return rearrange(argument, input, batch, scope, where)
        case "transpose":
            return Transpose((*(a.name for a in input.axes[:batch]), *argument.split()))
        case "reshape_heads":
            ((axis, into),) = argument.items()
            return ReshapeHeads(axis, axes(into))
        case "split_last":
            return SplitLast(axes(argument))
        case "split":
            return Split(argument["axis"], integer(argument["parts"]), integer(argument["take"]))
        case "slice":
            cuts = []
            for axis, cut in argument.items():
                begin, end = cut if isinstance(cut, list) else (cut, None)
                cuts.append((axis, integer(begin), None if end is None else integer(end)))
            return Slice(tuple(cuts))
        case "concat":
            return Concat(argument)
        case "stack":
            return Stack(argument)
        case "interleave":
            return Interleave(argument["axis"], integer(argument["parts"]))
        case "permute_rope":
            return PermuteRope(argument)
        case "scale":
            return Scale(_number(scope.value(argument, names, where)))
        case "add":
            return Add(_number(scope.value(argument, names, where)))
        case "pad" | "resize":
            ((axis, size),) = argument.items()
            return (Pad if spec.name == "pad" else Resize)(axis, integer(size))
        case "cast":
            return Cast(argument)
    raise AssertionError(f"the schema lets `{spec.name}` through, but there is no such op")


def rearrange(text: str, input: TensorType, batch: int, scope: Scope, where: tuple[str | int, ...]) -> Rearrange:
    """A pattern over the axes after the stacking axes. A name's size is that of the input's axis or dim of that name."""
    pattern = scope.pattern(text, where)
    if pattern.right is None:
        raise OpError("`rearrange` needs a pattern with `->`")
    sizes = {a.name: a.size for a in input.axes if a.name}
    lead: tuple[SizedGroup, ...] = tuple((a,) for a in input.axes[:batch])
    return Rearrange(
        (*lead, *scope.groups(pattern.left, sizes, text, where)),
        (*lead, *scope.groups(pattern.right, sizes, text, where)),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OpError(f"a number is needed, not {value!r}")
    return float(value)
