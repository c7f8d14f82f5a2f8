"""`--force` replaces a checkpoint, and nothing else; and never what is read from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.plan.json import dumps
from ckptc.plan.model import Plan
from ckptc.run import runner
from ckptc.run.export import export
from ckptc.run.journal import UNFINISHED
from ckptc.run.runner import Settings
from golden import compile_case, known_cases
from roundtrip import export_plan

CASE = next(case for case in known_cases() if case.id == "qwen3.scan")

LINK = pytest.mark.parametrize("link", [False, True], ids=["copied", "linked"])


def convert(source: Path, output: Path, link: bool = False, force: bool = True, **more: Any) -> None:
    plan: Plan = compile_case(CASE, link=link)
    runner.run(plan, json.loads(dumps(plan))["digest"], output, source, settings=Settings(1, force=force), **more)


def refused(*arguments: Any, **more: Any) -> Diagnostic:
    with pytest.raises(InputError) as caught:
        convert(*arguments, **more)
    (found,) = caught.value.diagnostics
    assert found.code == "output-exists"
    return found


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@LINK
@pytest.mark.parametrize("below", ["0", "0/hf", UNFINISHED, f"{UNFINISHED}/checkpoint"])
def test_a_source_in_the_output_is_not_replaced(below: str, link: bool, tmp_path: Path) -> None:
    source = tmp_path / "out" / below
    shutil.copytree(CASE.hf, source)
    (tmp_path / "out" / "0").mkdir(exist_ok=True)
    (tmp_path / "out" / "0" / "_CHECKPOINT_METADATA").write_text("{}")
    before = snapshot(tmp_path)
    found = refused(source, tmp_path / "out", link)
    assert "is read and lies in" in found.message
    assert snapshot(tmp_path) == before


@LINK
def test_a_source_whose_links_lead_into_the_output_is_not_replaced(link: bool, tmp_path: Path) -> None:
    kept, source = tmp_path / "out" / "0" / "hf", tmp_path / "source"
    shutil.copytree(CASE.hf, kept)
    (kept.parent / "_CHECKPOINT_METADATA").write_text("{}")
    source.mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    for file in kept.iterdir():
        (source / file.name).symlink_to(tmp_path / "alias" / "0" / "hf" / file.name)
    refused(source, tmp_path / "out", link)
    refused(source, tmp_path / "alias", link)
    assert sorted(p.name for p in kept.iterdir()) == sorted(p.name for p in CASE.hf.iterdir())


def test_an_output_that_is_a_link_to_the_source_is_not_replaced(tmp_path: Path) -> None:
    source = Path(shutil.copytree(CASE.hf, tmp_path / "source"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0").symlink_to(source)
    refused(source, tmp_path / "out")
    assert (tmp_path / "out" / "0").is_symlink()


def test_an_output_below_the_source_leaves_the_source(tmp_path: Path) -> None:
    source = Path(shutil.copytree(CASE.hf, tmp_path / "source"))
    before = snapshot(source)
    for _ in range(2):
        convert(source, source / "out")
    assert {k: v for k, v in snapshot(source).items() if not k.startswith("out/")} == before


def test_a_linked_checkpoint_is_replaced_and_its_source_stays(tmp_path: Path) -> None:
    """Hard links are second names: the source's own stay."""
    source = Path(shutil.copytree(CASE.hf, tmp_path / "source"))
    before = snapshot(source)
    convert(source, tmp_path / "out", link=True)
    convert(source, tmp_path / "out", link=True)
    convert(source, tmp_path / "out")
    assert snapshot(source) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory", "empty", "link"])
def test_what_is_no_checkpoint_is_never_replaced_nor_called_one(kind: str, force: bool, tmp_path: Path) -> None:
    final = tmp_path / "out" / "0"
    final.parent.mkdir()
    if kind == "file":
        final.write_text("notes")
    elif kind == "link":
        final.symlink_to(tmp_path / "nowhere")
    else:
        final.mkdir()
    if kind == "directory":
        (final / "thesis.tex").write_text("years of work")
    found = refused(CASE.hf, tmp_path / "out", force=force)
    assert "no checkpoint" in found.message and "a checkpoint" not in found.message.replace("no checkpoint", "")
    assert os.path.lexists(final) and [p.name for p in final.parent.iterdir()] == ["0"]
    assert kind != "directory" or (final / "thesis.tex").read_text() == "years of work"


def test_what_appears_during_a_run_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def appear(_: Path) -> None:
        (output / "0").mkdir()
        (output / "0" / "thesis.tex").write_text("years of work")

    found = refused(CASE.hf, output, before_commit=appear)
    assert "no checkpoint" in found.message and (output / "0" / "thesis.tex").exists()


def test_an_export_does_not_replace_what_it_copies_from(tmp_path: Path) -> None:
    """The original's weights lie beside its config."""
    original = Path(shutil.copytree(CASE.hf, tmp_path / "original"))
    before = snapshot(original)
    convert(original, tmp_path / "out")
    plan = export_plan(CASE, tmp_path / "out")
    (tmp_path / "alias").symlink_to(original)
    for output in (original, tmp_path / "alias"):
        with pytest.raises(InputError, match="output-exists"):
            export(plan, output, tmp_path / "out", original, force=True)
    assert snapshot(original) == before
