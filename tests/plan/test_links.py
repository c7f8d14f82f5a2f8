"""Which chunks lie in source files as they are. Tensors of distinct numbers: a chunk is linked only where its bytes are
what it holds, and every chunk of which that is true by more than accident is.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from ckptc.ops.nest import AxisMap, Factor, Part, whole
from ckptc.plan.links import links, made
from ckptc.plan.model import Array, Beside, Decode, Operand
from plans import altered, operand
from plans import array as made_array

Values = np.ndarray[Any, Any]


def array(
    shape: tuple[int, ...], chunk: tuple[int, ...], order: tuple[int, ...] | None, *parts: Part, source: Operand
) -> Array:
    return made_array("a", shape, "bfloat16", chunk, chunk, (source,), parts, link=order)


def evaluate(made: Array) -> Values:
    """Each element as tensor * 1000 + place in it; -1 where there is no source."""
    out = np.full(made.shape, -1)
    for part in made.parts:
        for index in product(*(range(a.size) for a in part.axes)):
            at, place, tensor = [], part.base, part.first
            for i, axis in zip(index, part.axes, strict=True):
                low = axis.start
                for f in reversed(axis.factors):
                    i, digit = divmod(i, f.size)
                    low, place, tensor = low + digit * f.weight, place + digit * f.step, tensor + digit * f.tensor
                at.append(low)
            out[tuple(at)] = -1 if part.source is None else tensor * 1000 + place
    return out


def assert_links(a: Array, cells: list[int]) -> None:
    """The linked cells are these, each is a run of numbers in the stored order, and the others are what is made."""
    found, values = links(a.kind), evaluate(a)
    assert sorted(found.cells.tolist()) == cells
    grid = [-(-n // c) for n, c in zip(a.shape, a.chunk, strict=True)]
    boxes = {
        cell: tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, a.chunk, strict=True))
        for cell, index in enumerate(product(*map(range, grid)))
    }
    for cell, tensor, element in zip(found.cells, found.tensors, found.elements, strict=True):
        chunk = values[boxes[cell]].transpose(a.link or ()).ravel()
        assert chunk.tolist() == list(range(tensor * 1000 + element, tensor * 1000 + element + chunk.size))
    others = [values[tuple(slice(*x) for x in box)].tolist() for box in made(a.kind)]
    assert others == [values[box].tolist() for cell, box in boxes.items() if cell not in cells]


STACK = operand("bfloat16", (6, 4), (0, 1, 2))  # three tensors [6, 4]
TURNED = Part(0, 0, 0, (whole(4, 1), whole(3, 0, 1), whole(6, 4)))  # [4, 3, 6]: transposed and stacked


def test_transposed_tensors_of_a_stack_are_chunks_in_their_order() -> None:
    assert_links(array((4, 3, 6), (4, 1, 6), (1, 2, 0), TURNED, source=STACK), [0, 1, 2])


def test_a_chunk_may_be_some_rows_of_a_tensor() -> None:
    assert_links(array((4, 3, 6), (4, 1, 2), (1, 2, 0), TURNED, source=STACK), list(range(9)))


@pytest.mark.parametrize(
    ("chunk", "order", "why"),
    [
        ((2, 1, 6), (1, 2, 0), "rows are cut"),
        ((4, 3, 6), (1, 2, 0), "three tensors are one chunk"),
        ((4, 1, 6), (1, 0, 2), "another order"),
        ((4, 1, 6), None, "no order at all"),
    ],
)
def test_nothing_else_is_a_chunk(chunk: tuple[int, ...], order: tuple[int, ...] | None, why: str) -> None:
    a = array((4, 3, 6), chunk, order, TURNED, source=STACK)
    assert links(a.kind).cells.size == 0, why


def test_arithmetic_other_dtypes_and_codes_are_not_linked() -> None:
    a = array((4, 3, 6), (4, 1, 6), (1, 2, 0), TURNED, source=STACK)
    assert links(altered(a, parts=(replace(TURNED, math=(("scale", 2.0),)),)).kind).cells.size == 0
    assert links(altered(a, dtype="float16").kind).cells.size == 0
    coded = operand(
        "bfloat16",
        (6, 4),
        (0, 1, 2),
        Decode("fp8", (("block", (2, 2)), ("flat", False)), (6, 4), (Beside("float32", (3, 2)),)),
        (3, 4, 5),
    )
    assert links(altered(a, sources=(coded,)).kind).cells.size == 0
    assert links(altered(a, parts=(replace(TURNED, math=(("cast", "bfloat16"),)),)).kind).cells.size == 3


def test_padding_and_chunks_that_reach_past_the_edge_are_made() -> None:
    rows = Part(0, 0, 0, (whole(6, 4), whole(4, 1)))
    pad = Part(None, 0, 0, (AxisMap(6, (Factor(3, 1, 0),)), whole(4, 0)))
    assert_links(array((9, 4), (2, 4), (0, 1), rows, pad, source=STACK), [0, 1, 2])
    assert_links(array((9, 4), (4, 4), (0, 1), rows, pad, source=STACK), [0])


def test_a_part_of_a_tensor_begins_where_it_does() -> None:
    """Rows 2 to 5 of a tensor, after two rows of another."""
    first = Part(0, 16, 0, (whole(2, 4), whole(4, 1)))
    second = Part(0, 8, 1, (AxisMap(2, (Factor(4, 1, 4),)), whole(4, 1)))
    assert_links(array((6, 4), (2, 4), (0, 1), first, second, source=STACK), [0, 1, 2])
    assert_links(array((6, 4), (3, 4), (0, 1), first, second, source=STACK), [1])


def test_heads_may_be_cut_out_of_rows() -> None:
    """[embed=4, heads=3, head_dim=2] of [(heads head_dim), embed]; and with head_dim turned around, element by element."""
    plain = Part(0, 0, 0, (whole(4, 1), whole(3, 8), whole(2, 4)))
    assert_links(array((4, 3, 2), (4, 3, 2), (1, 2, 0), plain, source=STACK), [0])
    assert_links(array((4, 3, 2), (4, 1, 2), (1, 2, 0), plain, source=STACK), [0, 1, 2])
    turned = Part(0, 0, 0, (whole(4, 1), whole(3, 4), whole(2, 12)))
    assert_links(array((4, 3, 2), (4, 3, 1), (2, 1, 0), turned, source=STACK), [0, 1])
    assert_links(array((4, 3, 2), (4, 1, 2), (1, 2, 0), turned, source=STACK), [])


def test_a_number_without_axes_is_linked() -> None:
    scalar = operand("bfloat16", (), (0,))
    assert_links(array((), (), (), Part(0, 0, 0, ()), source=scalar), [0])
