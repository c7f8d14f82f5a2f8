"""What stands in place of a file is refused and not waited for."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ckptc.cli.main import run
from ckptc.regular import open_file


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("command", [
    "models --mapping pipe", "compile --model llama3.1-8b --mapping pipe", "run pipe --output out", "verify pipe --output out",
    "compile --model llama3.1-8b --mesh fsdp=2 --rules pipe",
])  # fmt: skip
def test_a_named_pipe_is_no_input(command: str, tmp_path: Path) -> None:
    pipe(tmp_path / "pipe")
    done = subprocess.run(
        [sys.executable, "-m", "ckptc", *command.split()], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "named pipe" in done.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_named_pipe_is_no_part_of_a_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(tmp_path / name)
    assert run(["compile", "--model", "llama3.1-8b", "--source", str(tmp_path)]) == 1
    assert f"`{name}` is not a regular file" in capsys.readouterr().err


READERS = {
    "_METADATA": "from ckptc.storage.checkpoint.restored import open_restored; open_restored(here)",
    "journal.0": "from ckptc.run.journal_lines import Lines; Lines(here, 0, here / 'journal.0')",
    ".ckptc-journal": "from ckptc.storage.checkpoint.notes import read_notes; read_notes(here)",
    "sums": "from ckptc.run.preflight import read_sums; read_sums(here / 'sums')",
}


@pytest.mark.parametrize("name", READERS)
def test_a_named_pipe_in_place_of_what_a_run_reads_is_refused(name: str, tmp_path: Path) -> None:
    """In another process: what waits for the pipe is ended by the timeout."""
    pipe(tmp_path / name)
    program = f"from pathlib import Path; here = Path.cwd(); {READERS[name]}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "named pipe" in done.stderr


def test_a_named_pipe_in_place_of_a_note_of_where_a_source_lies_is_no_note(tmp_path: Path) -> None:
    (notes := tmp_path / "ckptc" / "sources").mkdir(parents=True)
    pipe(notes / hashlib.sha256(b"digest").hexdigest())
    program = "from ckptc.storage.source.remembered import recall; print(recall('digest'))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "None\n"


def test_other_things_are_told_apart(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        for path in (tmp_path / "s", tmp_path, tmp_path / "none", Path("/dev/null")):
            with pytest.raises(OSError):
                open_file(path)
    (tmp_path / "f").write_bytes(b"text")
    with open_file(tmp_path / "f") as file:
        assert file.read() == b"text"
