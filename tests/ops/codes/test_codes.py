"""What is true of every code, whichever there are: a new one needs no line here."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ops.codes.decoding import all_rows, decoded, placed
from tests.ops.evaluate import same

import ckptc.ops.codes as package
from ckptc.ops.codes import CODES, Code, Found, Shape, check_beside, code_of
from ckptc.ops.nest import Part, whole
from ckptc.ops.types import OpError, itemsize

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
relaxed = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
EXAMPLES = [(code, shape) for kind in CODES.values() for code, shape in kind.examples]
every_example = pytest.mark.parametrize(("code", "shape"), EXAMPLES, ids=str)


def test_every_code_has_examples_and_a_test_of_its_own() -> None:
    assert len(CODES) >= 8
    for name, kind in CODES.items():
        assert kind.examples and all(type(code) is kind for code, _ in kind.examples)
        assert kind.name == name and kind.__doc__ and kind.uploads and kind.methods
        module = kind.__module__.rpartition(".")[2]
        assert (Path(__file__).parent / f"test_{module}.py").is_file(), f"{name} has no test"
        assert (Path(package.__file__).parent / f"{module}.py").read_text().count("(Code)") == 1


@every_example
def test_rows_are_the_whole_weight(code: Code, shape: Shape) -> None:
    layout, stored = code.layout(shape), code.stored(shape)
    count = prod(layout.axes)
    assert count * layout.length == prod(shape)
    assert count * layout.stored == prod(stored)
    for beside in layout.beside:
        assert layout.count(beside) * layout.each(beside) == beside.size
        rows = layout.rows_of(beside, np.arange(count))
        assert set(rows.tolist()) == set(range(layout.count(beside)))
    assert sorted(_places(code, shape)) == list(range(prod(shape)))


def _places(code: Code, shape: Shape) -> list[int]:
    numbered = np.arange(prod(shape), dtype=np.float32).reshape(-1, code.layout(shape).length)
    return [int(x) for x in placed(code, shape, numbered).reshape(-1)]


@every_example
@relaxed
@given(seed=st.integers(0, 999), block=st.sampled_from((1, 2, 8, 24, 64, 1 << 15)))
def test_decoded_rows_are_what_the_plain_meaning_says(code: Code, shape: Shape, seed: int, block: int) -> None:
    arrays = code.random(shape, np.random.default_rng(seed))
    with np.errstate(all="ignore"):
        expected = code.forward(arrays, shape)
        found = decoded(code, shape, arrays, all_rows(code, shape), block)
    assert (expected.shape, expected.dtype) == (shape, np.float32)
    assert same(placed(code, shape, found), expected)


@every_example
@relaxed
@given(seed=st.integers(0, 99), block=st.sampled_from((2, 8, 64, 1 << 15)), data=st.data())
def test_some_rows_decode_with_what_is_theirs(
    code: Code, shape: Shape, seed: int, block: int, data: st.DataObject
) -> None:
    """Every n-th row from some row on: what stands beside the rows between must not be used."""
    arrays = code.random(shape, np.random.default_rng(seed))
    length, count = code.layout(shape).length, prod(code.layout(shape).axes)
    first, step = data.draw(st.integers(0, count - 1)), data.draw(st.integers(1, count))
    wanted = range(first, count, step)
    part = Part(0, first * length, 0, (whole(len(wanted), step * length), whole(length, 1)))
    with np.errstate(all="ignore"):
        rows = decoded(code, shape, arrays, all_rows(code, shape))
        assert same(decoded(code, shape, arrays, part, block), rows[first::step])


@every_example
def test_a_plans_record_is_the_code(code: Code, shape: Shape) -> None:
    assert code_of(code.name, code.settings()) == code
    assert code.describe() and hash(code) == hash(replace(code))  # type: ignore[type-var]
    for name, value in code.settings():
        other = [
            (n, "x" if n == name and type(value) is not str else 0 if n == name else v) for n, v in code.settings()
        ]
        with pytest.raises(OpError, match="has the settings"):
            code_of(code.name, tuple(other))


@every_example
def test_tensors_beside_codes_are_checked(code: Code, shape: Shape) -> None:
    found = [Found(a.dtype.name, a.shape) for a in code.random(shape, np.random.default_rng(0))[1:]]
    check_beside(code, shape, found)
    with pytest.raises(OpError, match="tensors beside"):
        check_beside(code, shape, found[1:])
    with pytest.raises(OpError, match="complex64"):
        check_beside(code, shape, [Found("complex64", found[0].shape), *found[1:]])
    with pytest.raises(OpError, match="found"):
        check_beside(code, shape, [Found(found[0].dtype, (*found[0].shape, 999)), *found[1:]])


@pytest.mark.parametrize("kind", CODES.values(), ids=CODES)
def test_codes_are_stored_in_whole_bytes(kind: type[Code]) -> None:
    for code, shape in kind.examples:
        bits = prod(code.stored(shape)) * itemsize(code.dtypes[0]) * 8
        assert 2 <= bits / prod(shape) <= 16
