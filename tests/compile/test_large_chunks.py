"""Chunks are large enough for a restore to give each back as soon as it is copied, and pieces of them can be written alone."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.large_chunks import LEAST, MOST
from ckptc.compile.mesh import read_mesh
from ckptc.compile.options import Options
from ckptc.ops.nest import AxisMap, Factor, Part
from ckptc.ops.types import itemsize
from ckptc.plan.check_layout import PlanError, check_layout
from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Array, Plan
from ckptc.plan.stored import axis_order, file_bytes, places
from ckptc.spec import mapping as spec
from ckptc.spec.target import target_tree
from plans import altered, with_arrays

MALLOC_MOST = 32 << 20  # bytes: glibc's DEFAULT_MMAP_THRESHOLD_MAX on machines of 64 bits
MODELS = ("llama3.1-8b", "qwen3-30b-a3b", "gemma2-2b")


def plan_of(model: str, mesh: str = "", **options: object) -> Plan:
    family, named = spec.find_model(model)
    tree = target_tree("maxtext")
    over = {"mesh": read_mesh(mesh, tree.mesh_axes), "rules": tree.rules} if mesh else {}
    return compile_plan(family, named, replace(Options(), **over, **options), None)  # type: ignore[arg-type]


def stored_bytes(array: Array) -> int:
    return prod(array.stored or array.chunk) * itemsize(array.dtype)


@pytest.mark.parametrize("model", MODELS)
def test_chunks_of_large_arrays_are_above_what_malloc_keeps(model: str) -> None:
    plan = plan_of(model)
    large = [a for a in plan.arrays if a.nbytes > LEAST]
    assert len(large) > 5
    for array in large:
        assert MALLOC_MOST < stored_bytes(array) <= MOST, (array.name, array.stored)


def test_a_devices_part_is_whole_chunks_as_large_as_it_allows() -> None:
    plan = plan_of("llama3.1-8b", "fsdp=4")
    large = [a for a in plan.arrays if a.nbytes // prod(a.shards) > LEAST]
    assert len(large) > 5
    for array in large:
        chunk = array.stored or array.chunk
        assert stored_bytes(array) > MALLOC_MOST, array.name
        for size, shards, extent in zip(array.shape, array.shards, chunk, strict=True):
            assert shards == 1 or size // shards % extent == 0, array.name


def test_a_small_part_of_a_device_is_one_chunk() -> None:
    """As Orbax writes it: of several smaller ones, malloc keeps the buffers."""
    plan = plan_of("llama3.1-8b", "fsdp=64", set={"layers": 4})
    small = [a for a in plan.arrays if a.nbytes > LEAST > a.nbytes // prod(a.shards) and max(a.shards) > 1]
    assert len(small) > 5
    for array in small:
        part = tuple(size // shards for size, shards in zip(array.shape, array.shards, strict=True))
        assert (array.stored or array.chunk) == part, array.name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("memory", [64 << 20, 512 << 20], ids=["64MiB", "512MiB"])
def test_large_chunks_take_no_memory_of_a_conversion(model: str, memory: int) -> None:
    plan = plan_of(model, memory=memory)
    assert plan.totals.peak_memory_bytes <= memory // 2
    assert any(a.stored for a in plan.arrays)
    assert loads(dumps(plan)) == plan


def test_what_cannot_be_written_in_pieces_has_chunks_of_its_unit() -> None:
    assert not any(a.stored for a in plan_of("llama3.1-8b", compression="blosc-lz4").arrays)
    assert not any(a.stored for a in plan_of("llama3.1-8b", link=True).arrays if a.link)


def test_large_chunks_lie_one_after_the_other() -> None:
    plan = plan_of("llama3.1-8b")
    end = 0
    for number, found in places(plan).items():
        array = plan.arrays[number]
        assert found.begin >= end and found.step >= stored_bytes(array) and found.step % 4096 == 0
        end = found.end
    assert file_bytes(plan) == end <= 1.02 * plan.totals.write_bytes


@pytest.mark.parametrize(
    "stored",
    [(8, 6), (8, 6, 1), (9, 6), (4, 2), (8, 12)],
    ids=["cut twice", "rank", "no pieces", "smaller", "past the edge"],
)
def test_a_plan_with_large_chunks_that_are_none_is_refused(stored: tuple[int, ...]) -> None:
    plan = plan_of("llama3.1-8b")
    array = next(a for a in plan.arrays if len(a.shape) == 2 and not a.stored)
    whole = Part(None, 0, 0, (AxisMap(0, (Factor(16, 1, 0),)), AxisMap(0, (Factor(6, 1, 0),))))
    sizes = {"shape": (16, 6), "chunk": (4, 3), "unit": (8, 6), "shards": (1, 1), "axes": ()}
    made = with_arrays(plan, [altered(array, stored=stored, parts=(whole,), sources=(), **sizes)])
    with pytest.raises((PlanError, ValueError), match="chunk"):
        check_layout(made)


def test_pieces_that_are_no_runs_have_no_order() -> None:
    assert axis_order((4, 1, 6), (4, 3, 6)) == (1, 0, 2)
    assert axis_order((1, 2, 6), (4, 2, 6)) is None
    with pytest.raises(ValueError, match="no runs"):
        axis_order((2, 2), (4, 4))
