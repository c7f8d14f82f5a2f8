"""Orbax checkpoints as training leaves them: found wherever they lie, listed, and read box by box, whatever their
format.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptc.diagnostics import InputError
from ckptc.storage.checkpoint.orbax_reader import check_saved, open_reader, open_saved

STORED = [{"use_ocdbt": a, "use_zarr3": b} for a, b in itertools.product((True, False), repeat=2)]


def tree() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "params": {
            "layers": [rng.standard_normal((6, 4)).astype(np.float32), np.arange(6, dtype=np.int32)],
            "w": rng.standard_normal((10, 6, 3)).astype(ml_dtypes.bfloat16),
        },
        "opt_state": {"mu": np.zeros((3,), np.float32)},
        "step": 7,
    }


def save(directory: Path, what: Any, **options: Any) -> Path:
    args = ocp.args.PyTreeSave(what)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(directory.resolve(), args)
    return directory


@pytest.mark.parametrize("options", STORED, ids=str)
def test_every_format_lists_the_same_arrays(options: dict[str, bool], tmp_path: Path) -> None:
    saved, step = open_saved(save(tmp_path / "items", tree(), **options))
    assert step.items == tmp_path / "items" and saved.place == ""
    assert [(a.name, a.dtype, a.shape) for a in saved.arrays if a.path[0] == "params"] == [
        ("params/layers/0", "float32", (6, 4)),
        ("params/layers/1", "int32", (6,)),
        ("params/w", "bfloat16", (10, 6, 3)),
    ]
    assert saved.optimizer == 1
    check_saved(step.items, saved.files)


@pytest.mark.parametrize("options", STORED, ids=str)
@pytest.mark.parametrize(
    "axes", [((0, 1, 10), (0, 1, 6), (0, 1, 3)), ((1, 3, 3), (2, 2, 2), (1, 1, 2)), ((9, 1, 1), (5, 1, 1), (2, 1, 1))]
)
def test_boxes_with_strides(options: dict[str, bool], axes: tuple[tuple[int, int, int], ...], tmp_path: Path) -> None:
    """In pieces of chunks, one at a time or several."""
    values = tree()["params"]["w"]
    items = save(tmp_path / "items", tree(), **options)
    for chunk, in_flight in itertools.product([(10, 6, 3), (4, 5, 2)], [0, 1 << 20]):
        out = np.zeros([count for _, _, count in axes], values.dtype)
        open_reader(items).read(("params", "w"), axes, chunk, out, in_flight)
        expected = values[tuple(slice(start, start + stride * count, stride) for start, stride, count in axes)]
        assert out.tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"tree_metadata": {"a": {}}}'])
def test_damaged_metadata(text: str, tmp_path: Path) -> None:
    items = save(tmp_path / "items", tree())
    (items / "_METADATA").write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        open_saved(items)
    assert caught.value.diagnostics[0].code == "orbax-json"


@pytest.mark.parametrize("options", STORED, ids=str)
def test_another_checkpoint_is_not_the_same(options: dict[str, bool], tmp_path: Path) -> None:
    saved, _ = open_saved(save(tmp_path / "a", tree(), **options))
    other = tree()
    other["params"]["w"] = other["params"]["w"][:, :5]
    items = open_saved(save(tmp_path / "b", other, **options))[1].items
    with pytest.raises(InputError) as caught:
        check_saved(items, saved.files)
    assert {d.code for d in caught.value.diagnostics} == {"source-changed"}
