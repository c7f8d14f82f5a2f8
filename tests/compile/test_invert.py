"""The inverse of index nests: whatever the ops, the parts of a tensor take from the array just what the array took
from it.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ops.evaluate import elements
from tests.ops.strategies import CASES, Made, apply, chains, leaf

from ckptc.compile.fold import Folded
from ckptc.compile.invert import Inverted, invert
from ckptc.diagnostics import Span
from ckptc.ir.graph import Fill, Graph, Leaf, Target
from ckptc.ops import Axis, Concat, Op, Pad, Rearrange, Resize, Slice, Split, SplitLast, TensorType, Transpose
from ckptc.ops.nest import Part
from ckptc.plan.regions import Region, axis_of, region, strides, union, within

HERE = Span("test", 1, 1)
relaxed = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def inverted(*made: Made) -> tuple[dict[str, Inverted], list[Any]]:
    """Arrays as targets `t0`, `t1`, …; tensor j of their leaf i is called `i.j`."""
    targets, folded = [], []
    for n, m in enumerate(made):
        targets.append(Target((f"t{n}",), Fill(0.0, m.type, HERE), f"rule {n}", HERE))
        leaves = tuple(
            Leaf(tuple(f"{i}.{j}" for j in range(len(tensors))), (Axis("n", len(tensors)),), type_of(tensors[0]), HERE)
            for i, tensors in enumerate(m.sources)
        )
        folded.append(Folded(leaves, tuple(m.parts)))
    return invert(Graph(tuple(targets), ()), folded)


def type_of(array: Any) -> TensorType:
    return TensorType(tuple(Axis(f"a{i}", n) for i, n in enumerate(array.shape)), array.dtype.name)


def forward_pairs(made: Made) -> set[tuple[str, int, int]]:
    """(tensor, element of it, element of the array) for every element that the array takes from a tensor."""
    steps = strides(made.type.shape)
    return {
        (f"{part.source}.{tensor}", element, sum(i * s for i, s in zip(index, steps, strict=True)))
        for part in made.parts
        if part.source is not None
        for index, tensor, element in elements(part)
    }


def inverse_pairs(made: Made, tensors: dict[str, Inverted]) -> list[tuple[str, int, int]]:
    out = []
    for name, tensor in tensors.items():
        steps = strides(tensor.leaf.each.shape)
        for piece in [*tensor.pieces, *tensor.twins]:
            for part in piece.template.parts:
                for index, _, element in elements(part):
                    out.append((name, sum(i * s for i, s in zip(index, steps, strict=True)), element + piece.offset))
    return out


@relaxed
@given(made=chains())
def test_the_inverse_pairs_the_same_elements(made: Made) -> None:
    tensors, _ = inverted(made)
    found = inverse_pairs(made, tensors)
    assert len(found) == len(set(found))
    assert set(found) == forward_pairs(made)


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.name)
@relaxed
@given(data=st.data())
def test_every_op_is_undone_to_the_last_element(kind: type[Op], data: st.DataObject) -> None:
    """Of each tensor that it reads, but for what a slice drops, which other rules keep."""
    op, ins = data.draw(CASES[kind])
    with np.errstate(all="ignore"):
        made = apply(op, [leaf(type_, n, n, 0) for n, type_ in enumerate(ins)])
    tensors, _ = inverted(made)
    found = inverse_pairs(made, tensors)
    assert len({(name, element) for name, element, _ in found}) == len(found), "each element is taken once"
    drops = kind in (Slice, Split) or (isinstance(op, Resize) and made.type.size < ins[0].size)
    assert drops or len(found) == sum(type_.size for type_ in ins)
    assert {(place, element) for _, element, place in found} == {(p, e) for _, e, p in forward_pairs(made)}


@relaxed
@given(made=chains())
def test_each_loop_stays_within_an_axis_of_the_array(made: Made) -> None:
    """So a box of the array holds just what a part needs, but for strides."""
    tensors, _ = inverted(made)
    shape = made.type.shape
    for tensor in tensors.values():
        for piece in tensor.pieces:
            for part in piece.template.parts:
                moved = Part(0, part.base + piece.offset, 0, part.axes)
                box = region(moved, shape)
                held = set(flat(box, shape))
                wanted = [element for _, _, element in elements(moved)]
                assert set(wanted) <= held
                places = [element for _, _, element in elements(within(moved, shape, box))]
                assert [flat(box, shape)[p] for p in places] == wanted


def flat(box: Region, shape: tuple[int, ...]) -> list[int]:
    """The elements of a box, in the order in which reading it puts them."""
    assert all(start + stride * (count - 1) < n for (start, stride, count), n in zip(box.axes, shape, strict=True))
    steps = strides(shape)
    ranges = (range(start, start + stride * count, stride) for start, stride, count in box.axes)
    return [sum(i * s for i, s in zip(index, steps, strict=True)) for index in product(*ranges)]


def test_rows_that_do_not_fit_are_cut() -> None:
    """[3, 2] as [2, 3]: the rows of one begin within those of the other."""
    rows, columns = Axis("c", 3), Axis("d", 2)
    made = leaf(TensorType((rows, columns), "float32"), 1, 0, 0)
    made = apply(Rearrange(((rows,), (columns,)), ((rows, columns),)), [made])
    made = apply(SplitLast((Axis("x", 2), Axis("y", 3))), [made])
    tensors, _ = inverted(made)
    assert set(inverse_pairs(made, tensors)) == forward_pairs(made)
    for part in tensors["0.0"].pieces[0].template.parts:
        wanted = [element for _, _, element in elements(part)]
        assert set(wanted) <= set(flat(region(part, (2, 3)), (2, 3)))


def test_padding_comes_from_no_tensor() -> None:
    made = apply(Pad("a", 6), [leaf(TensorType((Axis("a", 4), Axis("b", 2)), "float32"), 1, 0, 0)])
    _, constants = inverted(made)
    ((target, part),) = [(c.target, c.part) for c in constants]
    assert target == 0 and [(a.start, a.stop) for a in part.axes] == [(4, 6), (0, 2)]


def test_a_tensor_in_two_arrays_is_taken_from_the_first() -> None:
    made = leaf(TensorType((Axis("a", 4), Axis("b", 2)), "float32"), 1, 0, 0)
    turned = apply(Transpose(("b", "a")), [made])
    tensors, _ = inverted(made, turned)
    (tensor,) = tensors.values()
    assert [p.template.target for p in tensor.pieces] == [0]
    assert [p.template.target for p in tensor.twins] == [1]


def test_halves_in_two_arrays_are_both_taken() -> None:
    made = leaf(TensorType((Axis("a", 4), Axis("b", 2)), "float32"), 1, 0, 0)
    halves = [apply(Slice((("a", low, low + 2),)), [made]) for low in (0, 2)]
    tensors, _ = inverted(*halves)
    (tensor,) = tensors.values()
    assert sorted(p.template.target for p in tensor.pieces) == [0, 1] and not tensor.twins


def test_parts_of_one_array_belong_to_several_tensors() -> None:
    type_ = TensorType((Axis("a", 2), Axis("b", 3)), "float32")
    made = apply(Concat("a"), [leaf(type_, n, n, 0) for n in range(2)])
    tensors, _ = inverted(made)
    assert {n: t.pieces[0].offset + t.pieces[0].template.parts[0].base for n, t in tensors.items()} == {
        "0.0": 0,
        "1.0": 6,
    }


@pytest.mark.parametrize(
    ("boxes", "joined"),
    [
        ([(0, 1, 3), (3, 1, 2)], (0, 1, 5)),
        ([(0, 4, 3), (2, 4, 3)], (0, 2, 6)),
        ([(5, 1, 1), (1, 1, 1)], (1, 4, 2)),
        ([(0, 2, 3), (1, 1, 1)], (0, 1, 5)),
    ],
)
def test_a_union_holds_both_and_keeps_common_strides(
    boxes: list[tuple[int, int, int]], joined: tuple[int, int, int]
) -> None:
    assert union(Region((b,)) for b in boxes).axes == (joined,)


def test_chunks_touched_are_counted_whole_and_cut_at_the_edge() -> None:
    assert Region(((3, 1, 2),)).chunked((4,), (10,)) == 8
    assert Region(((8, 1, 2),)).chunked((4,), (10,)) == 2
    assert Region(((0, 8, 2),)).chunked((4,), (10,)) == 4 + 2


def test_a_loop_moves_along_the_axis_its_step_belongs_to() -> None:
    assert [axis_of(step, (3, 1, 4)) for step in (1, 3, 4, 8)] == [2, 2, 0, 0]
    assert prod((3, 1, 4)) == 12


def test_values_come_back() -> None:
    type_ = TensorType((Axis("a", 4), Axis("b", 6)), "float32")
    made = apply(Transpose(("b", "a")), [leaf(type_, 1, 0, 0)])
    tensors, _ = inverted(made)
    out = np.empty(type_.size, np.float32)
    for _, own, place in inverse_pairs(made, tensors):
        out[own] = made.array.reshape(-1)[place]
    assert out.tobytes() == made.sources[0][0].tobytes()
