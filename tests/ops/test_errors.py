"""Every way an op can refuse, and what it says."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import ckptc.ops
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
)
from ckptc.ops.pattern import parse_pattern
from ckptc.ops.rename import Rename
from ckptc.ops.types import numpy_dtype


def t(axes: str, dtype: str = "float32") -> TensorType:
    """`t("a=2 b=3 1")`."""
    pairs = [word.partition("=") for word in axes.split()]
    return TensorType(tuple(Axis(n, int(size)) if size else Axis("", int(n)) for n, _, size in pairs), dtype)


def axes(text: str) -> tuple[Axis, ...]:
    return t(text).axes


A, B = Axis("a", 2), Axis("b", 3)
AB = t("a=2 b=3")
FP8 = t("a=5 b=3", "float8_e4m3fn")
SWAP = Rearrange(((A,), (B,)), ((B,), (A,)))

INFER: list[tuple[Op, list[TensorType], str]] = [
    # one input, whatever the op
    *(
        (op, [AB, AB], f"`{op.name}` takes one input, `from` has 2 parts")
        for op in (
            SWAP, Transpose(("b", "a")), ReshapeHeads("b", axes("x=3")), SplitLast(axes("x=3")), Split("a", 2, 0),
            Slice((("a", 0, 1),)),
            Interleave("a", 2), PermuteRope("a"), Scale(2), Add(1), Pad("a", 3), Resize("a", 1), Cast("bfloat16"),
            Rename(0, "x"),
        )
    ),
    # an axis that is not there, whatever the op
    *(
        (op, [AB], "there is no axis `x`; the axes are a b")
        for op in (
            Transpose(("a", "x")), ReshapeHeads("x", axes("y=3")), Split("x", 2, 0), Slice((("x", 0, 1),)),
            Interleave("x", 2), PermuteRope("x"),
            Pad("x", 3), Resize("x", 3),
        )
    ),
    (Concat("x"), [AB, AB], "there is no axis `x`; the axes are a b"),
    (PermuteRope("x"), [t("")], "there is no axis `x`; the axes are (none)"),
    (PermuteRope("x"), [t("1 a=2")], "the axes are 1 a"),
    # rearrange
    (SWAP, [t("a=2")], "the pattern has 2 axes, the input has 1: float32[a=2]"),
    (SWAP, [t("a=2 b=4")], "`b` is 3, the input's axis is 4: float32[a=2, b=4]"),
    (Rearrange(((A, B), ()), ((A,), (B,))), [t("a=5 1")], "`(a b)` is 6, the input's axis is 5"),
    (Rearrange(((A,), ()), ((A,),)), [t("a=2 b=3")], "`1` is 1, the input's axis is 3"),
    # the words for rearranging
    (Transpose(("a",)), [AB], "`transpose` names 1 axes, the input has 2: a b"),
    (Transpose(("a", "a")), [AB], "more often: a"),
    (ReshapeHeads("b", axes("x=2 y=2")), [AB], "x=2 x y=2 is 4, the axis is b=3"),
    (ReshapeHeads("b", axes("a=1 y=3")), [AB], "more often: a"),
    (ReshapeHeads("b", axes("y=1 y=3")), [AB], "more often: y"),
    (SplitLast(axes("x=2")), [AB], "x=2 is 2, the axis is b=3"),
    (SplitLast(axes("x=2")), [t("")], "`split_last` needs an axis, the input is a scalar"),
    (Split("b", 2, 0), [AB], "`b` is 3, which 2 equal parts do not divide"),
    (Split("b", 0, 0), [AB], "`b` is 3, which 0 equal parts do not divide"),
    (Split("b", 3, 3), [AB], "there is no part 3 of 3; parts count from 0"),
    (Split("b", 3, -1), [AB], "there is no part -1 of 3"),
    (Interleave("b", 2), [AB], "`b` is 3, which 2 equal parts do not divide"),
    (Interleave("b", -1), [AB], "-1 equal parts do not divide"),
    (PermuteRope("b"), [AB], "`b` is 3, which 2 equal parts do not divide"),
    # slice and pad
    (Slice((("b", 3, None),)), [AB], "3 is not within axis `b` of size 3"),
    (Slice((("b", -1, None),)), [AB], "-1 is not within axis `b` of size 3"),
    (Slice((("b", 1, 4),)), [AB], "[1, 4) is not within axis `b` of size 3"),
    (Slice((("b", 2, 2),)), [AB], "[2, 2) is not within axis `b` of size 3"),
    (Slice((("b", -1, 2),)), [AB], "[-1, 2) is not within axis `b` of size 3"),
    (Slice((("b", 0, 2), ("b", 1, 3))), [AB], "`slice` cuts axis `b` twice"),
    (Pad("b", 2), [AB], "`pad` lengthens: axis b=3 is longer than 2 already"),
    (Resize("b", 0), [AB], "`resize` to 0 leaves nothing"),
    # joining
    (Concat("a"), [AB], "`concat` joins the parts of a list in `from`; there is one"),
    (Concat("a"), [AB, t("a=2 b=4")],
        "`concat` joins arrays of one type, but there are float32[a=2, b=3] and float32[a=2, b=4]"),
    (Concat("a"), [AB, t("a=2")], "`concat` joins arrays of one type"),
    (Concat("a"), [AB, t("a=2 b=3", "bfloat16")], "float32[a=2, b=3] and bfloat16[a=2, b=3]"),
    (Concat("a"), [AB, AB, t("a=2 x=3")], "float32[a=2, b=3] and float32[a=2, x=3]"),
    (Stack("x"), [AB], "`stack` joins the parts of a list in `from`; there is one"),
    (Stack("x"), [AB, t("a=3 b=3")], "`stack` joins arrays of one type"),
    (Stack("a"), [AB, AB], "there is an axis `a` already: a b"),
    # arithmetic
    *(
        (op, [t("a=2", dtype)], f"`{op.name}` is arithmetic on floating point, the input is {dtype}")
        for op in (Scale(2), Add(1))
        for dtype in ("int64", "uint8", "bool")
    ),
    (Scale(0), [AB], "`scale` by 0 loses the tensor"),
    (Scale(1e-50), [AB], "`scale` by 0 loses the tensor"),
    (Scale(1e-45), [AB], "`scale` needs a finite number that float32 holds"),
    (Scale(float("nan")), [AB], "`scale` needs a finite number that float32 holds, not nan"),
    (Scale(float("inf")), [AB], "not inf"),
    (Scale(1e39), [AB], "not 1e+39"),
    (Add(float("-inf")), [AB], "`add` needs a finite number that float32 holds, not -inf"),
    (Add(1e39), [AB], "not 1e+39"),
    (Cast("bfloat16"), [t("a=2", "int64")], "`cast` is between floating dtypes, not from int64 to bfloat16"),
    (Cast("int64"), [AB], "not from float32 to int64"),
    *((Cast(n), [AB], f"`{n}` is not a dtype") for n in ("float31", "f4", "float", "finfo", "O", "object", "S3", "V8",
        "i4,i4", "__version__", "(2", "", "void")),
]  # fmt: skip

OTHER: list[tuple[Callable[[], object], str]] = [
    (lambda: Rearrange(((A,),), ((A,), (B,))), "every axis stands on both sides of a pattern; only on the right: b"),
    (lambda: Rearrange(((A,), (B,)), ((A,),)), "every axis stands on both sides of a pattern; only on the left: b"),
    (lambda: Rearrange(((A,),), ((Axis("a", 3),),)), "only on the left: a"),
    (
        lambda: Rearrange(((A,), (Axis("a", 3),)), ((A,), (Axis("a", 3),))),
        "an axis stands once on each side of a pattern; more often: a",
    ),
    (lambda: numpy_dtype("complex"), "`complex` is not a dtype"),
    (lambda: parse_pattern("(a"), "never closed"),
    (lambda: parse_pattern("a)"), "without `(`"),
    (lambda: parse_pattern("((a))"), "do not nest"),
    (lambda: parse_pattern("a a"), "stands twice"),
    (lambda: parse_pattern("-> ->"), "one `->`"),
    (lambda: parse_pattern("A"), "a pattern has names"),
]


def _refusal(attempt: Callable[[], object]) -> OpError:
    with pytest.raises(OpError) as caught:
        attempt()
    return caught.value


@pytest.mark.parametrize(("op", "ins", "message"), INFER, ids=[f"{i}-{op.name}" for i, (op, _, _) in enumerate(INFER)])
def test_an_op_refuses_what_does_not_fit(op: Op, ins: list[TensorType], message: str) -> None:
    assert message in str(_refusal(lambda: op.infer(ins)))


@pytest.mark.parametrize(("attempt", "message"), OTHER, ids=[m for _, m in OTHER])
def test_what_cannot_be_made_is_refused(attempt: Callable[[], object], message: str) -> None:
    assert message in str(_refusal(attempt))


def test_every_raise_of_the_ops_is_in_the_tables() -> None:
    """Finds each `raise` in the sources and which of them the tables reached."""
    folder = Path(ckptc.ops.__file__).parent
    raises = {
        (path.name, line): (path.name, node.lineno)
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    reached = set()
    for attempt in [*(lambda op=op, ins=ins: op.infer(ins) for op, ins, _ in INFER), *(a for a, _ in OTHER)]:
        frame = traceback.extract_tb(_refusal(attempt).__traceback__)[-1]
        reached.add(raises.get((Path(frame.filename).name, frame.lineno or 0)))
    assert set(raises.values()) - reached == set()


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(OpError, ValueError)


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (Rearrange(((A, B), ()), ((B,), (A,))), "(a b) 1 -> b a"),
        (Transpose(("b", "a")), "transpose b a"),
        (ReshapeHeads("q", axes("heads=2 head_dim=3")), "reshape_heads q -> heads=2 head_dim=3"),
        (SplitLast(axes("x=2 y=2")), "split_last x=2 y=2"),
        (Split("a", 3, 1), "split a part 1 of 3"),
        (Slice((("a", 0, None), ("b", 1, 3))), "slice a=0, b=1:3"),
        (Concat("a"), "concat a"),
        (Stack("x"), "stack x"),
        (Interleave("a", 2), "interleave a by 2"),
        (PermuteRope("a"), "permute_rope a"),
        (Scale(0.0625), "scale 0.0625"),
        (Scale(0.1), "scale 0.100000001"),  # the number that is multiplied with
        (Add(1), "add 1"),
        (Pad("vocab", 262144), "pad vocab to 262144"),
        (Resize("vocab", 100), "resize vocab to 100"),
        (Cast("bfloat16"), "cast bfloat16"),
        (Rename(0, "x"), "rename axis 0 to x"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_an_op_describes_itself(op: Op, text: str) -> None:
    assert op.describe() == text


def test_a_type_shows_its_axes() -> None:
    assert str(t("a=2 1 b=3", "bfloat16")) == "bfloat16[a=2, 1, b=3]"
    assert (t("a=2 b=3", "bfloat16").size, t("a=2 b=3", "bfloat16").nbytes, t("a=2 b=3", "bfloat16").shape) == (
        6,
        12,
        (2, 3),
    )
