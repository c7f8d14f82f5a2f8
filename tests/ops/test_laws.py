"""The laws of the op algebra, for every op of the vocabulary and for random chains of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ops.evaluate import Array, counters, dtype_of, elements, evaluate, same
from tests.ops.strategies import CASES, Made, apply, bits, boxes, chains, leaf, moderate

from ckptc.ops import (
    VOCABULARY,
    Add,
    Op,
    Pad,
    Rearrange,
    Scale,
    TensorType,
)
from ckptc.ops.nest import AxisMap, Factor, Part, merge_axes, restrict_part, split_axis, whole
from ckptc.ops.pattern import parse_pattern
from ckptc.ops.rename import Rename
from ckptc.ops.types import Axis

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
relaxed = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
ARITHMETIC = (Scale, Add)
every_op = pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.name)


def inputs_for(kind: type[Op], ins: Sequence[TensorType], seed: int) -> list[Array]:
    fill = moderate if kind in ARITHMETIC else bits
    return [fill(seed + i, t) for i, t in enumerate(ins)]


def test_every_op_of_the_vocabulary_has_laws() -> None:
    assert set(CASES) == {*VOCABULARY, Rename}


def test_words_of_the_vocabulary_are_unique() -> None:
    assert len({op.name for op in VOCABULARY}) == len(VOCABULARY)


@every_op
@relaxed
@given(data=st.data())
def test_the_shape_and_dtype_rules_say_what_forward_makes(kind: type[Op], data: st.DataObject) -> None:
    op, ins = data.draw(CASES[kind])
    with np.errstate(all="ignore"):
        out = op.forward(inputs_for(kind, ins, 1), ins)
    type_ = op.infer(ins)
    assert isinstance(out, np.ndarray)
    assert (out.shape, out.dtype) == (type_.shape, dtype_of(type_.dtype))
    if kind in ARITHMETIC:
        assert type_.dtype == "float32"
    check_description(op, ins)


def check_description(op: Op, ins: Sequence[TensorType]) -> None:
    """As a mapping would say it: the op's word and its argument. `rearrange` is said by its pattern alone."""
    said = op.describe()
    if isinstance(op, Rearrange):
        pattern = parse_pattern(said)
        axes = [name for group in pattern.left for name in group]
        assert axes == [axis.name for group in op.left for axis in group]
        assert pattern.right is not None
        assert [name for group in pattern.right for name in group] == [
            axis.name for group in op.right for axis in group
        ]
        assert [len(group) for group in pattern.left] == [len(group) for group in op.left]
    else:
        word, _, argument = said.partition(" ")
        assert word == op.name and (argument.strip() or not ins[0].axes)


@every_op
@relaxed
@given(data=st.data())
def test_lowering_one_op_means_what_forward_does(kind: type[Op], data: st.DataObject) -> None:
    op, ins = data.draw(CASES[kind])
    grids = [data.draw(st.integers(0, len(t.axes))) for t in ins]
    leaves = [leaf(t, i, i, grid) for i, (t, grid) in enumerate(zip(ins, grids, strict=True))]
    with np.errstate(all="ignore"):
        check(apply(op, leaves))


def check(made: Made) -> None:
    assert same(evaluate(made.parts, made.sources, made.type.shape, made.type.dtype), made.array)
    for part in made.parts:
        for axis in part.axes:
            assert well_formed(axis), axis


def well_formed(axis: AxisMap) -> bool:
    """What `restrict` relies on: the first factors move the index furthest, past all that the others cover."""
    extent = 1
    for f in reversed(axis.factors):
        if f.size < 1 or (f.size > 1 and f.weight < extent):
            return False
        extent += (f.size - 1) * f.weight
    return True


@settings(relaxed, max_examples=400)
@given(chains())
def test_lowering_a_chain_means_what_forward_does(made: Made) -> None:
    with np.errstate(all="ignore"):
        check(made)


@settings(relaxed, max_examples=300)
@given(data=st.data())
def test_a_slice_pushed_to_the_source_is_the_slice_taken_after(data: st.DataObject) -> None:
    with np.errstate(all="ignore"):
        made = data.draw(chains())
        box = data.draw(boxes(made.type.shape))
        inside = [q for p in made.parts for q in restrict_part(p, box)]
        shape = tuple(high - low for low, high in box)
        want = made.array[(*(slice(low, high) for low, high in box), ...)]
        # `evaluate` asserts that the pieces are disjoint and cover the box.
        assert same(evaluate(inside, made.sources, shape, made.type.dtype), want)


def test_a_pad_is_computed_with_like_everything_else() -> None:
    """Zeros where there was nothing, then 1 + 0."""
    made = apply(Add(1.0), [apply(Pad("a", 4), [leaf(TensorType((Axis("a", 2),), "float32"), 0, 0, 0)])])
    assert made.array[2:].tolist() == [1.0, 1.0]
    check(made)


