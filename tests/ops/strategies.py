"""Random types, arrays, leaves, ops and chains of ops."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tests.ops.evaluate import Array, dtype_of

from ckptc.ops import (
    Add,
    Axis,
    Cast,
    Concat,
    Interleave,
    Op,
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
)
from ckptc.ops.base import Parts
from ckptc.ops.nest import Part, whole
from ckptc.ops.rename import Rename

Draw = Callable[[st.SearchStrategy[Any]], Any]

MAX_ELEMENTS = 300
FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64")
DTYPES = (*FLOATS, "int64", "uint8")
# Arithmetic on these loses nothing on the way into float32.
NARROW = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
FACTORS = (2.0, 0.5, -4.0, 0.0625, 1.0, 3.0, 0.1, -7.25)


def bits(seed: int, type_: TensorType) -> Array:
    """Every bit pattern, so also infinities and NaN."""
    raw = np.random.default_rng(seed).integers(0, 256, type_.nbytes, np.uint8)
    return raw.view(dtype_of(type_.dtype)).reshape(type_.shape)


def moderate(seed: int, type_: TensorType) -> Array:
    """Finite values with magnitudes in [1/64, 64), both signs."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-1.0, 1.0], type_.shape) * np.exp2(rng.uniform(-6, 6, type_.shape))
    return values.astype(np.float32).astype(dtype_of(type_.dtype))


@st.composite
def types(draw: Draw, dtypes: Sequence[str] = DTYPES, least: int = 0, most: int = 4) -> TensorType:
    sizes = draw(st.lists(st.integers(1, 6), min_size=least, max_size=most))
    while prod(sizes) > 200:
        sizes[sizes.index(max(sizes))] = 1
    names = draw(st.permutations(string.ascii_lowercase[:6]))
    axes = [Axis(names[i], n) for i, n in enumerate(sizes)]
    if least < len(axes) and len(axes) < most and draw(st.integers(0, 5)) == 0:
        axes.insert(draw(st.integers(0, len(axes))), Axis("", 1))
    return TensorType(tuple(axes), draw(st.sampled_from(dtypes)))


def named(type_: TensorType) -> list[int]:
    return [i for i, a in enumerate(type_.axes) if a.name]


def fresh(type_: TensorType, count: int) -> list[str]:
    """Names no axis and no part of a fused axis has."""
    used = {word for a in type_.axes for word in a.name.strip("()").split()}
    return [n for n in (f"n{i}" for i in range(len(used) + count)) if n not in used][:count]


def factorings(n: int, most: int = 3) -> list[tuple[int, ...]]:
    """Ways to write n as a product of one to `most` factors, ones included."""
    if most == 1:
        return [(n,)]
    out = [(n,)]
    for first in range(1, n + 1):
        if n % first == 0:
            out += [(first, *rest) for rest in factorings(n // first, most - 1)]
    return out


# --- one op, and input types it fits ------------------------------------------------------------


def rearrange_for(draw: Draw, type_: TensorType) -> Rearrange:
    """Every axis cut into some factors, all factors in a new order, grouped anew, with anonymous axes anywhere."""
    cut = [draw(st.sampled_from(factorings(a.size))) if a.name else () for a in type_.axes]
    names = iter(fresh(type_, sum(map(len, cut))))
    left = tuple(tuple(Axis(next(names), n) for n in sizes) for sizes in cut)
    atoms = draw(st.permutations([a for g in left for a in g]))
    right: list[tuple[Axis, ...]] = []
    while atoms:
        take = draw(st.integers(1, min(3, len(atoms))))
        right.append(tuple(atoms[:take]))
        atoms = atoms[take:]
    if draw(st.integers(0, 3)) == 0:
        right.insert(draw(st.integers(0, len(right))), ())
    return Rearrange(left, tuple(right))


def op_for(draw: Draw, kind: type[Op], type_: TensorType) -> Op | None:
    """An op of one input that fits `type_`, or None where there is none."""
    axes = named(type_)
    if kind is Rearrange:
        return rearrange_for(draw, type_)
    if kind is Scale:
        return Scale(draw(st.sampled_from(FACTORS))) if type_.dtype in NARROW else None
    if kind is Add:
        return Add(draw(st.sampled_from((1.0, 0.0, -0.5, 0.1)))) if type_.dtype in NARROW else None
    if kind is Cast:
        return Cast(draw(st.sampled_from(FLOATS)) if type_.dtype in FLOATS else type_.dtype)
    if kind is Transpose:
        return (
            Transpose(tuple(draw(st.permutations([a.name for a in type_.axes]))))
            if len(axes) == len(type_.axes)
            else None
        )
    if not axes:
        return None
    at = draw(st.sampled_from(axes))
    axis = type_.axes[at]
    if kind is Rename:
        return Rename(at, fresh(type_, 1)[0])
    if kind is ReshapeHeads or kind is SplitLast:
        axis = axis if kind is ReshapeHeads else type_.axes[-1]
        if kind is SplitLast and not axis.name:
            return None
        sizes = draw(st.sampled_from(factorings(axis.size)))
        into = tuple(Axis(n, size) for n, size in zip(fresh(type_, len(sizes)), sizes, strict=True))
        return ReshapeHeads(axis.name, into) if kind is ReshapeHeads else SplitLast(into)
    if kind is Split or kind is Interleave:
        parts = draw(st.sampled_from([n for n in range(1, axis.size + 1) if axis.size % n == 0]))
        return (
            Split(axis.name, parts, draw(st.integers(0, parts - 1))) if kind is Split else Interleave(axis.name, parts)
        )
    if kind is PermuteRope:
        return PermuteRope(axis.name) if axis.size % 2 == 0 else None
    if kind is Slice:
        cuts: list[tuple[str, int, int | None]] = []
        for i in draw(st.lists(st.sampled_from(axes), min_size=1, max_size=2, unique=True)):
            begin = draw(st.integers(0, type_.axes[i].size - 1))
            end = draw(st.one_of(st.none(), st.integers(begin + 1, type_.axes[i].size)))
            cuts.append((type_.axes[i].name, begin, end))
        return Slice(tuple(cuts))
    if kind is Resize:
        return Resize(axis.name, draw(st.integers(1, axis.size + 5)))
    assert kind is Pad, kind
    return Pad(axis.name, axis.size + draw(st.integers(0, 5)))


Case = tuple[Op, tuple[TensorType, ...]]


def _single(kind: type[Op], dtypes: Sequence[str] = DTYPES, least: int = 0) -> st.SearchStrategy[Case]:
    @st.composite
    def build(draw: Draw) -> Case | None:
        type_ = draw(types(dtypes, least))
        op = op_for(draw, kind, type_)
        return None if op is None else (op, (type_,))

    return build().filter(lambda case: case is not None)


@st.composite
def _concat(draw: Draw) -> Case:
    first = draw(types(least=1).filter(named))
    at = draw(st.sampled_from(named(first)))
    axis = first.axes[at]
    sizes = [axis.size, *draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))]
    inputs = tuple(first.with_axes((*first.axes[:at], Axis(axis.name, n), *first.axes[at + 1 :])) for n in sizes)
    return Concat(axis.name), inputs


