"""Paths and beginnings of a checkpoint's files, and whether they are still the same."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ckptc.diagnostics import InputError
from ckptc.ir.source import SourceFile
from ckptc.storage.source.content import check_unchanged
from ckptc.storage.source.files import header_digest, read_start, resolve

from ..conftest import SIZE, refusal


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x", "", "."])
def test_a_plan_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    assert refusal(check_unchanged, tmp_path, [SourceFile(name, 1, "sha256:00")]).code == "unsafe-path"


def test_ordinary_names_resolve_below_the_directory(tmp_path: Path) -> None:
    assert resolve(tmp_path, "a/b..c/...safetensors") == tmp_path / "a" / "b..c" / "...safetensors"


def test_the_start_of_a_file_that_is_no_safetensors_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff" * 3_000_000)
    size, head = read_start(tmp_path / "x", "x")
    assert size == 3_000_000 and 16 <= len(head) <= 1 << 16


# -- unchanged -----------------------------------------------------------------------------------------------


def test_unchanged_files_pass(tmp_path: Path, files: list[SourceFile]) -> None:
    check_unchanged(tmp_path, files)


def test_a_changed_size_is_told(tmp_path: Path, files: list[SourceFile]) -> None:
    os.truncate(tmp_path / "2.safetensors", SIZE - 8)
    found = refusal(check_unchanged, tmp_path, files)
    assert found.code == "source-changed" and "`2.safetensors`" in found.message
    assert found.notes == (f"expected: {SIZE} bytes", f"found: {SIZE - 8} bytes")


def test_a_changed_header_of_the_same_size_is_told(tmp_path: Path, files: list[SourceFile]) -> None:
    with open(tmp_path / "2.safetensors", "r+b") as file:
        file.seek(10)
        file.write(b" ")
        file.seek(9)
        file.write(b" ")
    found = refusal(check_unchanged, tmp_path, files)
    changed = header_digest(read_start(tmp_path / "2.safetensors", "2")[1])
    assert found.code == "source-changed"
    assert found.notes == (f"expected: header {files[2].header_digest}", f"found: header {changed}")


def test_every_changed_file_is_told_at_once_in_order(tmp_path: Path, files: list[SourceFile]) -> None:
    (tmp_path / "1.safetensors").unlink()
    (tmp_path / "3.safetensors").write_bytes(b"")
    changed = [*files[:5], replace(files[5], size=1, header_digest="sha256:00"), *files[6:]]
    with pytest.raises(InputError) as caught:
        check_unchanged(tmp_path, changed)
    found = caught.value.diagnostics
    assert [d.code for d in found] == ["source-missing", "source-changed", "source-changed"]
    assert [d.message.split("`")[1] for d in found] == [f"{n}.safetensors" for n in (1, 3, 5)]
    assert len(found[2].notes) == 4


@pytest.mark.parametrize("head", [b"", b"\x01", b"version https://git-lfs", b"\xff" * 8, b"\xff\xff\0\0\0\0\0\0{}"])
def test_files_that_are_no_longer_safetensors_have_changed(
    tmp_path: Path, files: list[SourceFile], head: bytes
) -> None:
    (tmp_path / "0.safetensors").write_bytes(head)
    assert refusal(check_unchanged, tmp_path, files[:1]).code == "source-changed"


def test_a_missing_directory_is_told_once(tmp_path: Path, files: list[SourceFile]) -> None:
    found = refusal(check_unchanged, tmp_path / "absent", files)
    assert (found.code, str(tmp_path / "absent") in found.message) == ("source-missing", True)
