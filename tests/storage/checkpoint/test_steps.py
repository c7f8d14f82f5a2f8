"""One finder of checkpoints: from any part of its place, the directory of the arrays is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.storage.checkpoint.steps import METADATA, find_step, number


def save(directory: Path, value: float = 1) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory.resolve(), ocp.args.PyTreeSave({"params": {"w": np.full(4, value)}}))
    return directory


def refusal(given: Path) -> Diagnostic:
    with pytest.raises(InputError) as caught:
        find_step(given)
    return caught.value.diagnostics[0]


@pytest.mark.parametrize("item", ["items", "default"])
@pytest.mark.parametrize("name", ["7", "step_00000007", "checkpoint_7"])
def test_every_part_of_its_place_names_a_checkpoint(name: str, item: str, tmp_path: Path) -> None:
    items = save(tmp_path / "run" / "checkpoints" / name / item)
    for given in (items, items.parent, items.parent.parent, tmp_path / "run"):
        assert find_step(given).items == items
        assert find_step(given).said == ""


def test_orbax_names_steps_as_they_are_understood(tmp_path: Path) -> None:
    options = ocp.CheckpointManagerOptions(step_prefix="step", step_format_fixed_length=8)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave({"w": np.ones(3)}))
    found = find_step(tmp_path / "run")
    assert found.items == tmp_path / "run" / "step_00000010" / "default"
    assert found.directory == tmp_path / "run" / "step_00000010"
    assert found.said == "step_00000010, the last of 2 steps"


def test_the_last_complete_step_is_taken_and_said(tmp_path: Path) -> None:
    for step in ("9", "10", "11"):
        save(tmp_path / step / "items")
    (tmp_path / "11" / "items" / METADATA).unlink()
    save(tmp_path / "12.orbax-checkpoint-tmp-3" / "items")
    found = find_step(tmp_path)
    assert found.items == tmp_path / "10" / "items"
    assert found.said == "10, the last complete one of 4 steps; not complete: 12.orbax-checkpoint-tmp-3, 11"


def test_items_that_were_saved_by_themselves(tmp_path: Path) -> None:
    items = save(tmp_path / "mine")
    assert (find_step(items).items, find_step(items).directory) == (items, items)


def test_several_items(tmp_path: Path) -> None:
    save(tmp_path / "0" / "mine")
    assert find_step(tmp_path / "0").items == tmp_path / "0" / "mine"
    save(tmp_path / "0" / "yours")
    assert refusal(tmp_path).code == "which-item"
    save(tmp_path / "0" / "items")
    assert find_step(tmp_path).items == tmp_path / "0" / "items"


def test_what_lies_beside_the_items_is_no_item(tmp_path: Path) -> None:
    items = save(tmp_path / "0" / "items")
    (tmp_path / "0" / "hf").mkdir()
    (tmp_path / "0" / "hf" / "config.json").write_text("{}", "utf-8")
    assert find_step(tmp_path).items == items


def test_a_directory_without_metadata_is_refused(tmp_path: Path) -> None:
    items = save(tmp_path / "0" / "items")
    (items / METADATA).unlink()
    for given in (tmp_path, tmp_path / "0", items):
        assert refusal(given).code == "unfinished-checkpoint"


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").code == "missing-directory"
    assert refusal(tmp_path).code == "no-checkpoint"
    unfinished = save(tmp_path / "3.orbax-checkpoint-tmp-12" / "items")
    assert refusal(tmp_path).notes == ("unfinished: 3.orbax-checkpoint-tmp-12",)
    assert refusal(unfinished).code == refusal(unfinished.parent).code == "unfinished-checkpoint"


@pytest.mark.parametrize(
    ("name", "step"),
    [("7", 7), ("step_007", 7), ("step-7", 7), ("7.orbax-checkpoint-tmp-12", 7), ("items", None), ("v2", None)],
)
def test_steps_are_named_for_their_numbers(name: str, step: int | None) -> None:
    assert number(Path("run", name)) == step
