"""Decoding through the worker: weights that are stored as codes, whatever the ops, chunks and units.

That rows decode to what a code means is tested with the codes (tests/ops/codes).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ops.codes.decoding import decoded
from tests.ops.evaluate import Array, same
from tests.ops.strategies import STEPS, Made, apply, op_for
from tests.run.test_worker import Stored, check, cuts

from ckptc.diagnostics import InputError
from ckptc.ops import Axis, Cast, ReshapeHeads, TensorType, Transpose
from ckptc.ops.codes import CODES, Code
from ckptc.ops.codes.base import random_bits
from ckptc.ops.codes.fp8 import Fp8
from ckptc.ops.codes.gptq import Gptq
from ckptc.ops.nest import AxisMap, Part, whole

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
relaxed = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
EXAMPLES = [example for kind in CODES.values() for example in kind.examples]


def stack_of(code: Code, shape: Shape, tensors: int, seed: int) -> tuple[Stored, Made]:
    """Weights of one kind, any bits, and the leaf they decode to: its first axis counts them."""
    rng = np.random.default_rng(seed)
    arrays = [code.random(shape, rng) for _ in range(tensors)]
    for beside in zip(*arrays, strict=True):
        dtypes = {a.dtype for a in beside}
        if len(dtypes) > 1:  # one kind has one dtype
            return stack_of(code, shape, tensors, seed + 1000)
    with np.errstate(all="ignore"):
        values = np.stack([code.forward(a, shape) for a in arrays])
    return Stored(code, shape, arrays), decoded_leaf(values, code.place(shape))


def decoded_leaf(array: Array, place: tuple[AxisMap, ...] | None = None) -> Made:
    """A stack of decoded tensors as a leaf: its first axis counts tensors."""
    names = [Axis(f"d{i}", n) for i, n in enumerate(array.shape)]
    each = array.shape[1:]
    own = place or tuple(whole(n, prod(each[i + 1 :])) for i, n in enumerate(each))
    type_ = TensorType(tuple(names), "float32")
    return Made(type_, array, [Part(0, 0, 0, (whole(array.shape[0], 0, 1), *own))], [list(array)], f"{array.shape}")


def test_rows_that_do_not_follow_evenly() -> None:
    """Two of every three rows, read in one run with those between."""
    code, rng = Fp8((1, 4)), np.random.default_rng(1)
    arrays = [random_bits(rng, "float8_e4m3fn", (9, 4)), random_bits(rng, "float8_e8m0fnu", (9, 1))]
    part = Part(0, 0, 0, (whole(3, 3 * 4), whole(2, 4), whole(4, 1)))
    with np.errstate(all="ignore"):
        expected = code.forward(arrays, (9, 4))[[0, 1, 3, 4, 6, 7]]
    for block in (4, 8, 1 << 15):
        assert same(decoded(code, (9, 4), arrays, part, block), expected)


def test_rows_that_share_scales_and_rows_that_do_not_come_out_alike() -> None:
    """Blocks of the size the decoder spreads scales for, a block's last rows and columns cut short."""
    code, rng = Fp8((128, 128)), np.random.default_rng(1)
    arrays = [random_bits(rng, "float8_e4m3fn", (300, 200)), random_bits(rng, "bfloat16", (3, 2))]
    part = Part(0, 0, 0, (whole(300, 200), whole(200, 1)))
    with np.errstate(all="ignore"):
        expected = code.forward(arrays, (300, 200))
    for block in (1 << 15, 1 << 10, 64):
        assert same(decoded(code, (300, 200), arrays, part, block), expected)


def test_what_a_format_does_not_allow_is_an_error_that_names_the_tensor() -> None:
    """An index of groups that are not there."""
    how, made = stack_of(Gptq(4, 8, "float16"), (16, 24), 1, 0)
    how.tensors[0][3][:] = 77
    with pytest.raises(InputError) as caught:
        check(made, (1, 16, 24), (1, 16, 24), {0: how})
    (found,) = caught.value.diagnostics
    assert found.code == "bad-codes" and found.message.startswith(
        "`0.0.0` cannot be decoded: index 77 is out of bounds"
    )


# --- through the worker -----------------------------------------------------------------------------------------------


@settings(relaxed, max_examples=100)
@given(data=st.data())
def test_decoded_sources_go_through_any_ops_in_any_units(data: st.DataObject) -> None:
    """Some tensors, ops, and a target of float32 or bfloat16: the same as decoding all and applying the ops."""
    code, shape = data.draw(st.sampled_from(EXAMPLES))
    how, made = stack_of(code, shape, data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99)))
    with np.errstate(all="ignore"):
        for _ in range(data.draw(st.integers(0, 4))):
            op = op_for(data.draw, data.draw(st.sampled_from(STEPS)), made.type)
            if op is not None and op.infer([made.type]).size <= 9000:
                made = apply(op, [made])
        if data.draw(st.booleans()) and made.type.dtype != "bfloat16":
            made = apply(Cast("bfloat16"), [made])
        check(made, *data.draw(cuts(made.type.shape)), {0: how})


def block_fp8(shape: Shape, block: Shape) -> tuple[Stored, Made]:
    """A stack of one fp8 tensor with moderate scales, and the leaf it decodes to."""
    code = Fp8(block)
    codes = random_bits(np.random.default_rng(5), "float8_e4m3fn", shape)
    scales = np.random.default_rng(6).uniform(0.5, 2, code.grid(shape)).astype(np.float32)
    return Stored(code, shape, [[codes, scales]]), decoded_leaf(code.forward([codes, scales], shape)[None])


def test_a_unit_reads_its_rows_and_their_scales_alone() -> None:
    """Ten rows of an fp8 tensor in two blocks of rows: one run of codes, one of two rows of scales."""
    how, made = block_fp8((64, 48), (16, 16))
    ran = check(apply(Cast("bfloat16"), [made]), (1, 10, 48), (1, 10, 48), {0: how})
    sizes = [size for _, size in ran.reads]
    assert sizes[:2] == [10 * 48, 1 * 3 * 4]
    assert sizes[2:4] == [10 * 48, 2 * 3 * 4]
    assert ran.bytes_read == sum(sizes)


def test_part_of_a_row_reads_the_whole_row() -> None:
    how, made = block_fp8((6, 8), (2, 4))
    ran = check(made, (1, 6, 2), (1, 6, 4), {0: how})
    assert [size for _, size in ran.reads] == [48, 3 * 2 * 4] * 2


def test_experts_in_one_tensor_keep_their_own_scales() -> None:
    how, made = block_fp8((3, 6, 10), (4, 4))
    check(apply(Transpose(("d1", "d3", "d0", "d2")), [made]), (2, 10, 1, 6), (2, 10, 1, 6), {0: how})


def test_a_grid_of_decoded_tensors_stacks_anywhere() -> None:
    """Layers and experts, two axes of fp8 tensors, on both sides of the tensors' own."""
    how, stack = stack_of(Fp8((2, 3)), (5, 6), 6, 0)
    made = apply(ReshapeHeads("d0", (Axis("layer", 2), Axis("expert", 3))), [stack])
    check(apply(Transpose(("expert", "d2", "layer", "d1")), [made]), (2, 3, 1, 5), (2, 6, 2, 5), {0: how})


def test_a_transposed_target_reads_each_row_once() -> None:
    how, made = block_fp8((24, 40), (8, 8))
    ran = check(apply(Transpose(("d2", "d0", "d1")), [made]), (10, 1, 8), (40, 1, 8), {0: how})
    assert [size for _, size in ran.reads] == [8 * 40, 1 * 5 * 4] * 3
