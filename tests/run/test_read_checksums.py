"""Checksums that a checkpoint carries are compared while it is exported or compared: no damaged byte gets through."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from ckptc.diagnostics import InputError
from ckptc.run.diff import compare, open_side
from ckptc.run.export import export
from ckptc.storage.checkpoint.orbax_index import INLINE
from ckptc.storage.checkpoint.orbax_reader import list_plain
from ckptc.storage.checkpoint.steps import find_step
from golden import known_cases
from roundtrip import converted, export_plan

CASES = {case.name: case for case in known_cases()}
MIB = 1 << 20

pytestmark = [
    pytest.mark.usefixtures("jax_with_64_bits"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:.*donated"),
]


def spots(saved: Path, seed: int = 0) -> Iterator[tuple[str, Path, int]]:
    """A byte of each array: the array's name, the file, the offset."""
    items, rng = find_step(saved).items, np.random.default_rng(seed)
    index = list_plain(items)
    for name, array in index.arrays.items():
        if name == "step":
            continue
        chunk = int(rng.integers(len(array.cells)))
        file = int(array.files[chunk])
        assert file != INLINE
        within = int(rng.integers(array.lengths[chunk]))
        yield name.replace(".", "/"), items / index.files[file].name, int(array.offsets[chunk]) + within


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0] ^ 0x40
        opened.seek(offset)
        opened.write(bytes([byte]))


def refused(call: Callable[[], object]) -> list[str]:
    with pytest.raises(InputError) as caught:
        call()
    assert {d.code for d in caught.value.diagnostics} == {"checksum-differs"}
    return [d.message.split("`")[1] for d in caught.value.diagnostics]


@pytest.mark.parametrize("memory", [3 * MIB, 1024 * MIB], ids=["little", "much"])
@pytest.mark.parametrize("name", ["llama3_1", "qwen3_moe", "gemma3", "gpt_oss"])
def test_a_damaged_byte_of_any_array_stops_an_export(name: str, memory: int, tmp_path: Path) -> None:
    """Padding, permuted heads, split and stacked arrays: also where chunks are only ever read in parts."""
    case = CASES[name]
    saved = converted(case, tmp_path / "orbax")
    plan = export_plan(case, saved, memory=memory)
    wrong = list(spots(saved, seed=memory))
    assert len(wrong) == plan.totals.tensors
    for array, file, offset in wrong:
        flip(file, offset)  # before the plan is made, whose samples of the source would tell, too, in places
        damaged = export_plan(case, saved, memory=memory)
        assert refused(lambda plan=damaged: export(plan, tmp_path / "hf", saved, case.hf)) == [array]  # type: ignore[misc]
        assert not (tmp_path / "hf").exists()
        flip(file, offset)
    assert export(plan, tmp_path / "hf", saved, case.hf).checksums == len(wrong)


def test_workers_share_what_they_find(tmp_path: Path) -> None:
    case = CASES["llama3_1"]
    saved = converted(case, tmp_path / "orbax")
    plan = export_plan(case, saved)
    (array, file, offset), *_ = spots(saved)
    assert export(plan, tmp_path / "hf", saved, case.hf, jobs=2).checksums == plan.totals.tensors
    flip(file, offset)
    plan = export_plan(case, saved)
    assert refused(lambda: export(plan, tmp_path / "other", saved, case.hf, jobs=2)) == [array]


def test_compressed_chunks_are_compared_too(tmp_path: Path) -> None:
    """Another array's chunks under an array's name: a library that decodes them sees nothing wrong."""
    case = CASES["llama3_1"]
    saved = converted(case, tmp_path / "orbax", compression="zstd:3")
    plan = export_plan(case, saved)
    assert export(plan, tmp_path / "hf", saved, case.hf).checksums == plan.totals.tensors
    items = find_step(saved).items
    base = {"driver": "ocdbt", "base": f"file://{items.resolve()}/"}
    name = "params.params.decoder.decoder_norm.scale"
    array: Any = ts.open({"driver": "zarr3", "kvstore": {**base, "path": f"{name}/"}}, open=True).result()
    array[0].write(7).result()
    assert refused(lambda: export(export_plan(case, saved), tmp_path / "other", saved, case.hf)) == [
        name.replace(".", "/")
    ]


@pytest.mark.parametrize("memory", [1024, MIB])
def test_a_damaged_byte_stops_a_comparison(memory: int, tmp_path: Path) -> None:
    """Even where both have it."""
    saved = converted(CASES["llama3_1"], tmp_path / "a")
    array, file, offset = list(spots(saved))[3]
    shutil.copytree(saved, tmp_path / "b")
    clean = compare(open_side(saved, memory), open_side(tmp_path / "b", memory), memory)
    assert clean.checksums == (clean.arrays, clean.arrays) and clean.equal == clean.arrays
    flip(file, offset)
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(saved, tmp_path / "b")
    assert refused(lambda: compare(open_side(saved, memory), open_side(tmp_path / "b", memory), memory)) == [array]


def test_what_has_no_checksums_is_counted(tmp_path: Path) -> None:
    """Saved again, as training saves."""
    case = CASES["llama3_1"]
    tree = ocp.PyTreeCheckpointHandler().restore(find_step(converted(case, tmp_path / "orbax")).items)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save((tmp_path / "saved" / "0" / "items").resolve(), ocp.args.PyTreeSave(tree))
    plan = export_plan(case, tmp_path / "saved")
    report = export(plan, tmp_path / "hf", tmp_path / "saved", case.hf)
    assert (report.checksums, report.without_checksum) == (0, plan.totals.tensors)


def test_crc32c_of_chunks_is_compared_by_the_library(tmp_path: Path) -> None:
    items = tmp_path / "items"
    tree = {"params": {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
        checkpointer.save(items.resolve(), ocp.args.PyTreeSave(tree))
    shutil.rmtree(items / "params.w")
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    spec = {
        "driver": "zarr3",
        "kvstore": f"file://{items.resolve()}/params.w/",
        "metadata": {"shape": [8, 8], "data_type": "float32", "codecs": codecs},
    }
    array: Any = ts.open(spec, create=True).result()
    array.write(tree["params"]["w"]).result()
    chunk = items / "params.w" / "c" / "0" / "0"
    assert chunk.stat().st_size == 260
    assert compare(open_side(items, MIB), open_side(items, MIB), MIB).equal == 1
    flip(chunk, 100)
    with pytest.raises(InputError, match=r"orbax-array: .*stored digest is"):
        compare(open_side(items, MIB), open_side(items, MIB), MIB)
