"""Two checkpoints compared: every kind of difference is found and measured, in boxes of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from ckptc.run.diff import Comparison, Difference, Entry, boxes, compare, open_side

MIB = 1 << 20


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "a": rng.standard_normal((70, 50)).astype(np.float32),
        "b": rng.standard_normal((9,)).astype(ml_dtypes.bfloat16),
        "c": np.arange(12, dtype=np.int64).reshape(3, 4),
        "d": np.asarray(2.5, np.float32),
    }


def safetensors(directory: Path, values: dict[str, Any]) -> Path:
    directory.mkdir()
    save_file(values, str(directory / "model.safetensors"))
    return directory


def orbax(directory: Path, values: dict[str, Any]) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory.resolve(), values)
    return directory


def compared(a: Path, b: Path, memory: int = MIB) -> Comparison:
    return compare(open_side(a, memory), open_side(b, memory), memory)


@pytest.mark.parametrize("memory", [64, 4096, MIB])
@pytest.mark.parametrize("kinds", [(safetensors, safetensors), (safetensors, orbax), (orbax, orbax)])
def test_equal_checkpoints_of_either_kind(kinds: Any, memory: int, tmp_path: Path) -> None:
    first, second = (save(tmp_path / name, tensors()) for save, name in zip(kinds, "ab", strict=True))
    sums = tuple(0 if save is orbax else None for save in kinds)  # which ckptc alone notes
    assert compared(first, second, memory) == Comparison(4, 4, 70 * 50 * 4 + 18 + 96 + 4, (), sums)


@pytest.mark.parametrize("memory", [64, MIB])
@pytest.mark.parametrize("save", [safetensors, orbax])
def test_every_kind_of_difference(save: Any, memory: int, tmp_path: Path) -> None:
    a, b = tensors(), tensors()
    b["a"][69, 49] += 0.5
    b["a"][0, 0] *= 2
    b["b"] = b["b"].astype(np.float32)
    b["c"] = b["c"].reshape(4, 3)
    b["e"] = b.pop("d")
    found = compared(save(tmp_path / "a", a), save(tmp_path / "b", b), memory).differences
    by_name = {d.name: d for d in found}
    largest = max(0.5, abs(float(a["a"][0, 0])))
    assert by_name["a"].kind == "values" and by_name["a"].elements == 2
    assert by_name["a"].absolute == pytest.approx(largest)
    last = abs(0.5 / max(abs(float(b["a"][69, 49])), abs(float(a["a"][69, 49]))))
    assert by_name["a"].relative == pytest.approx(max(0.5, last), rel=1e-5)
    assert by_name["b"] == Difference("b", "dtype", "bfloat16[9]", "float32[9]")
    assert by_name["c"] == Difference("c", "shape", "int64[3, 4]", "int64[4, 3]")
    assert (by_name["d"].kind, by_name["e"].kind) == ("missing", "extra")


def test_bits_count_and_numbers_measure(tmp_path: Path) -> None:
    """-0 is not 0 to the bit, but by nothing; NaN differs from a number without bound."""
    a = {"x": np.array([0.0, 1.0, np.nan], np.float32)}
    b = {"x": np.array([-0.0, 1.0, np.nan], np.float32)}
    (found,) = compared(safetensors(tmp_path / "a", a), safetensors(tmp_path / "b", b)).differences
    assert (found.elements, found.absolute, found.relative) == (1, 0.0, 0.0)
    b["x"][2] = 1
    (found,) = compared(tmp_path / "a", safetensors(tmp_path / "c", b)).differences
    assert (found.elements, found.absolute) == (2, np.inf)


@pytest.mark.parametrize("most", [1, 7, 64, 10_000])
@pytest.mark.parametrize("chunk", [None, (3, 5, 2), (7, 1, 4)])
def test_boxes_cover_once_and_are_small(chunk: tuple[int, ...] | None, most: int) -> None:
    seen = np.zeros((7, 5, 4), int)
    entry = Entry("x", seen.shape, "bfloat16", chunk)
    for box in boxes(entry, Entry("x", seen.shape, "bfloat16", None), most):
        place = tuple(slice(low, high) for low, high in box)
        seen[place] += 1
        assert seen[place].size * 2 <= max(most, 2)
    assert (seen == 1).all()
