"""safetensors files written box by box: whole under their final names, or not there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ckptc.diagnostics import InputError
from ckptc.io.safetensors import DTYPES as READ
from ckptc.io.safetensors_writer import UNFINISHED, CheckpointWriter, FileSpec, runs
from ckptc.plan.model import Array
from ckptc.plan.outputs import DTYPES, header, index, lay_out


def array(name: str, shape: tuple[int, ...], dtype: str) -> Array:
    n = len(shape)
    return Array((name,), shape, dtype, shape, shape, (1,) * n, (None,) * n, "rule", (), (), ())


ARRAYS = [
    array("a", (3, 5), "bfloat16"),
    array("b", (7,), "float32"),
    array("c", (), "float32"),
    array("d", (2, 2), "int64"),
]


def spec(most: int = 10**6) -> tuple[tuple[Array, ...], list[FileSpec], list[tuple[int, int]]]:
    """Arrays in order, their files, and the file and first byte of each."""
    ordered, files = lay_out(ARRAYS, most)
    specs = [FileSpec(f.name, f.size, header(ordered[f.first : f.first + len(f.begins)])) for f in files]
    return ordered, specs, [(n, begin) for n, f in enumerate(files) for begin in f.begins]


def test_dtypes_are_named_as_the_reader_reads_them() -> None:
    assert {code: name for name, code in DTYPES.items()}.items() <= {
        code: name for code, (name, _) in READ.items()
    }.items()


@pytest.mark.parametrize("most", [10**6, 30])
def test_files_are_read_by_safetensors(most: int, tmp_path: Path) -> None:
    ordered, specs, places = spec(most)
    values = {a.name: np.arange(a.nbytes, dtype=np.uint8) + n for n, a in enumerate(ordered)}
    with CheckpointWriter(tmp_path, specs) as writer:
        for a, (file, begin) in zip(ordered, places, strict=True):
            box = tuple((0, n) for n in a.shape)
            itemsize = a.nbytes // max(1, a.size)
            writer.write_box(file, begin, a.shape, box, values[a.name].view(f"u{itemsize}").reshape(a.shape))
        assert all(name.endswith(UNFINISHED) for name in os.listdir(tmp_path))
        writer.commit({"config.json": "{}"}, {})
    found = {name: t for s in specs for name, t in load_file(str(tmp_path / s.name)).items()}
    assert {n: t.tobytes() for n, t in found.items()} == {n: v.tobytes() for n, v in values.items()}
    assert all(begin % (a.nbytes // a.size) == 0 for a, (_, begin) in zip(ordered, places, strict=True))


def test_boxes_are_put_in_their_places_and_read_back(tmp_path: Path) -> None:
    whole = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5)
    box = ((1, 3), (0, 4), (2, 5))
    file = FileSpec("model.safetensors", 8 + whole.nbytes, b"01234567")
    with CheckpointWriter(tmp_path, [file]) as writer:
        part = np.ascontiguousarray(whole[1:3, :, 2:5])
        writer.write_box(0, 8, whole.shape, box, part)
        back = np.zeros_like(part)
        writer.read_box(0, 8, whole.shape, box, back)
        writer.commit({}, {})
    assert (back == part).all()
    stored = np.frombuffer((tmp_path / "model.safetensors").read_bytes()[8:], np.uint16).reshape(whole.shape)
    expected = np.zeros_like(whole)
    expected[1:3, :, 2:5] = part
    assert (stored == expected).all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (((0, 3), (0, 4)), [(0, 12)]),
        (((1, 3), (0, 4)), [(4, 8)]),
        (((1, 3), (1, 3)), [(5, 2), (9, 2)]),
    ],
)
def test_runs_are_as_long_as_they_can_be(box: tuple[tuple[int, int], ...], expected: list[tuple[int, int]]) -> None:
    assert list(runs((3, 4), box)) == expected
    assert list(runs((), ())) == [(0, 1)]


def test_what_fails_leaves_nothing_and_a_later_run_clears_what_was_killed(tmp_path: Path) -> None:
    _, specs, _ = spec()
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path, specs):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    (tmp_path / f".model-00001-of-00002.safetensors{UNFINISHED}").write_bytes(b"killed")
    with CheckpointWriter(tmp_path, specs) as writer:
        writer.commit({"config.json": "{}"}, {})
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_two_runs_exclude_each_other(tmp_path: Path) -> None:
    _, specs, _ = spec()
    with CheckpointWriter(tmp_path, specs), pytest.raises(InputError) as caught:
        CheckpointWriter(tmp_path, specs)
    assert caught.value.diagnostics[0].code == "output-busy"


def test_a_checkpoint_is_replaced_only_by_force(tmp_path: Path) -> None:
    _, specs, _ = spec()
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    with pytest.raises(InputError) as caught:
        CheckpointWriter(tmp_path, specs)
    assert caught.value.diagnostics[0].code == "output-exists"
    with CheckpointWriter(tmp_path, specs, force=True) as writer:
        assert (tmp_path / "model-00001-of-00002.safetensors").exists()  # until the new one is whole
        writer.commit({"config.json": "{}"}, {})
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_the_index_names_every_tensor() -> None:
    ordered, files = lay_out(ARRAYS, 30)
    text = index(files, ordered)
    assert all(f'"{a.name}": "model-' in text for a in ordered) and f'"total_size": {30 + 28 + 4 + 32}' in text