@st.composite
def _stack(draw: Draw) -> Case:
    type_ = draw(types())
    return Stack(fresh(type_, 1)[0]), (type_,) * draw(st.integers(2, 4))


# The laws hold for every op that is listed here; a test asserts that all of the vocabulary is.
CASES: dict[type[Op], st.SearchStrategy[Case]] = {
    **{kind: _single(kind) for kind in (Rearrange, Transpose, Cast)},
    **{
        kind: _single(kind, least=1)
        for kind in (ReshapeHeads, SplitLast, Split, Slice, Interleave, PermuteRope, Pad, Resize, Rename)
    },
    Scale: _single(Scale, NARROW),
    Add: _single(Add, NARROW),
    Concat: _concat(),
    Stack: _stack(),
}


# --- leaves and chains --------------------------------------------------------------------------


@dataclass
class Made:
    """An array, and the same array as parts of sources."""

    type: TensorType
    array: Array
    parts: Parts
    sources: list[list[Array]] = field(default_factory=list)
    said: str = ""  # the ops, for a failing example

    def __repr__(self) -> str:
        return f"{self.said} : {self.type}"


def leaf(type_: TensorType, seed: int, number: int, grid: int) -> Made:
    """A source array; its first `grid` axes count equally shaped tensors of a list."""
    array = bits(seed, type_)
    lead, each = type_.shape[:grid], type_.shape[grid:]
    tensors = [np.ascontiguousarray(t) for t in array.reshape(prod(lead), *each)]
    axes = [whole(n, 0, prod(lead[i + 1 :])) for i, n in enumerate(lead)]
    axes += [whole(n, prod(each[i + 1 :])) for i, n in enumerate(each)]
    return Made(type_, array, [Part(number, 0, 0, tuple(axes))], [tensors], f"leaf {type_} grid {grid}")


def apply(op: Op, inputs: Sequence[Made]) -> Made:
    ins = [m.type for m in inputs]
    return Made(
        op.infer(ins),
        np.asarray(op.forward([m.array for m in inputs], ins)),
        op.lower([m.parts for m in inputs], ins),
        [tensors for m in inputs for tensors in m.sources],
        f"{' | '.join(m.said for m in inputs)}; {op.describe()}",
    )


STEPS = (
    Rearrange,
    Rearrange,
    Transpose,
    ReshapeHeads,
    SplitLast,
    Split,
    Slice,
    Slice,
    Interleave,
    PermuteRope,
    Pad,
    Pad,
    Resize,
    Scale,
    Add,
    Cast,
)


def _steps(draw: Draw, made: Made, count: int) -> Made:
    for _ in range(count):
        op = op_for(draw, draw(st.sampled_from(STEPS)), made.type)
        if op is not None and op.infer([made.type]).size <= MAX_ELEMENTS:
            made = apply(op, [made])
    return made


@st.composite
def chains(draw: Draw) -> Made:
    """Leaves, steps on one of them, perhaps a join with others, and steps after it."""
    type_ = draw(types())
    made = _steps(
        draw, leaf(type_, draw(st.integers(0, 99)), 0, draw(st.integers(0, len(type_.axes)))), draw(st.integers(0, 4))
    )
    join = draw(st.sampled_from((None, None, "concat", "stack")))
    if join is not None:
        at = named(made.type)
        if not at:
            join = "stack"
        axis = made.type.axes[draw(st.sampled_from(at))] if join == "concat" else None
        others = []
        for number in range(1, draw(st.integers(2, 3))):
            size = draw(st.integers(1, 4))
            axes = tuple(Axis(a.name, size) if a is axis else a for a in made.type.axes)
            others.append(
                leaf(made.type.with_axes(axes), draw(st.integers(0, 99)), number, draw(st.integers(0, len(axes))))
            )
        op = Stack(fresh(made.type, 1)[0]) if axis is None else Concat(axis.name)
        if others and sum(m.type.size for m in (made, *others)) <= MAX_ELEMENTS:
            made = _steps(draw, apply(op, [made, *others]), draw(st.integers(0, 4)))
    return made


@st.composite
def boxes(draw: Draw, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    lows = [draw(st.integers(0, n - 1)) for n in shape]
    return tuple((low, draw(st.integers(low + 1, n))) for low, n in zip(lows, shape, strict=True))
