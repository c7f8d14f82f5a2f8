"""What each word does, by example: the laws hold of any permutation, these say which one it is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tests.ops.evaluate import dtype_of

from ckptc.ops import (
    VOCABULARY,
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
from ckptc.ops.rename import Rename

A, B, X, Y = Axis("a", 2), Axis("b", 3), Axis("x", 2), Axis("y", 3)
M = [[0, 1, 2], [3, 4, 5]]

# An op, its inputs with the names of their axes, its output with the names of its axes.
MEANINGS: list[tuple[Op, list[tuple[object, str]], object, str]] = [
    (Rearrange(((A,), (B,)), ((B,), (A,))), [(M, "a b")], [[0, 3], [1, 4], [2, 5]], "b a"),
    (Rearrange(((A,), (B,)), ((A, B),)), [(M, "a b")], [0, 1, 2, 3, 4, 5], "(a b)"),
    (Rearrange(((A,), (B,)), ((B, A), ())), [(M, "a b")], [[0], [3], [1], [4], [2], [5]], "(b a) 1"),
    (Rearrange(((A, B),), ((B,), (A,))), [([0, 1, 2, 3, 4, 5], "rows")], [[0, 3], [1, 4], [2, 5]], "b a"),
    (Rearrange(((), (A,)), ((A,),)), [([[7, 8]], "1 a")], [7, 8], "a"),
    (Transpose(("b", "a")), [(M, "a b")], [[0, 3], [1, 4], [2, 5]], "b a"),
    (ReshapeHeads("r", (X, Y)), [([0, 1, 2, 3, 4, 5], "r")], [[0, 1, 2], [3, 4, 5]], "x y"),
    (ReshapeHeads("a", (Axis("x", 1), Axis("y", 2))), [(M, "a b")], [M], "x y b"),
    (SplitLast((Axis("x", 3), Axis("y", 1))), [(M, "a b")], [[[0], [1], [2]], [[3], [4], [5]]], "a x y"),
    (Split("b", 3, 1), [(M, "a b")], [[1], [4]], "a b"),
    (Split("r", 2, 0), [([0, 1, 2, 3], "r")], [0, 1], "r"),
    (Split("r", 2, 1), [([0, 1, 2, 3], "r")], [2, 3], "r"),
    (Slice((("b", 1, 3),)), [(M, "a b")], [[1, 2], [4, 5]], "a b"),
    (Slice((("b", 1, None),)), [(M, "a b")], [1, 4], "a"),
    (Slice((("b", 0, 2), ("a", 1, None))), [(M, "a b")], [3, 4], "b"),
    (Concat("a"), [(M, "a b"), ([[6, 7, 8]], "a b")], [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "a b"),
    (Concat("b"), [(M, "a b"), ([[6], [7]], "a b")], [[0, 1, 2, 6], [3, 4, 5, 7]], "a b"),
    (Stack("x"), [([0, 1], "a"), ([2, 3], "a"), ([4, 5], "a")], [[0, 1], [2, 3], [4, 5]], "x a"),
    # a0 a1 a2 b0 b1 b2 -> a0 b0 a1 b1 a2 b2
    (Interleave("r", 2), [([0, 1, 2, 10, 11, 12], "r")], [0, 10, 1, 11, 2, 12], "r"),
    # a0 a1 b0 b1 c0 c1 -> a0 b0 c0 a1 b1 c1
    (Interleave("r", 3), [([0, 1, 10, 11, 20, 21], "r")], [0, 10, 20, 1, 11, 21], "r"),
    (Interleave("a", 2), [([[0, 1], [2, 3], [4, 5], [6, 7]], "a b")], [[0, 1], [4, 5], [2, 3], [6, 7]], "a b"),
    (PermuteRope("r"), [([0, 1, 2, 10, 11, 12], "r")], [0, 10, 1, 11, 2, 12], "r"),
    (PermuteRope("b"), [([[0, 1, 2, 3], [4, 5, 6, 7]], "a b")], [[0, 2, 1, 3], [4, 6, 5, 7]], "a b"),
    (Scale(0.5), [(M, "a b")], [[0, 0.5, 1], [1.5, 2, 2.5]], "a b"),
    (Add(1), [(M, "a b")], [[1, 2, 3], [4, 5, 6]], "a b"),
    (Pad("a", 3), [(M, "a b")], [[0, 1, 2], [3, 4, 5], [0, 0, 0]], "a b"),
    (Pad("b", 5), [(M, "a b")], [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]], "a b"),
    (Pad("b", 3), [(M, "a b")], M, "a b"),
    (Resize("b", 4), [(M, "a b")], [[0, 1, 2, 0], [3, 4, 5, 0]], "a b"),
    (Resize("b", 2), [(M, "a b")], [[0, 1], [3, 4]], "a b"),
    (Resize("b", 3), [(M, "a b")], M, "a b"),
    (Cast("float32"), [(M, "a b")], M, "a b"),
    (Rename(1, "x"), [(M, "a b")], M, "a x"),
]


@pytest.mark.parametrize(
    ("op", "inputs", "output", "names"), MEANINGS, ids=[f"{op.name}-{i}" for i, (op, *_) in enumerate(MEANINGS)]
)
def test_a_word_means(op: Op, inputs: list[tuple[object, str]], output: object, names: str) -> None:
    arrays = [np.array(values, np.float32) for values, _ in inputs]
    types = [
        TensorType(tuple(Axis("" if n == "1" else n, s) for n, s in zip(axes.split(), a.shape, strict=True)), "float32")
        for a, (_, axes) in zip(arrays, inputs, strict=True)
    ]
    assert op.forward(arrays, types).tolist() == output
    assert op.infer(types).names() == names


def test_every_word_has_an_example() -> None:
    assert {type(op) for op, *_ in MEANINGS} == {*VOCABULARY, Rename}


def test_rotary_halves_become_neighbours() -> None:
    """What rotating pairs (i, i + n/2) does on the Hub is, after `permute_rope`, what rotating neighbours does."""
    x, angle = np.arange(8, dtype=np.float32), np.linspace(0.1, 1, 4, dtype=np.float32)
    a, b = x[:4], x[4:]
    halves = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])
    type_ = TensorType((Axis("head_dim", 8),), "float32")
    pairs = PermuteRope("head_dim").forward([x], [type_]).reshape(4, 2)
    c, d = pairs[:, 0], pairs[:, 1]
    turned = np.stack([c * np.cos(angle) - d * np.sin(angle), d * np.cos(angle) + c * np.sin(angle)], -1).reshape(8)
    assert np.array_equal(PermuteRope("head_dim").forward([halves], [type_]), turned)


@pytest.mark.parametrize(
    ("value", "dtype", "rounded"),
    [
        (1 + 2**-8, "bfloat16", 1.0),  # half way, to even
        (1 + 3 * 2**-8, "bfloat16", 1 + 2**-6),
        (1 + 2**-8 + 2**-20, "bfloat16", 1 + 2**-7),
        (1 + 2**-11, "float16", 1.0),
        (1 + 3 * 2**-11, "float16", 1 + 2**-9),
        (-1.0625, "float8_e4m3fn", -1.0),
    ],
)
def test_a_cast_rounds_to_nearest_even(value: float, dtype: str, rounded: float) -> None:
    out = Cast(dtype).forward([np.array([value], np.float32)], [TensorType((Axis("a", 1),), "float32")])
    assert out.dtype == dtype_of(dtype)
    assert out.astype(np.float64).tolist() == [rounded]


def test_arithmetic_happens_in_float32() -> None:
    """1 + w in bfloat16 would lose the small weights of a norm."""
    w = np.array([2**-9], ml_dtypes.bfloat16)
    out = Add(1).forward([w], [TensorType((Axis("a", 1),), "bfloat16")])
    assert (out.dtype, out.tolist()) == (np.float32, [1 + 2**-9])
