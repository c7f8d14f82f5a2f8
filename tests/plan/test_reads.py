"""What a part needs, against walking its elements one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.evaluate import elements
from tests.ops.strategies import boxes, chains

from ckptc.ops.codes import RowLayout
from ckptc.ops.codes.fp8 import Fp8
from ckptc.ops.nest import AxisMap, Factor, Part, restrict_part, whole
from ckptc.plan.model import Beside, Decode, Stored
from ckptc.plan.reads import (
    GAP,
    WASTE,
    Read,
    aligned,
    beside_runs,
    element_loops,
    need,
    places_in,
    plan_read,
    plan_rows,
    tensors_of,
)

Draw = Callable[[st.SearchStrategy[Any]], Any]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
relaxed = settings(max_examples=80, deadline=None)


@st.composite
def parts(draw: Draw) -> tuple[Part, int]:
    """A part of a random chain of ops, within a box of its target, and the elements of each tensor it reads."""
    made = draw(chains().filter(lambda m: any(p.source is not None for p in m.parts)))
    part = draw(st.sampled_from([p for p in made.parts if p.source is not None]))
    found = restrict_part(part, draw(boxes(made.type.shape))) or [part]
    return draw(st.sampled_from(found)), made.sources[part.source or 0][0].size


def wanted(part: Part) -> dict[int, list[int]]:
    """The elements a part reads of each tensor."""
    out: dict[int, list[int]] = {}
    for _, tensor, element in elements(part):
        out.setdefault(tensor, []).append(element)
    return out


# --- runs of elements -------------------------------------------------------------------------------------------------


@relaxed
@given(case=parts())
def test_runs_hold_every_element_and_stay_within_the_tensor(case: tuple[Part, int]) -> None:
    part, size = case
    read = plan_read(part)
    held = [e for first, length in read.runs() for e in range(first, first + length)]
    assert len(held) == read.size
    assert 0 <= min(held) <= max(held) < size
    for found in wanted(part).values():
        assert set(found) <= set(held)


@relaxed
@given(case=parts())
def test_the_tensors_are_those_of_the_elements(case: tuple[Part, int]) -> None:
    part, _ = case
    assert sorted(tensors_of(part)) == sorted(wanted(part))


@relaxed
@given(case=parts())
def test_a_run_wastes_at_most_as_much_as_it_needs(case: tuple[Part, int]) -> None:
    part, _ = case
    read = plan_read(part)
    assert read.size <= WASTE * len(next(iter(wanted(part).values())))


def test_rows_that_lie_together_are_one_run() -> None:
    part = Part(0, 40, 0, (whole(3, 10), whole(10, 1)))
    assert plan_read(part) == Read(40, 30, ())


def test_columns_far_apart_are_a_run_for_each_row() -> None:
    part = Part(0, 7, 0, (whole(4, 100), whole(10, 1)))
    assert plan_read(part).runs() == [(7, 10), (107, 10), (207, 10), (307, 10)]


def test_every_other_row_is_read_with_those_between() -> None:
    part = Part(0, 0, 0, (whole(8, 20), whole(10, 1)))
    assert plan_read(part).runs() == [(0, 150)]


def test_every_third_row_is_not() -> None:
    assert len(plan_read(Part(0, 0, 0, (whole(8, 30), whole(10, 1)))).runs()) == 8


# --- rows of decoded tensors ------------------------------------------------------------------------------------------


def rows_of_length(length: int, size: int) -> RowLayout:
    return RowLayout((size // length,), length, length, ())


@relaxed
@given(case=parts(), data=st.data())
def test_rows_hold_every_element_where_the_steps_say(case: tuple[Part, int], data: st.DataObject) -> None:
    """Of the tensor cut into rows of any length: walk the decoded rows by `steps`, and meet the elements in order."""
    part, size = case
    length = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    rows = plan_rows(part, rows_of_length(length, size))
    numbers = rows.numbers().tolist()
    assert len(numbers) == rows.count
    assert 0 <= min(numbers) <= max(numbers) < size // length
    decoded = [row * length + column for row in numbers for column in range(length)]
    loops = element_loops(part)
    for counts in np.ndindex(*(f.size for f in loops)):
        element = part.base + sum(i * f.step for i, f in zip(counts, loops, strict=True))
        place = rows.column + sum(i * step for i, step in zip(counts, rows.steps, strict=True))
        assert decoded[place] == element


@relaxed
@given(case=parts(), data=st.data())
def test_a_row_is_read_where_its_place_says(case: tuple[Part, int], data: st.DataObject) -> None:
    part, size = case
    length = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    rows = plan_rows(part, rows_of_length(length, size))
    read = [e for first, run in rows.read.runs() for e in range(first, first + run)]
    places = rows.places()
    assert len(places) == rows.count
    for row, place in zip(rows.numbers().tolist(), places.tolist(), strict=True):
        assert read[place * length : (place + 1) * length] == list(range(row * length, (row + 1) * length))


@relaxed
@given(data=st.data())
def test_whole_rows_in_any_order_are_decoded_once_each(data: st.DataObject) -> None:
    """Some rows and some columns, transposed or not: exactly the rows with an element that is needed."""
    count, length = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8))
    first, step = data.draw(st.integers(0, count - 1)), data.draw(st.integers(1, 4))
    taken = data.draw(st.integers(1, -(-(count - first) // step)))
    low = data.draw(st.integers(0, length - 1))
    axes = [whole(taken, step * length), whole(data.draw(st.integers(1, length - low)), 1)]
    part = Part(0, first * length + low, 0, tuple(data.draw(st.permutations(axes))))
    rows = plan_rows(part, rows_of_length(length, count * length))
    needed = sorted({e // length for e in wanted(part)[0]})
    assert rows.numbers().tolist() == needed


def test_a_walk_over_the_ends_of_rows_decodes_all_rows_between() -> None:
    """Rows of 6 from element 3 on, in a tensor whose rows are 4 long."""
    part = Part(0, 3, 0, (AxisMap(0, (Factor(3, 1, 6),)), AxisMap(0, (Factor(6, 1, 1),))))
    assert plan_rows(part, rows_of_length(4, 24)).numbers().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_step_may_move_on_along_the_row_too() -> None:
    """Elements 0, 9 and 18 in rows of 4: columns 0, 1 and 2 of every other row."""
    rows = plan_rows(Part(0, 0, 0, (whole(3, 9),)), rows_of_length(4, 24))
    assert rows.numbers().tolist() == [0, 2, 4]
    assert rows.steps == (4 + 1,)


def test_rows_of_several_runs_have_their_place_in_what_is_read() -> None:
    """Two of every ten rows, of each of three hundreds: runs of two, one after the other."""
    part = Part(0, 0, 0, (whole(3, 100 * 4), whole(2, 10 * 4), whole(2, 4), whole(4, 1)))
    rows = plan_rows(part, rows_of_length(4, 300 * 4))
    assert rows.read.runs() == [(n * 4, 8) for n in (0, 10, 100, 110, 200, 210)]
    assert rows.places().tolist() == list(range(12))


def test_rows_with_long_rows_between_are_read_apart() -> None:
    """Every other row: one read over those between while they are short, else a read for each."""
    for length, reads in ((GAP, 1), (GAP + 1, 4)):
        rows = plan_rows(Part(0, 0, 0, (whole(4, 2 * length), whole(length, 1))), rows_of_length(length, 8 * length))
        assert len(rows.read.runs()) == reads
        assert rows.places().tolist() == ([0, 2, 4, 6] if reads == 1 else [0, 1, 2, 3])


# --- rows of scales ---------------------------------------------------------------------------------------------------


@relaxed
@given(data=st.data())
def test_a_row_has_the_scales_of_its_block(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    block = tuple(data.draw(st.lists(st.integers(1, 4), max_size=len(shape))))
    layout, lead = Fp8(block).layout(shape), len(shape) - len(block)
    (scales,) = layout.beside
    grid = (*shape[:lead], *(-(-n // b) for n, b in zip(shape[lead:], block, strict=True)))
    assert (scales.shape, layout.each(scales)) == (grid, grid[-1])
    each = (1,) * lead + block
    for row, index in enumerate(np.ndindex(*shape[:-1])):
        expected = np.ravel_multi_index([i // b for i, b in zip(index, each, strict=False)], grid[:-1]) if index else 0
        assert layout.rows_of(scales, np.array([row])).tolist() == [expected]


@relaxed
@given(numbers=st.lists(st.integers(0, 60), min_size=1))
def test_runs_of_scales_hold_all_and_waste_little(numbers: list[int]) -> None:
    runs = beside_runs(np.array(numbers))
    held = [n for first, length in runs for n in range(first, first + length)]
    assert set(numbers) <= set(held)
    assert len(held) == len(set(held)) <= WASTE * len(set(numbers))
    assert [held[i] for i in places_in(runs, np.array(numbers))] == numbers


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_a_plain_part_needs_what_it_reads() -> None:
    part = Part(0, 0, 0, (whole(2, 0, 1), whole(3, 5), whole(5, 1)))
    found = need(part, Stored("bfloat16", (3, 5), 2))
    assert (found.tensors, found.read, found.memory) == ([0, 1], 2 * 15 * 2, aligned(60))
    assert aligned(60) == 64


def test_a_decoded_part_needs_codes_scales_and_rows() -> None:
    """Three of eight rows, in the second and third of four blocks of rows, of each of two tensors."""
    part = Part(0, 3 * 10, 0, (whole(2, 0, 1), whole(3, 10), whole(4, 1)))
    scales = Beside("float32", (4, 3))
    decode = Decode("fp8", (("block", (2, 4)), ("flat", False)), (8, 10), (scales,))
    found = need(part, Stored("float8_e4m3fn", (8, 10), 2, decode=decode))
    assert found.values.runs() == [(30, 30)]
    assert [b.runs for b in found.beside] == [[(3, 6)]], "the second and third row of scales, of three each"
    assert found.beside[0].places.tolist() == [0, 1, 1]
    assert found.read == 2 * (30 + 2 * 3 * 4)
    assert found.memory == aligned(2 * 30) + aligned(2 * 2 * 3 * 4) + 2 * 3 * 10 * 4


def test_mxfp4_codes_are_half_a_byte() -> None:
    decode = Decode("mxfp4", (("groups", False),), (4, 64), (Beside("uint8", (4, 2)),))
    found = need(Part(0, 0, 0, (whole(4, 64), whole(64, 1))), Stored("uint8", (4, 32), decode=decode))
    assert (found.value_bytes, found.beside[0].bytes, found.decoded_bytes) == (4 * 32, 8, 4 * 64 * 4)


def test_what_all_rows_share_is_needed_once() -> None:
    """The scale of all of an nvfp4 weight, however few of its rows are needed."""
    beside = (Beside("float8_e4m3fn", (6, 2)), Beside("float32", (1,)))
    decode = Decode("nvfp4", (("divides", True),), (6, 32), beside)
    found = need(Part(0, 2 * 32, 0, (whole(2, 3 * 32), whole(32, 1))), Stored("uint8", (6, 16), decode=decode))
    assert [b.runs for b in found.beside] == [[(4, 8)], [(0, 1)]]
    assert [b.places.tolist() for b in found.beside] == [[0, 3], [0, 0]]
