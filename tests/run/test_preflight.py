"""What is checked before weights are read."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.source import SourceFile
from ckptc.plan.model import Plan
from ckptc.run import runner, work
from ckptc.run.preflight import check_memory, check_room, check_sha256, check_source, hub_sha256, read_sums
from ckptc.run.runner import Settings
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from golden import compile_case, known_cases

CASE = next(case for case in known_cases() if case.id == "qwen3.scan")
PLAN = compile_case(CASE)
FILES = [SourceFile(f.name, f.size, f.header) for f in PLAN.sources[0].files]
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(CASE.hf, tmp_path / "source"))


def refused(what: Callable[[], object]) -> Diagnostic:
    with pytest.raises(InputError) as caught:
        what()
    return caught.value.diagnostics[0]


def run(plan: Plan, source: Path, output: Path, settings: Settings | None = None) -> Any:
    return runner.run(plan, DIGEST, output, source, settings=settings)


# --- memory -----------------------------------------------------------------------------------------------------------


def with_memory(budget: int, peak: int) -> Plan:
    return replace(
        PLAN, choices=replace(PLAN.choices, memory=budget), totals=replace(PLAN.totals, peak_memory_bytes=peak)
    )


def test_a_budget_too_small_for_the_largest_unit_is_refused_with_one_that_would_do(tmp_path: Path) -> None:
    plan = with_memory(2 << 20, (5 << 20) + 1)
    found = refused(lambda: run(plan, CASE.hf, tmp_path / "out"))
    assert found.code == "small-memory"
    assert found.notes == ("expected: at most 2097152 bytes", "found: 5242881 bytes")
    assert found.help == "compile it again with `--memory 6MiB`; it cannot be cut smaller"
    assert not (tmp_path / "out").exists()


def test_a_unit_that_just_fits_is_not_refused() -> None:
    check_memory(with_memory(2 << 20, 2 << 20))


# --- disk -------------------------------------------------------------------------------------------------------------


def disk(monkeypatch: pytest.MonkeyPatch, free: int, blocks: int = 1 << 40) -> list[Path]:
    asked: list[Path] = []

    def statvfs(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(f_bavail=free // 512, f_frsize=512, f_blocks=blocks)

    monkeypatch.setattr(os, "statvfs", statvfs)
    return asked


def test_too_little_room_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, free=100 << 10)
    monkeypatch.setattr(work.Work, "execute", lambda *_: pytest.fail("it began"))
    found = refused(lambda: run(PLAN, CASE.hf, tmp_path / "out"))
    assert found.code == "disk-full" and str(tmp_path / "out") in found.message
    assert found.notes[1] == "found: 102400 bytes"
    needed = int(found.notes[0].split()[1])
    assert PLAN.totals.write_bytes < needed < PLAN.totals.write_bytes + (1 << 18)


def test_what_is_done_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same disk refuses the whole run, and takes what is left of it."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", lambda *_, **__: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            run(PLAN, CASE.hf, output)
    disk(monkeypatch, free=PLAN.totals.write_bytes - 1)
    assert refused(lambda: run(PLAN, CASE.hf, tmp_path / "another")).code == "disk-full"
    run(PLAN, CASE.hf, output)


def test_the_disk_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = disk(monkeypatch, free=512)
    check_room(tmp_path / "a" / "b", 512)
    assert asked == [tmp_path]
    assert refused(lambda: check_room(tmp_path / "a" / "b", 513)).code == "disk-full"


def test_a_file_system_that_tells_no_size_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, free=0, blocks=0)
    check_room(tmp_path, 1 << 50)


def test_an_output_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "mkdir", refuse)  # root may write anywhere, and tests may be run as root
    found = refused(lambda: run(PLAN, CASE.hf, tmp_path / "out"))
    assert found.code == "unwritable-output" and "Permission denied" in found.message


# --- source -----------------------------------------------------------------------------------------------------------


def weights(source: Path) -> Path:
    return source / FILES[0].name


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda s: weights(s).unlink(), "source-missing"),
        (lambda s: os.truncate(weights(s), FILES[0].size - 1), "source-changed"),
        (lambda s: os.truncate(weights(s), FILES[0].size + 1), "source-changed"),
        (lambda s: os.truncate(weights(s), 4), "source-changed"),
        (lambda s: (weights(s).unlink(), weights(s).mkdir()), "source-unreadable"),
        (lambda s: shutil.rmtree(s), "missing-directory"),
    ],
    ids=["gone", "short", "long", "almost empty", "a directory", "all gone"],
)
def test_a_source_that_is_not_complete_is_refused(
    source: Path, tmp_path: Path, damage: Callable[[Path], object], code: str
) -> None:
    check_source(PLAN, source, FILES)
    damage(source)
    assert refused(lambda: run(PLAN, source, tmp_path / "out")).code == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensor",
    [{"file": 99}, {"file": -2}, {"end": FILES[0].size + 1}, {"begin": -1}, {"begin": FILES[0].size, "end": 9}],
    ids=str,
)
def test_a_plan_that_reads_outside_its_files_is_refused(tensor: dict[str, int]) -> None:
    first = replace(PLAN.tensors[0], **tensor)
    found = refused(lambda: check_source(replace(PLAN, tensors=(first, *PLAN.tensors[1:])), CASE.hf, FILES))
    assert found.code == "invalid-plan" and first.name in found.message


# --- SHA-256 ----------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_flipped_bit_of_the_source_is_found_with_a_file_of_sums(source: Path, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_text("".join(f"{sha256(source / f.name)}  {f.name}\n" for f in FILES))
    settings = Settings(jobs=1, sha256=str(sums))
    run(PLAN, source, tmp_path / "right", settings)
    right = sha256(weights(source))
    content = bytearray(weights(source).read_bytes())
    content[-1] ^= 4
    weights(source).write_bytes(content)
    assert refused(lambda: run(PLAN, source, tmp_path / "out", settings)).code == "source-changed"
    damaged = zip(PLAN.sources[0].files, open_checkpoint(source).files, strict=True)  # before it was compiled
    files = tuple(replace(f, content=now.content) for f, now in damaged)
    plan = replace(PLAN, sources=(replace(PLAN.sources[0], files=files),))
    run(plan, source, tmp_path / "unnoticed")
    found = refused(lambda: run(plan, source, tmp_path / "out", settings))
    assert found.code == "source-damaged" and FILES[0].name in found.message
    assert found.notes == (f"expected: sha256 {right}", f"found: sha256 {sha256(weights(source))}")
    assert not (tmp_path / "out").exists()


def in_cache(source: Path) -> Callable[[str], None]:
    """As `hf download` leaves it: files are links into `blobs`, called what they hash to."""
    blobs = source.parent / "blobs"
    blobs.mkdir()

    def link(called: str) -> None:
        shutil.move(weights(source), blobs / called)
        weights(source).symlink_to(Path("..") / "blobs" / called)

    return link


def in_folder(source: Path) -> Callable[[str], None]:
    """As `hf download --local-dir` leaves it."""
    notes = source / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    return lambda called: (notes / f"{FILES[0].name}.metadata").write_text(f"{'c' * 40}\n{called}\n1.5\n") and None


@pytest.mark.parametrize("place", [in_cache, in_folder])
def test_the_hubs_own_sums_are_found(source: Path, place: Callable[[Path], Callable[[str], None]]) -> None:
    right = sha256(weights(source))
    place(source)(right)
    assert hub_sha256(source, FILES[0].name) == right
    check_sha256("auto", source, FILES)


@pytest.mark.parametrize("place", [in_cache, in_folder])
def test_another_sum_than_the_hubs_is_damage(source: Path, place: Callable[[Path], Callable[[str], None]]) -> None:
    place(source)("a" * 64)
    assert refused(lambda: check_sha256("auto", source, FILES)).code == "source-damaged"


@pytest.mark.parametrize("place", [in_cache, in_folder])
def test_a_git_hash_is_not_a_sum(source: Path, place: Callable[[Path], Callable[[str], None]]) -> None:
    """Small files are not stored by their SHA-256: the hash is of something else, and shorter."""
    place(source)("a" * 40)
    found = refused(lambda: check_sha256("auto", source, FILES))
    assert found.code == "unknown-sum" and FILES[0].name in found.message


def test_files_without_sums_are_refused_not_passed_over(source: Path, tmp_path: Path) -> None:
    assert refused(lambda: check_sha256("auto", source, FILES)).code == "unknown-sum"
    (tmp_path / "sums").write_text(f"{'a' * 64}  other.safetensors\n")
    assert refused(lambda: check_sha256(str(tmp_path / "sums"), source, FILES)).code == "unknown-sum"


A, B = "aB" * 32, "0c" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{A}  a.safetensors\n{B} *b.safetensors\n", {"a.safetensors": A.lower(), "b.safetensors": B}),
        (f"{A}  ./dir/../a b\r\n\n# comment\n", {"a b": A.lower()}),
        (f"SHA256 (a (1)) = {B}\n", {"a (1)": B}),
        (f"\\{B}  a\\nb\\\\c\n", {"a\nb\\c": B}),
        (f"{B}  a\n{B.upper()}  a\n", {"a": B}),
        ("", {}),
    ],
)
def test_sums_are_read_as_sha256sum_writes_them(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    (tmp_path / "sums").write_bytes(text.encode())
    assert read_sums(tmp_path / "sums") == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [(f"{A} a\n", 1), (f"{A}  a\n{A[:-1]}  b\n", 2), (f"{A}  a\n\n{B}  ./a\n", 3), ("hello", 1), (f"{A}  \n", 1)],
)
def test_what_is_not_a_line_of_sums_is_shown(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "sums").write_text(text)
    found = refused(lambda: read_sums(tmp_path / "sums"))
    assert found.code == "invalid-sums" and found.span and found.span.line == line


def test_sums_that_cannot_be_read_are_an_input_error(tmp_path: Path) -> None:
    assert refused(lambda: read_sums(tmp_path / "none")).code == "unreadable-sums"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert refused(lambda: read_sums(tmp_path / "binary")).code == "invalid-sums"
