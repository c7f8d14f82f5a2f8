"""What is stored as it is, is read from its files without TensorStore: ckptc's own outputs, linked ones too, and what
Orbax does not compress.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptc.diagnostics import InputError
from ckptc.plan.json import dumps
from ckptc.run.export import export
from ckptc.storage.checkpoint.orbax_index import PlainIndex
from ckptc.storage.checkpoint.orbax_reader import list_plain, open_reader, open_saved
from ckptc.storage.checkpoint.steps import find_step
from golden import known_cases, source_tensors
from roundtrip import broken_promises, converted, export_plan, exported

CASES = {case.name: case for case in known_cases()}
CASE = CASES["qwen3_moe"]

pytestmark = [
    pytest.mark.usefixtures("jax_with_64_bits"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:.*donated"),
]


@pytest.mark.parametrize("changes", [{}, {"link": True}, {"shards": 3}, {"memory": 8 << 10}], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "llama3_1", "gemma3"])
def test_every_array_of_an_output_is_plain_and_reads_the_same(name: str, changes: Any, tmp_path: Path) -> None:
    saved, step = open_saved(converted(CASES[name], tmp_path / "orbax", **changes))
    items = step.items
    plain = list_plain(items)
    assert {".".join(a.path) for a in saved.arrays} <= plain.arrays.keys()
    direct, library = open_reader(items), open_reader(items, PlainIndex())
    for array in saved.arrays:
        axes = [(0, 1, n) for n in array.shape]
        both = [np.empty(array.shape, _dtype(array.dtype)) for _ in range(2)]
        for reader, out in zip((direct, library), both, strict=True):
            reader.read(array.path, axes, array.chunk, out, 1 << 20)
        assert both[0].tobytes() == both[1].tobytes(), array.name
    assert direct.bytes_read == library.bytes_read


@pytest.mark.parametrize("compression", ["zstd:1", "blosc-lz4"])
def test_compressed_arrays_are_read_by_tensorstore(compression: str, tmp_path: Path) -> None:
    saved = converted(CASE, tmp_path / "orbax", compression=compression)
    assert set(list_plain(find_step(saved).items).arrays) == {"step"}  # which no option compresses
    plan = export_plan(CASE, saved)
    found, _ = exported(plan, saved, tmp_path / "hf", CASE)
    assert broken_promises(plan, found, source_tensors(CASE.hf)) == []


def _dtype(name: str) -> np.dtype[Any]:
    from ckptc.ops.types import numpy_dtype

    return numpy_dtype(name)


def saved_again(source: Path, to: Path, **options: Any) -> Path:
    """What is saved in `source`, restored and saved by Orbax."""
    tree = ocp.PyTreeCheckpointHandler().restore(find_step(source).items)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, **options)) as checkpointer:
        checkpointer.save(to.resolve(), ocp.args.PyTreeSave(tree))
    return to


@pytest.mark.parametrize("options", [{}, {"use_compression": False}, {"use_zarr3": True}], ids=str)
def test_other_ways_in_which_orbax_saves_are_tensorstores(options: dict[str, bool], tmp_path: Path) -> None:
    """zarr v2, or compressed."""
    items = saved_again(converted(CASE, tmp_path / "orbax"), tmp_path / "items", **options)
    assert list_plain(items).arrays == {}


def test_what_orbax_saves_without_compression_is_plain(tmp_path: Path) -> None:
    """Each chunk in a shard of its own, small ones in the index itself."""
    first = converted(CASE, tmp_path / "orbax")
    items = saved_again(first, tmp_path / "items", use_zarr3=True, use_compression=False)
    plain = list_plain(items)
    arrays = open_saved(items)[0].arrays
    assert {".".join(a.path) for a in arrays} <= plain.arrays.keys()
    assert plain.inline and plain.files
    assert all(a.layout.shard is not None for a in plain.arrays.values())
    plan = export_plan(CASE, items)
    found, _ = exported(plan, items, tmp_path / "hf", CASE)
    assert broken_promises(plan, found, source_tensors(CASE.hf)) == []


def test_tensorstore_is_not_loaded_to_read_them(tmp_path: Path) -> None:
    """Not by the process that makes the tensors; a child of its own has listed the chunks."""
    saved = converted(CASE, tmp_path / "orbax")
    script = """\
import json, sys
from ckptc.cli.main import run
code = run(sys.argv[1:])
print(json.dumps([code, [m for m in ("tensorstore", "jax", "orbax") if m in sys.modules]]), file=sys.stderr)
"""
    options = ["--model", CASE.model, "--source", str(saved), "--config-from", str(CASE.hf), "--jobs", "1", "--quiet"]
    argv = [sys.executable, "-c", script, "export", *options, "--output", str(tmp_path / "hf")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]
    assert source_tensors(tmp_path / "hf").keys() == source_tensors(CASE.hf).keys()


def test_a_plan_is_run_without_them_being_known(tmp_path: Path) -> None:
    """As `ckptc run PLAN` does, which lists the chunks itself: the same bytes as with TensorStore alone."""
    saved = converted(CASE, tmp_path / "orbax")
    plan = export_plan(CASE, saved)
    assert dumps(plan)
    export(plan, tmp_path / "plain", saved, CASE.hf)
    export(plan, tmp_path / "library", saved, CASE.hf, plain=PlainIndex())
    for path in (tmp_path / "library").iterdir():
        assert path.read_bytes() == (tmp_path / "plain" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("known", [True, False])
def test_a_data_file_that_was_cut_is_an_input_error(known: bool, tmp_path: Path) -> None:
    """Whether before its chunks were listed or after; and nothing is left in the output's place."""
    saved = converted(CASE, tmp_path / "orbax")
    plan, items = export_plan(CASE, saved), find_step(saved).items
    plain = list_plain(items) if known else None
    data = max((items / "ocdbt.process_0/d").iterdir(), key=lambda p: p.stat().st_size)
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size // 2)
    with pytest.raises(InputError) as caught:
        export(plan, tmp_path / "hf", saved, CASE.hf, plain=plain)
    assert [d.code for d in caught.value.diagnostics] == ["source-changed"]
    assert not (tmp_path / "hf").exists()
