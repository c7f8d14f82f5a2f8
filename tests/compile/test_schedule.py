"""Units and chunks: they fit the array, the shards and the budget, and their cost is what they read and hold."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ops.strategies import Made, chains

from ckptc.compile.fold import leaf_part
from ckptc.compile.schedule import account, fit, shard_counts, unit_budget
from ckptc.diagnostics import Span
from ckptc.ir.graph import Leaf
from ckptc.ops import (
    Axis,
    Cast,
    Op,
    Pad,
    Rearrange,
    Slice,
    TensorType,
    Transpose,
)
from ckptc.ops.base import Parts
from ckptc.ops.codes import Code
from ckptc.ops.codes.fp8 import Fp8
from ckptc.ops.codes.mxfp4 import Mxfp4
from ckptc.ops.nest import restrict_part
from ckptc.plan.model import Array, Beside, Content, Decode, Operand
from ckptc.plan.reads import need
from plans import array as made_array
from plans import operand

Shape = tuple[int, ...]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
relaxed = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


class Case(NamedTuple):
    """An array to be scheduled."""

    type: TensorType
    sources: tuple[Operand, ...]
    parts: Parts

    def array(self, budget: int, shards: int = 1) -> Array:
        counts = shard_counts(self.type.shape, shards)
        shape, dtype, parts = self.type.shape, self.type.dtype, tuple(self.parts)
        chunk, unit = fit(Content(shape, dtype, tuple(s.stored for s in self.sources), parts), counts, budget)
        return made_array("x", shape, dtype, chunk, unit, self.sources, parts, shards=counts)


def after(op: Op, case: Case) -> Case:
    return Case(op.infer([case.type]), case.sources, op.lower([case.parts], [case.type]))


def plain(dtype: str, grid: Shape, *each: int) -> Case:
    """A stack of tensors: axes t0… count them, a0… are their own."""
    type_ = TensorType(tuple(Axis(f"a{i}", n) for i, n in enumerate(each)), dtype)
    count = prod(grid)
    leaf = Leaf(("x",) * count, tuple(Axis(f"t{i}", n) for i, n in enumerate(grid)), type_, Span("", 1, 1, 1))
    return Case(leaf.type, (operand(dtype, each, range(count)),), [leaf_part(leaf, 0)])


def quantised(code: Code, dtype: str, scale: str, grid: Shape, *shape: int) -> Case:
    """The same of weights that are stored as codes."""
    case, count = plain("float32", grid, *shape), prod(grid)
    (scales,) = code.layout(shape).beside
    decode = Decode(code.name, code.settings(), shape, (Beside(scale, scales.shape),))
    sources = (operand(dtype, code.stored(shape), range(count), decode, range(count, 2 * count)),)
    return Case(case.type, sources, case.parts)


def case_of(made: Made) -> Case:
    sources = tuple(operand(t[0].dtype.name, t[0].shape, range(len(t))) for t in made.sources)
    return Case(made.type, sources, made.parts)


fp8 = quantised(Fp8((128, 128)), "float8_e4m3fn", "float32", (3, 2), 300, 700)
CASES: dict[str, Case] = {
    "transposed": after(Transpose(("a1", "t0", "a0")), plain("bfloat16", (3,), 500, 640)),
    "float32 to bfloat16": after(Cast("bfloat16"), plain("float32", (3,), 500, 640)),
    "padded": after(Pad("a0", 1024), plain("bfloat16", (), 1000, 320)),
    "one of two interleaved": after(
        Slice((("odd", 0, None),)),
        after(
            Rearrange(
                ((Axis("a0", 640),), (Axis("pair", 300), Axis("odd", 2))),
                ((Axis("a0", 640),), (Axis("pair", 300),), (Axis("odd", 2),)),
            ),
            plain("bfloat16", (), 640, 600),
        ),
    ),
    "fp8": after(Cast("bfloat16"), fp8),
    "fp8 transposed": after(Cast("bfloat16"), after(Transpose(("t1", "a1", "t0", "a0")), fp8)),
    "fp8 of stacked experts": after(
        Transpose(("a0", "t0", "a2", "a1")),
        quantised(Fp8((16, 32)), "float8_e4m3fn", "bfloat16", (2,), 4, 100, 160),
    ),
    "fp8 with lists of scales": quantised(Fp8((128,)), "float8_e5m2", "float8_e8m0fnu", (), 400, 1000),
    "one of two interleaved, mxfp4": after(
        Transpose(("a0", "a2", "pair")),
        after(
            Slice((("odd", 1, None),)),
            after(
                Rearrange(
                    ((Axis("a0", 4),), (Axis("pair", 90), Axis("odd", 2)), (Axis("a2", 320),)),
                    ((Axis("a0", 4),), (Axis("pair", 90),), (Axis("odd", 2),), (Axis("a2", 320),)),
                ),
                quantised(Mxfp4(), "uint8", "uint8", (), 4, 180, 320),
            ),
        ),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def units(array: Array) -> list[tuple[int, int, int]]:
    """Bytes read, bytes held of what is read and decoded, and elements decoded, of each unit, one by one."""
    out = []
    for box in array.units():
        parts = [p for part in array.parts for p in restrict_part(part, box) if p.source is not None]
        needs = [need(p, array.sources[p.source or 0].stored) for p in parts]
        out.append((sum(n.read for n in needs), sum(n.memory for n in needs), sum(n.decoded_bytes for n in needs) // 4))
    return out


@pytest.mark.parametrize(
    ("shape", "shards", "counts"),
    [
        ((32, 7), 16, (16, 1)),
        ((7, 32), 16, (1, 16)),
        ((7, 9, 32), 16, (1, 1, 1)),
        ((32,), 16, (16,)),
        ((), 16, ()),
        ((32, 32), 1, (1, 1)),
    ],
)
def test_shards_lie_on_the_first_axis_they_divide_or_the_second(shape: Shape, shards: int, counts: Shape) -> None:
    assert shard_counts(shape, shards) == counts


def test_a_unit_is_a_share_of_the_memory() -> None:
    assert unit_budget(3 << 20) == 1 << 20
    assert unit_budget(1 << 40) == 72 << 20


@relaxed
@given(made=chains(), budget=st.integers(1, 2000), shards=st.sampled_from((1, 2, 3)))
def test_any_array_is_whole_chunks_in_whole_units(made: Made, budget: int, shards: int) -> None:
    array = case_of(made).array(budget, shards)
    for n, c, u, s in zip(array.shape, array.chunk, array.unit, array.shards, strict=True):
        assert 1 <= c <= u <= n
        assert u % c == 0 or u == n
        assert c <= n // s


@every_case
@pytest.mark.parametrize("budget", [20_000, 100_000, 10_000_000])
@pytest.mark.parametrize("shards", [1, 4])
def test_units_are_whole_chunks(case: Case, budget: int, shards: int) -> None:
    array = case.array(budget, shards)
    for n, c, u in zip(array.shape, array.chunk, array.unit, strict=True):
        assert u % c == 0 or u == n


@relaxed
@given(made=chains(), budget=st.integers(1, 2000))
def test_an_account_is_the_sum_and_the_largest_of_the_units(made: Made, budget: int) -> None:
    array = case_of(made).array(budget)
    found = units(array)
    assert account(array.kind)[:2] == (sum(read for read, _, _ in found), max(held for _, held, _ in found))


@every_case
@pytest.mark.parametrize("budget", [20_000, 100_000, 10_000_000])
def test_an_account_of_stacks_too(case: Case, budget: int) -> None:
    """Units along axes of tensors are counted once and multiplied."""
    array = case.array(budget)
    found = units(array)
    assert account(array.kind)[:2] == (sum(read for read, _, _ in found), max(held for _, held, _ in found))


@every_case
@pytest.mark.parametrize("budget", [20_000, 100_000, 10_000_000])
@pytest.mark.parametrize("shards", [1, 4])
def test_no_unit_exceeds_the_budget(case: Case, budget: int, shards: int) -> None:
    array = case.array(budget, shards)
    assert account(array.kind).buffers <= budget


@every_case
def test_a_larger_budget_is_used(case: Case) -> None:
    """Units take at least a quarter of the budget, where the array is large enough."""
    for budget in (20_000, 100_000):
        assert account(case.array(budget).kind).buffers > budget / 4


@every_case
@pytest.mark.parametrize("budget", [20_000, 100_000, 10_000_000])
def test_rows_are_decoded_once(case: Case, budget: int) -> None:
    array = case.array(budget)
    decoded = sum(elements for _, _, elements in units(array))
    assert decoded == (prod(array.shape) if array.sources[0].stored.decode else 0)


@every_case
def test_budgets_hardly_change_what_is_read(case: Case) -> None:
    """But for rows of scales, and rows with gaps, that two units share."""
    least = account(case.array(1 << 40).kind).read
    most = account(case.array(20_000).kind).read
    assert most <= least * 1.05


def test_a_row_beyond_the_budget_is_still_taken_whole() -> None:
    case = after(Transpose(("a1", "a0")), quantised(Fp8((2, 64)), "float8_e4m3fn", "float32", (), 8, 4096))
    array = case.array(1000)
    assert array.unit == (4096, 1)
    assert sum(elements for _, _, elements in units(array)) == 8 * 4096


def test_a_row_is_not_cut_by_its_parts_either() -> None:
    """Heads and what is in a head: two axes of the target, one row of the source."""
    case = quantised(Fp8((2, 64)), "float8_e4m3fn", "float32", (), 40, 1024)
    heads = Rearrange(
        ((Axis("a0", 40),), (Axis("heads", 16), Axis("dim", 64))),
        ((Axis("heads", 16),), (Axis("dim", 64),), (Axis("a0", 40),)),
    )
    assert after(heads, case).array(4_000).unit == (16, 64, 1)


def test_a_unit_that_needs_more_than_its_elements_gets_smaller() -> None:
    """Pieces of all rows, side by side: a piece takes all its row, so few rows must do, though they are read again."""
    case = quantised(Fp8((2, 64)), "float8_e4m3fn", "float32", (), 64, 256)
    mixed = Rearrange(
        ((Axis("a0", 64),), (Axis("x", 16), Axis("y", 16))),
        ((Axis("x", 16), Axis("a0", 64)), (Axis("y", 16),)),
    )
    array = after(mixed, case).array(40_000)
    assert account(array.kind).buffers <= 40_000
