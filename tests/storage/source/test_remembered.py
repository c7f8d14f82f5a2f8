"""The memory of where checkpoints lie: a convenience that never stands in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptc.storage.source.remembered import recall, remember

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "ckptc" / "sources").iterdir())


def test_what_was_remembered_is_recalled(checkpoint: Path) -> None:
    assert recall(DIGEST) is None
    remember(DIGEST, checkpoint)
    assert recall(DIGEST) == checkpoint
    assert recall(DIGEST[:-1] + "0") is None


def test_a_later_note_replaces_an_earlier_one(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    remember(DIGEST, tmp_path)
    remember(DIGEST, checkpoint)
    assert recall(DIGEST) == checkpoint
    assert len(entries(cache)) == 1  # and no temporary file is left


def test_each_digest_has_a_file_of_its_own(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    remember(DIGEST, checkpoint)
    remember("sha256:00", tmp_path)
    assert (recall(DIGEST), recall("sha256:00"), len(entries(cache))) == (checkpoint, tmp_path, 2)


def test_a_relative_directory_is_remembered_absolutely(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    remember(DIGEST, Path("checkpoint"))
    monkeypatch.chdir("/")
    assert recall(DIGEST) == checkpoint


def test_a_link_is_remembered_by_its_own_name(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(checkpoint)
    remember(DIGEST, tmp_path / "latest")
    assert recall(DIGEST) == tmp_path / "latest"


@pytest.mark.parametrize("name", ["with\nnewline ", "ünïcode", os.fsdecode(b"not-utf8-\xff")])
def test_any_directory_name_survives(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    remember(DIGEST, tmp_path / name)
    assert recall(DIGEST) == tmp_path / name


def test_a_directory_that_is_gone_is_not_recalled(checkpoint: Path) -> None:
    remember(DIGEST, checkpoint)
    checkpoint.rmdir()
    assert recall(DIGEST) is None


@pytest.mark.parametrize("content", [b"", b"relative", b"/\0", b"/" * 100_000, b"\xff\xfe"])
def test_a_damaged_note_is_no_note(checkpoint: Path, cache: Path, content: bytes) -> None:
    remember(DIGEST, checkpoint)
    entries(cache)[0].write_bytes(content)
    assert recall(DIGEST) is None


def test_a_cache_that_cannot_be_written_is_no_error(checkpoint: Path, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    remember(DIGEST, checkpoint)
    assert recall(DIGEST) is None


def test_a_failed_write_leaves_the_earlier_note(
    checkpoint: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(DIGEST, checkpoint)

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ckptc.storage.source.remembered.os.replace", refuse)
    remember(DIGEST, tmp_path)
    assert recall(DIGEST) == checkpoint
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("digest", ["../../escape", "/absolute", "", "a\0b", "\ud800", "x" * 10_000])
def test_a_digest_is_never_a_path(checkpoint: Path, cache: Path, digest: str) -> None:
    remember(digest, checkpoint)
    assert recall(digest) == checkpoint
    assert [path.parent for path in cache.rglob("*") if path.is_file()] == [cache / "ckptc" / "sources"]


def test_a_relative_xdg_cache_home_is_ignored(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remember(DIGEST, checkpoint)
    assert recall(DIGEST) == checkpoint
    assert (tmp_path / "home" / ".cache" / "ckptc" / "sources").is_dir()


def test_a_machine_without_a_home_remembers_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home directory")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    remember(DIGEST, checkpoint)
    assert recall(DIGEST) is None
