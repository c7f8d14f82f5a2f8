"""An export reads the checkpoint that its plan was made from: other weights in the same tree are another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptc.diagnostics import InputError
from ckptc.run import export as export_module
from ckptc.run.export import export
from golden import expected_of, known_cases
from roundtrip import converted, export_plan

CASE = next(case for case in known_cases() if case.id == "llama3_1.scan")

pytestmark = [pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:.*donated")]


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def edit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def trees(directory: Path, number: int) -> Path:
    """Without OCDBT: a directory for each array, whose metadata is the same whatever the values."""
    tree = {name: np.full_like(a, number) for name, a in expected_of(CASE).items()}
    nested: dict[str, object] = {}
    for name, values in tree.items():
        at = nested
        *parents, last = name.split("/")
        for key in parents:
            at = at.setdefault(key, {})  # type: ignore[assignment]
        at[last] = values
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    ocp.Checkpointer(handler).save(directory.absolute(), nested)
    return directory


def refused(saved: Path, plan: object, output: Path) -> str:
    with pytest.raises(InputError) as caught:
        export(plan, output, saved, CASE.hf)  # type: ignore[arg-type]
    (found,) = {d.code for d in caught.value.diagnostics}
    assert not (output / "config.json").exists()
    return found


def test_other_weights_in_a_database_are_another_checkpoint(tmp_path: Path) -> None:
    saved = converted(CASE, tmp_path / "saved")
    plan = export_plan(CASE, saved)
    assert export_plan(CASE, saved) == plan
    edit(largest(saved / "0" / "items"))
    assert refused(saved, plan, tmp_path / "hf") == "source-changed"


def test_other_weights_in_directories_are_another_checkpoint(tmp_path: Path) -> None:
    first, second = trees(tmp_path / "first", 1), trees(tmp_path / "second", 2)
    names = sorted(p.relative_to(first) for p in first.rglob(".zarray"))
    assert names and all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
    plan = export_plan(CASE, first, layout="scanned")
    assert plan != export_plan(CASE, second, layout="scanned")
    shutil.rmtree(first)
    second.rename(first)
    assert refused(first, plan, tmp_path / "hf") == "source-changed"


def test_a_checkpoint_that_changes_while_it_is_read_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = converted(CASE, tmp_path / "saved")
    plan = export_plan(CASE, saved)
    look = export_module._Work.look_at_the_rest

    def edited(self: export_module._Work) -> None:
        look(self)
        edit(largest(saved / "0" / "items"))

    monkeypatch.setattr(export_module._Work, "look_at_the_rest", edited)
    assert refused(saved, plan, tmp_path / "hf") == "source-changed"
