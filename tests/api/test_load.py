"""`ckptc.load`: device arrays are what a run writes, and what does not fit is refused before anything is read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import ckptc
import golden
from ckptc.run.boxes import allocate, intersection, read_together

CASES = {c.id: c for c in golden.known_cases()}
CASE = CASES["llama3.1.scan"] if "llama3.1.scan" in CASES else next(c for c in CASES.values() if c.layout == "scan")


def on_devices(count: int, *arguments: str, script: str = "load_cases.py") -> str:
    """What a script prints that runs with so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_every_golden_case_is_loaded_bit_for_bit_sharded_along_any_axis(devices: int) -> None:
    assert on_devices(devices).split() == list(CASES)


@pytest.fixture(scope="module")
def plan() -> ckptc.Plan:
    return golden.compile_case(CASE)


def load(given: ckptc.Plan, **options: Any) -> Any:
    return ckptc.load(given, CASE.hf, **options)


def tree_of(plan: ckptc.Plan, depth: int = 2) -> dict[str, Any]:
    """Abstract arrays of a plan, without the first `depth` parts of their paths."""
    out: dict[str, Any] = {}
    for a in plan.arrays:
        at = out
        for part in a.path[depth:-1]:
            at = at.setdefault(part, {})
        at[a.path[-1]] = jax.ShapeDtypeStruct(a.shape, jax.numpy.dtype(a.dtype))
    return out


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", [dict, FrozenDict, nnx.State])
def test_like_decides_the_structure(plan: ckptc.Plan, depth: int, kind: Any) -> None:
    like = kind(tree_of(plan, depth))
    found = load(plan, like=like)
    assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(like)
    values = [np.asarray(x) for x in jax.tree_util.tree_leaves(found)]
    expected = dict(sorted(golden.expected_of(CASE).items()))
    assert [v.tobytes() for v in values] == [v.tobytes() for v in expected.values()]


def test_memory_that_was_filled_is_the_arrays_own(plan: ckptc.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def noting(*given: Any) -> Any:
        values = allocate(*given)
        made.append(values.ctypes.data)
        return values

    monkeypatch.setattr("ckptc.run.boxes.allocate", noting)
    found = jax.tree_util.tree_leaves(load(plan))
    assert sorted(x.unsafe_buffer_pointer() for x in found) == sorted(made)


def test_dtypes_are_those_of_like(plan: ckptc.Plan) -> None:
    exact = ckptc.load(CASE.model, CASE.hf, dtype="float32", set={"padded_vocab": CASE.vocab})
    like = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, jax.numpy.float16), exact)
    like["params"]["params"]["token_embedder"] = exact["params"]["params"]["token_embedder"]
    found = ckptc.load(CASE.model, CASE.hf, like=like, set={"padded_vocab": CASE.vocab})
    for x, y in zip(*map(jax.tree_util.tree_leaves, (found, exact)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).astype(x.dtype).tobytes()
    assert {str(x.dtype) for x in jax.tree_util.tree_leaves(found)} == {"float16", "float32"}


def test_select_loads_some(plan: ckptc.Plan) -> None:
    found = load(plan, select=["token_embedder/*"])
    assert list(found["params"]["params"]) == ["token_embedder"]
    like = tree_of(plan)
    some = load(plan, like=like, select=["token_embedder/*"])
    assert isinstance(some["token_embedder"]["embedding"], jax.Array)
    assert some["decoder"] is not like["decoder"] and some["decoder"] == like["decoder"]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def read(*_: object) -> None:
        raise AssertionError("a byte of weights is read")

    monkeypatch.setattr("ckptc.run.readers.Readers.of", read)
    yield


def refused(plan: Any, **options: Any) -> list[str]:
    with pytest.raises(ckptc.InputError) as error:
        load(plan, **options)
    return [f"{d.code}: {d.message} {' '.join(d.notes)}" for d in error.value.diagnostics]


@pytest.mark.usefixtures("unread")
def test_what_does_not_match_is_refused_before_a_byte_is_read(plan: ckptc.Plan) -> None:
    like = tree_of(plan)
    embedding = like["token_embedder"].pop("embedding")
    like["token_embedder"]["embeddings"] = embedding
    missing, extra = refused(plan, like=like)
    assert missing.startswith("tree-mismatch: `like` has no place for `token_embedder/embedding`")
    assert extra.startswith("tree-mismatch: `like` has `token_embedder/embeddings`")
    like = tree_of(plan)
    like["token_embedder"]["embedding"] = jax.ShapeDtypeStruct((3, 5), embedding.dtype)
    (shape,) = refused(plan, like=like)
    assert shape.startswith("leaf-mismatch: `token_embedder/embedding`") and "[3, 5]" in shape
    like["token_embedder"]["embedding"] = jax.ShapeDtypeStruct(embedding.shape, jax.numpy.int32)
    (dtype,) = refused(plan, like=like)
    assert "int32" in dtype
    like["token_embedder"]["embedding"] = "weights"
    (kind,) = refused(plan, like=like)
    assert "no array but str" in kind
    (pattern,) = refused(plan, select=["nonsense/*"])
    assert "`nonsense/*`" in pattern
    (mesh,) = refused(plan, mesh="fsdp=64")
    assert mesh.startswith("bad-mesh")


def test_a_source_that_changes_meanwhile_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in CASE.hf.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plan = ckptc.compile(CASE.model, tmp_path, set={"padded_vocab": CASE.vocab})

    def touch(progress: object) -> None:
        for file in tmp_path.glob("*.safetensors"):
            os.utime(file, ns=(1, 1))

    with pytest.raises(ckptc.InputError) as error:
        ckptc.load(plan, tmp_path, on_progress=touch)
    assert {d.code for d in error.value.diagnostics} == {"source-changed"}


def test_a_failure_in_a_thread_ends_the_load_with_its_error(plan: ckptc.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise OSError("lost")

    monkeypatch.setattr("ckptc.run.worker.Worker.fill", fill)
    with pytest.raises(OSError, match="lost"):
        load(plan, jobs=2)


def test_what_is_read_is_reported(plan: ckptc.Plan) -> None:
    reports: list[ckptc.api.LoadReport] = []
    load(plan, on_report=reports.append)
    (report,) = reports
    assert report.arrays == plan.totals.arrays and report.made_bytes == plan.totals.write_bytes
    assert plan.totals.read_bytes <= report.read_bytes <= 1.2 * plan.totals.read_bytes


def test_modules_are_filled(tmp_path: Path) -> None:
    output = on_devices(4, script="load_modules.py")
    assert output.split() == ["linen", "nnx", "boxes", "donated"]


def test_boxes_are_read_together_where_they_cover_what_is_read() -> None:
    halves = [((0, 2), (0, 4)), ((2, 4), (0, 4))]
    assert list(read_together(halves)) == [(((0, 4), (0, 4)), [0, 1])]
    corners = [((0, 2), (0, 2)), ((2, 4), (2, 4))]
    assert list(read_together(corners)) == [(corners[0], [0]), (corners[1], [1])]
    assert intersection(halves[0], ((1, 3), (1, 9))) == ((1, 2), (1, 4)) and intersection(*halves) is None
