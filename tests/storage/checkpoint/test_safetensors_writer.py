"""safetensors files written box by box: whole under their final names, or not there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ckptc.diagnostics import InputError
from ckptc.ops.nest import Part, whole
from ckptc.plan.files import DTYPES, INDEX, headers, lay_out, places, texts
from ckptc.plan.model import Choices, Kind, Made, Output, Plan, Safetensors, Source, Totals
from ckptc.storage.checkpoint.safetensors_writer import UNFINISHED, CheckpointWriter, FileSpec, runs
from ckptc.storage.formats.safetensors import DTYPES as READ


def kind(shape: tuple[int, ...], dtype: str) -> Kind:
    part = Part(None, 0, 0, tuple(whole(n, 0) for n in shape))
    return Kind("rule", shape, dtype, shape, shape, (), (part,))


KINDS = [kind((3, 5), "bfloat16"), kind((7,), "float32"), kind((), "float32"), kind((2, 2), "int64")]
TENSORS = [Output(name, n, ()) for n, name in enumerate("abcd")]


def layout(plan: Plan) -> Safetensors:
    assert isinstance(plan.layout, Safetensors)
    return plan.layout


def planned(most: int = 10**6) -> Plan:
    """Four tensors in files of at most so many bytes of them, unless a single one is larger."""
    tensors, files = lay_out(TENSORS, KINDS, most)
    return Plan(
        made=Made("", "", "", "", ""),
        choices=Choices("scanned", "bfloat16", False, 1, "hub", {}),
        totals=Totals(0, 0, 0, 0, 0, 0),
        sources=(Source("orbax"),),
        layout=Safetensors(files, {}),
        left_out=(),
        kinds=tuple(KINDS),
        outputs=tensors,
        tensors=(),
    )


def specs_of(plan: Plan) -> list[FileSpec]:
    files = layout(plan).files
    return [FileSpec(f.name, f.size, begin) for f, begin in zip(files, headers(plan, layout(plan)), strict=True)]


def test_dtypes_are_named_as_the_reader_reads_them() -> None:
    assert {code: name for name, code in DTYPES.items()}.items() <= {
        code: name for code, (name, _) in READ.items()
    }.items()


@pytest.mark.parametrize("most", [10**6, 30])
def test_files_are_read_by_safetensors(most: int, tmp_path: Path) -> None:
    plan = planned(most)
    specs, named = specs_of(plan), [(o.name, plan.kinds[o.kind]) for o in plan.outputs]
    located = places(plan, layout(plan))
    values = {name: np.arange(k.nbytes, dtype=np.uint8) + n for n, (name, k) in enumerate(named)}
    with CheckpointWriter(tmp_path, specs) as writer:
        writer.create()
        for (name, k), (file, begin) in zip(named, located, strict=True):
            box = tuple((0, n) for n in k.shape)
            itemsize = k.nbytes // max(1, k.size)
            writer.write_box(file, begin, k.shape, box, values[name].view(f"u{itemsize}").reshape(k.shape))
        assert all(name.endswith(UNFINISHED) for name in os.listdir(tmp_path))
        writer.commit({"config.json": "{}"}, {})
    found = {name: t for s in specs for name, t in load_file(str(tmp_path / s.name)).items()}
    assert {n: t.tobytes() for n, t in found.items()} == {n: v.tobytes() for n, v in values.items()}
    assert all(begin % (k.nbytes // k.size) == 0 for (_, k), (_, begin) in zip(named, located, strict=True))


def test_boxes_are_put_in_their_places_and_read_back(tmp_path: Path) -> None:
    whole = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5)
    box = ((1, 3), (0, 4), (2, 5))
    file = FileSpec("model.safetensors", 8 + whole.nbytes, b"01234567")
    with CheckpointWriter(tmp_path, [file]) as writer:
        writer.create()
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
    specs = specs_of(planned())
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path, specs):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    (tmp_path / f".model-00001-of-00002.safetensors{UNFINISHED}").write_bytes(b"killed")
    with CheckpointWriter(tmp_path, specs) as writer:
        writer.create()
        writer.commit({"config.json": "{}"}, {})
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_two_runs_exclude_each_other(tmp_path: Path) -> None:
    specs = specs_of(planned())
    with CheckpointWriter(tmp_path, specs), pytest.raises(InputError) as caught:
        CheckpointWriter(tmp_path, specs)
    assert caught.value.diagnostics[0].code == "output-busy"


def test_a_checkpoint_is_replaced_only_by_force(tmp_path: Path) -> None:
    specs = specs_of(planned())
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    with pytest.raises(InputError) as caught:
        CheckpointWriter(tmp_path, specs)
    assert caught.value.diagnostics[0].code == "output-exists"
    with CheckpointWriter(tmp_path, specs, force=True) as writer:
        writer.create()
        assert (tmp_path / "model-00001-of-00002.safetensors").exists()  # until the new one is whole
        writer.commit({"config.json": "{}"}, {})
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


class Killed(BaseException):
    """What a process that is killed does next: nothing."""


def killed_in_commit(directory: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a replacement of what is there was killed before its `step`th rename, removal or sync."""
    left = step

    def counted(name: str) -> None:
        plain = getattr(os, name)

        def call(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return plain(*arguments)

        patch.setattr(os, name, call)

    new = [FileSpec("model-00001-of-00002.safetensors", 3, b"new"), FileSpec("model.safetensors", 3, b"new")]
    writer = CheckpointWriter(directory, new, force=True)
    writer.create()
    (directory.parent / "tokenizer").write_text("new")
    try:
        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "fsync"):
                counted(name)
            writer.commit({"config.json": "new"}, {"tokenizer.json": directory.parent / "tokenizer"})
    except Killed:
        pass
    for file in writer._open:
        file.abandon()
    os.close(writer._lock)
    return left < 0


def contents(directory: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in directory.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("older", [True, False], ids=["replaces", "new"])
def test_a_commit_killed_at_any_step_leaves_what_was_there_or_what_is_new(
    older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
    before = {"notes.txt": "old"}
    before |= dict.fromkeys((*names, "config.json", "tokenizer.json"), "old") if older else {}
    after = {"notes.txt": "old"}
    after |= dict.fromkeys((names[0], "model.safetensors", "config.json", "tokenizer.json"), "new")
    step, ends = 0, []
    while True:
        directory = tmp_path / str(step) / "out"
        directory.mkdir(parents=True)
        for name, text in before.items():
            (directory / name).write_text(text)
        if not killed_in_commit(directory, step, monkeypatch):
            break
        found = contents(directory)
        assert found in (before, after) or "config.json" not in found, "half a checkpoint is none"
        with CheckpointWriter(directory, [], force=True):
            pass  # the next run, which fails
        ends.append(contents(directory))
        assert ends[-1] == (after if found == after else before)
        assert [n for n in os.listdir(directory) if "ckptc" in n] == []
        step += 1
    assert contents(directory) == after and before in ends and after in ends and step > 10


def test_the_index_names_every_tensor() -> None:
    plan = planned(30)
    text = texts(plan, layout(plan))[INDEX]
    assert all(f'"{t.name}": "model-' in text for t in TENSORS) and f'"total_size": {30 + 28 + 4 + 32}' in text
