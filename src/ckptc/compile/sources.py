"""sources: the tensors that a rule names as one array, those that are stored as codes decoded.

Before: 26 names, of which some are weights in int4 and some in bfloat16, as it often is with the first and last layers.
After: leaves of one kind each, joined along the axis that counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

from ckptc.compile.quantised import Quantised
from ckptc.diagnostics import Span
from ckptc.ir.graph import Apply, Beside, Decoded, Leaf, Node
from ckptc.ops import Cast, Concat, Op
from ckptc.ops.types import Axis, OpError, TensorType

StoredDtype = Callable[[str], str]  # the dtype of a stored tensor by name


def source(
    names: tuple[str, ...],
    grid: tuple[Axis, ...],
    each: TensorType,
    quantised: Quantised,
    stored: StoredDtype,
    span: Span,
) -> Node:
    """The array whose axes `grid` count the tensors, row-major. `each`: a tensor's axes.

    Raises OpError where a weight of these axes cannot be stored as its tensors are.
    """
    weights = quantised.weights
    kinds = [w and (w.code, stored(w.stored)) for w in map(weights.get, names)] if weights else []
    if not any(kinds):
        return Leaf(names, grid, TensorType(each.axes, stored(names[0])), span)
    if len(set(kinds)) == 1:
        return _coded(names, grid, each, quantised, stored, span)
    number = next(i for i, axis in enumerate(grid) if axis.size > 1)
    lead, axis, rest = grid[:number], grid[number], grid[number + 1 :]
    share = prod(a.size for a in rest)
    rows = [tuple(kinds[i : i + share]) for i in range(0, len(names), share)]
    stretches = list(_runs(rows))
    if len(stretches) == 1:  # each row has several kinds in it
        stretches = [(n, n + 1) for n in range(axis.size)]
    parts = []
    for begin, end in stretches:
        own = (*lead, Axis(axis.name, end - begin), *rest)
        part = source(names[begin * share : end * share], own, each, quantised, stored, span)
        parts.append(part if part.type.dtype == "float32" else _apply(Cast("float32"), (part,), span))
    return _apply(Concat(axis.name), tuple(parts), span)


def _coded(
    names: tuple[str, ...],
    grid: tuple[Axis, ...],
    each: TensorType,
    quantised: Quantised,
    stored: StoredDtype,
    span: Span,
) -> Leaf:
    """Weights that are all stored as codes, in one way."""
    found = [quantised.weights[n] for n in names]
    code, first = found[0].code, found[0]
    try:
        codes = TensorType(_anonymous(code.stored(each.shape)), stored(first.stored))
        layout = code.layout(each.shape)
    except OpError as error:
        raise OpError(f"`{names[0]}` is stored as {code.describe()}: {error}") from None
    beside = tuple(
        Beside(tuple(w.beside[n] for w in found), TensorType(_anonymous(wanted.shape), stored(first.beside[n])))
        for n, wanted in enumerate(layout.beside)
    )
    decoded = Decoded(code, codes, beside)
    return Leaf(tuple(w.stored for w in found), grid, TensorType(each.axes, "float32"), span, decoded)


def _apply(op: Op, nodes: tuple[Node, ...], span: Span) -> Apply:
    return Apply(op, nodes, op.infer([n.type for n in nodes]), span)


def _anonymous(shape: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(Axis("", n) for n in shape)


def _runs(items: Sequence[object]) -> Iterator[tuple[int, int]]:
    """[begin, end) of equal items that follow each other."""
    begin = 0
    for end in range(1, len(items) + 1):
        if end == len(items) or items[end] != items[begin]:
            yield begin, end
            begin = end