def test_a_fused_axis_splits_at_another_place_in_few_parts() -> None:
    """[3, 4] contiguous as [2, 6] is one part; the same of a transposed [3, 4] is cut where rows begin."""
    a, b, c, d = Axis("a", 3), Axis("b", 4), Axis("c", 2), Axis("d", 6)
    source = leaf(TensorType((a, b), "float32"), 0, 0, 0)
    again = Rearrange(((c, d),), ((c,), (d,)))
    straight = apply(again, [apply(Rearrange(((a,), (b,)), ((a, b),)), [source])])
    turned = apply(again, [apply(Rearrange(((a,), (b,)), ((b, a),)), [source])])
    check(straight)
    check(turned)
    assert len(straight.parts) == 1
    assert len(turned.parts) <= 4


@st.composite
def axis_maps(draw: st.DrawFn) -> AxisMap:
    """Any well-formed axis, with gaps between the factors."""
    factors: list[Factor] = []
    extent = 1
    for _ in range(draw(st.integers(0, 3))):
        size, weight = draw(st.integers(1, 4)), extent + draw(st.integers(0, 3))
        step, tensor = draw(st.integers(-20, 20)), draw(st.integers(-3, 3))
        if factors and draw(st.booleans()):  # advances as the one inside it goes on
            step, tensor = factors[0].step * factors[0].size, factors[0].tensor * factors[0].size
        factors.insert(0, Factor(size, weight, step, tensor))
        extent += (size - 1) * weight
    return AxisMap(draw(st.integers(0, 5)), tuple(factors))


def places(axis: AxisMap, base: int = 0, first: int = 0) -> dict[int, tuple[int, int]]:
    found = {i: (s + base, t + first) for i, s, t in counters(axis)}
    assert len(found) == axis.size
    return found


@settings(relaxed, max_examples=300)
@given(axis_maps(), st.integers(0, 40), st.integers(1, 40))
def test_restricting_an_axis_keeps_the_indices_inside(axis: AxisMap, low: int, length: int) -> None:
    part = Part(0, 7, 5, (axis,))
    want = {i - low: (s, t) for i, (s, t) in places(axis, 7, 5).items() if low <= i < low + length}
    found: dict[int, tuple[int, int]] = {}
    pieces = restrict_part(part, ((low, low + length),))
    for piece in pieces:
        got = places(piece.axes[0], piece.base, piece.first)
        assert not got.keys() & found.keys(), "pieces are disjoint"
        assert well_formed(piece.axes[0])
        assert (min(got), max(got) + 1) == (piece.axes[0].start, piece.axes[0].stop)
        found |= got
    assert found == want
    assert len(pieces) <= 2 * len(axis.factors) + 1


@settings(relaxed, max_examples=300)
@given(axis_maps(), st.integers(1, 12), st.booleans())
def test_splitting_an_axis_keeps_every_index(axis: AxisMap, inner: int, join: bool) -> None:
    found: dict[int, tuple[int, int]] = {}
    for outer, rest, step, tensor in split_axis(axis, inner, join):
        assert well_formed(outer) and well_formed(rest) and rest.stop <= inner
        if not join:  # every loop is part of one of the axis' loops: as far in the index, as far at the source
            loops = [(f.weight * inner, f.step, f.tensor) for f in outer.factors if f.size > 1]
            loops += [(f.weight, f.step, f.tensor) for f in rest.factors if f.size > 1]
            for weight, at, tensors in loops:
                assert any(
                    weight % f.weight == 0
                    and (at, tensors) == (f.step * (weight // f.weight), f.tensor * (weight // f.weight))
                    for f in axis.factors
                )
        for (i, (s, t)), (j, (u, v)) in [(x, y) for x in places(outer).items() for y in places(rest).items()]:
            assert i * inner + j not in found
            found[i * inner + j] = (s + u + step, t + v + tensor)
    assert found == places(axis)


@relaxed
@given(st.lists(st.integers(1, 4), max_size=3))
def test_merging_axes_counts_row_major(sizes: list[int]) -> None:
    axes = tuple(whole(n, 1) for n in sizes)
    merged = merge_axes(axes, tuple(sizes))
    assert [i for i, _, _ in counters(merged)] == list(range(int(np.prod(sizes))))


@pytest.mark.parametrize(
    "broken",
    [
        [Part(0, 0, 0, (whole(3, 1),))],  # not all
        [Part(0, 0, 0, (whole(4, 1),)), Part(None, 0, 0, (AxisMap(1, ()),))],  # one twice
        [Part(0, 1, 0, (whole(4, 1),))],  # past the end
        [Part(0, 0, 0, (whole(4, -1),))],
        [Part(0, 0, 1, (whole(4, 1),))],  # there is one tensor
        [Part(0, 0, 0, (AxisMap(1, (Factor(4, 1, 1),)),))],  # outside the target
        [Part(0, 0, 0, (whole(4, 1),), (("cast", "bfloat16"),))],  # another dtype
    ],
)
def test_the_reference_refuses_parts_that_are_wrong(broken: list[Part]) -> None:
    source = np.arange(4, dtype=np.float32)
    assert same(evaluate([Part(0, 0, 0, (whole(4, 1),))], [[source]], (4,), "float32"), source)
    with pytest.raises(AssertionError):
        evaluate(broken, [[source]], (4,), "float32")


def test_a_part_knows_its_size() -> None:
    part = Part(0, 0, 0, (whole(3, 4), AxisMap(1, (Factor(2, 2, 1),))))
    assert part.size == len(list(elements(part))) == 6
