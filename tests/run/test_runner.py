"""A run refuses what it must before it writes, and its output is whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import orbax.checkpoint as ocp
import pytest

import ckptc
from ckptc.cli import main
from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.diagnostics import Diagnostic, InputError
from ckptc.plan.json import dumps
from ckptc.plan.model import Plan
from ckptc.run import runner, worker
from ckptc.run.runner import Progress, Settings
from ckptc.spec.mapping import find_model
from ckptc.storage.checkpoint.orbax_writer import ItemsWriter
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from reference import DATA

MODEL, GOLDEN = "llama3.1-8b", DATA / "golden" / "llama3_1" / "hf"  # in two files
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OPTIONS = Options(set={"padded_vocab": 160}, memory=1 << 14)  # many units


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of the test's own."""
    shutil.copytree(GOLDEN, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def compiled(source: Path, options: Options = OPTIONS) -> Plan:
    return compile_plan(*find_model(MODEL), options, open_checkpoint(source))


def run(plan: Plan, output: Path, source: Path | None, settings: Settings | None = None) -> runner.Report:
    digest: str = json.loads(dumps(plan))["digest"]
    return runner.run(plan, digest, output, source, settings=settings)


def refused(plan: Plan, output: Path, source: Path | None, settings: Settings | None = None) -> list[Diagnostic]:
    """What a run that must be refused says. There is no checkpoint afterwards."""
    with pytest.raises(InputError) as error:
        run(plan, output, source, settings)
    assert not (output / "0").exists()
    return list(error.value.diagnostics)


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file, with the time of its last change and its bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# -- what is refused before anything is written --------------------------------------------------------------


def test_an_existing_checkpoint_is_refused_and_untouched(source: Path, output: Path) -> None:
    run(compiled(source), output, source)
    before = snapshot(output)
    with pytest.raises(InputError) as error:
        run(compiled(source, replace(OPTIONS, layout="unscanned")), output, source)
    assert [d.code for d in error.value.diagnostics] == ["output-exists"]
    assert str(output / "0") in error.value.diagnostics[0].message
    assert snapshot(output) == before


def test_anything_else_of_that_name_is_refused_and_untouched(source: Path, output: Path) -> None:
    output.mkdir()
    (output / "0").write_text("notes")
    with pytest.raises(InputError, match="output-exists"):
        run(compiled(source), output, source)
    assert (output / "0").read_text() == "notes"


def grown(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)


def renamed_tensor(file: Path) -> None:
    """Another header of the same length."""
    content = file.read_bytes()
    assert content.count(b"q_proj") > 0
    file.write_bytes(content.replace(b"q_proj", b"p_proj"))


CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "longer": (grown, "source-changed", "bytes"),
    "shorter": (cut, "source-changed", "bytes"),
    "another header": (renamed_tensor, "source-changed", "header sha256:"),
    "gone": (Path.unlink, "source-missing", "nothing"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", FILES)
def test_a_source_that_changed_since_is_refused_with_its_name(
    change: str, file: str, source: Path, output: Path
) -> None:
    plan = compiled(source)
    edit, code, differs = CHANGES[change]
    edit(source / file)
    (found,) = refused(plan, output, source)
    assert found.code == code
    assert file in found.message
    assert any(note.startswith("found: ") and differs in note for note in found.notes)
    assert not output.exists()


def test_every_file_that_changed_is_named(source: Path, output: Path) -> None:
    plan = compiled(source)
    for file in FILES:
        grown(source / file)
    found = refused(plan, output, source)
    assert [file for d in found for file in FILES if file in d.message] == list(FILES)


def test_a_plan_made_without_a_checkpoint_is_refused(source: Path, output: Path) -> None:
    plan = compile_plan(*find_model(MODEL), Options())
    (found,) = refused(plan, output, source)
    assert found.code == "abstract-plan"
    assert "--source" in str(found.help)
    assert not output.exists()


# -- a run that fails half way -------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_source_cut_short_half_way_leaves_no_checkpoint(
    jobs: int, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = compiled(source)
    load, begun = worker.Worker._load, output.with_name("begun")

    def cutting(self: Any, unit: Any, turn: int) -> Any:
        if begun.exists():  # in whichever process: the second unit finds the files cut
            for file in FILES:
                os.truncate(source / file, 2000)
        begun.touch()
        return load(self, unit, turn)

    monkeypatch.setattr(worker.Worker, "_load", cutting)
    (found,) = refused(plan, output, source, Settings(jobs=jobs))
    assert found.code == "source-truncated"
    assert any(file in found.message for file in FILES)
    assert output.exists()  # it had begun


def test_a_write_that_fails_leaves_no_checkpoint(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compiled(source)
    write, written = ItemsWriter.write_chunk, []

    def failing(writer: ItemsWriter, array: int, index: tuple[int, ...], chunk: npt.NDArray[Any]) -> Any:
        if len(written) == 20:
            raise RuntimeError("the disk is on fire")
        written.append(index)
        return write(writer, array, index, chunk)

    monkeypatch.setattr(ItemsWriter, "write_chunk", failing)
    with pytest.raises(RuntimeError, match="on fire"):
        run(plan, output, source)
    assert not (output / "0").exists()
    monkeypatch.undo()
    run(plan, output, source)
    assert (output / "0" / "items" / "_METADATA").exists()


# -- what a run says -----------------------------------------------------------------------------------------


def test_the_report_and_the_progress_are_the_plans_numbers(source: Path, output: Path) -> None:
    plan = compiled(source)
    steps: list[Progress] = []
    report = runner.run(plan, json.loads(dumps(plan))["digest"], output, source, steps.append)
    assert (report.read_bytes, report.write_bytes) == (plan.totals.read_bytes, plan.totals.write_bytes)
    assert report.output == str(output / "0")
    assert steps[-1].written == steps[-1].total == plan.totals.write_bytes
    assert {step.array for step in steps} <= {a.name for a in plan.arrays}


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_the_checkpoint_says_what_made_it(layout: str, source: Path, output: Path) -> None:
    plan = compiled(source, replace(OPTIONS, layout=layout))
    run(plan, output, source)
    with ocp.CheckpointManager(output) as manager:
        custom = manager.metadata(0).custom_metadata
    assert custom["scan_layers"] is (layout == "scanned")
    assert (
        custom["ckptc"].items()
        >= {
            "version": ckptc.__version__,
            "model": MODEL,
            "family": "llama3.1",
            "mapping": plan.made.mapping,
            "source": plan.source,
            "plan": json.loads(dumps(plan))["digest"],
        }.items()
    )


# -- where the source is -------------------------------------------------------------------------------------


@pytest.fixture
def plan_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compiled on the command line, which remembers where the source lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "plan.json"
    assert main.run(["compile", "--model", MODEL, "--source", str(source), "-o", str(file)]) == 0
    return file


def test_without_a_source_the_remembered_one_is_used(plan_file: Path, output: Path) -> None:
    assert main.run(["run", str(plan_file), "--output", str(output)]) == 0
    assert (output / "0" / "items" / "_METADATA").exists()


def test_a_source_that_moved_is_asked_for(
    plan_file: Path, source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = source.rename(source.with_name("moved"))
    assert main.run(["run", str(plan_file), "--output", str(output)]) == 1
    said = capsys.readouterr().err
    assert "error[unknown-source]" in said
    assert "--source" in said
    assert not output.exists()
    assert main.run(["run", str(plan_file), "--source", str(moved), "--output", str(output)]) == 0


def test_a_remembered_directory_that_holds_another_checkpoint_is_refused(
    plan_file: Path, source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(source)
    shutil.copytree(DATA / "golden" / "qwen3_moe" / "hf", source)
    assert main.run(["run", str(plan_file), "--output", str(output)]) == 1
    assert FILES[0] in capsys.readouterr().err
    assert not output.exists()


def test_what_wants_a_look_before_the_commit_is_told_that_an_object_store_has_none(source: Path) -> None:
    plan, looked = compiled(source), list[Path]()
    with pytest.raises(InputError) as error:
        runner.run(plan, json.loads(dumps(plan))["digest"], "gs://bucket/out", source, before_commit=looked.append)
    assert [d.code for d in error.value.diagnostics] == ["unsupported-url"] and looked == []


BESIDE_JAX = """
import os, sys
if sys.argv[4] == "jax":
    import jax
forked, fork = [], os.fork
os.fork = lambda: forked.append(1) or fork()
import json
from pathlib import Path
from ckptc.plan.on_disk import read_plan
from ckptc.run.runner import Settings, run
plan, text = read_plan(Path(sys.argv[1]))
run(plan, json.loads(text)["digest"], sys.argv[2], Path(sys.argv[3]), settings=Settings(jobs=2))
print(len(forked))
"""


@pytest.mark.parametrize(("beside", "workers"), [("nothing", "2"), ("jax", "0")])
def test_a_process_with_jax_is_not_forked(beside: str, workers: str, source: Path, output: Path) -> None:
    (plan := output.with_name("plan.json")).write_text(dumps(compiled(source)), "utf-8")
    command = [sys.executable, "-c", BESIDE_JAX, str(plan), str(output), str(source), beside]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{workers}\n"
    assert ("RuntimeWarning: 1 job instead of 2" in done.stderr) == (beside == "jax"), done.stderr
    assert (output / "0" / "items" / "_METADATA").exists()
