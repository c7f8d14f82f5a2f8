"""Small sources that claim to be huge are refused in little memory: each is opened by a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptc.storage.checkpoint import safetensors
from ckptc.storage.checkpoint.steps import MAX_JSON
from ckptc.storage.formats.json_stream import MAX_MEMBERS
from ckptc.storage.source import directory

MB = 1_000_000
MEMORY = 400 * MB  # bytes that a process may peak at; the interpreter is some 60 of it
OPEN = """
import json, sys
from pathlib import Path
from ckptc.diagnostics import InputError
from ckptc.run.memory import peak_resident_bytes
from ckptc.storage.checkpoint.safetensors import open_checkpoint
try:
    found = len(open_checkpoint(Path(sys.argv[1])).tensors)
except InputError as error:
    found = [[d.code, d.message, *d.notes] for d in error.diagnostics]
json.dump([found, peak_resident_bytes()], sys.stdout)
"""


def write(file: Path, text: bytes, data: int = 0) -> None:
    """A safetensors file of this header and `data` bytes of tensors."""
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + data)


def lists_in_a_header(directory: Path) -> None:
    write(directory / "model.safetensors", b'{"a":[' + b"[]," * (33 * MB - 10) + b"[]]}")


def objects_in_metadata(directory: Path) -> None:
    write(directory / "model.safetensors", b'{"__metadata__":{"a":[' + b"{}," * (33 * MB - 10) + b"{}]}}")


def text_of_wide_characters(directory: Path) -> None:
    write(directory / "model.safetensors", '{"__metadata__":{"a":"😀'.encode() + b"a" * (99 * MB) + b'"}}')


def empty_tensors(directory: Path) -> None:
    entries = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(1_700_000))
    write(directory / "model.safetensors", b"{" + entries + b"}")


def tensors_in_many_files(directory: Path) -> None:
    for file in range(20):
        entries = (b'"%d.%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % (file, n) for n in range(50_000))
        write(directory / f"{file}.safetensors", b"{" + b",".join(entries) + b"}")


def faulty_tensors(directory: Path) -> None:
    entries = b",".join(b'"%d":{"dtype":"U9","shape":[0],"data_offsets":[0,0]}' % n for n in range(300_000))
    write(directory / "model.safetensors", b"{" + entries + b"}")


def headers_of_holes(directory: Path) -> None:
    for number in range(200):
        with (directory / f"{number}.safetensors").open("wb") as file:
            file.write((100 * MB).to_bytes(8, "little") + b"{")
            file.truncate(100 * MB + 8)


def numbered_files(directory: Path) -> None:
    for number in range(20):
        (directory / f"s{number}-00001-of-999999.safetensors").write_bytes(b"0123456789")


def lists_in_an_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_bytes(b'{"weight_map":[' + b"[]," * (33 * MB - 10) + b"[]]}")


def names_in_an_index(directory: Path) -> None:
    names = b",".join(b'"%d":"%d"' % (n, n) for n in range(4 * MB))
    (directory / "model.safetensors.index.json").write_bytes(b'{"weight_map":{' + names + b"}}")


def lists_in_a_config(directory: Path) -> None:
    write(directory / "model.safetensors", b"{}")
    (directory / "config.json").write_bytes(b'{"a":[' + b"[]," * (33 * MB - 10) + b"[]]}")


CASES: dict[Callable[[Path], None], tuple[str, str]] = {
    lists_in_a_header: ("header-too-large", "characters in one value"),
    objects_in_metadata: ("header-too-large", "characters in one value"),
    text_of_wide_characters: ("header-too-large", "characters in one value"),
    empty_tensors: ("header-too-large", f"at most {MAX_MEMBERS} entries"),
    tensors_in_many_files: ("header-too-large", f"at most {MAX_MEMBERS} tensors"),
    faulty_tensors: ("unknown-dtype", "over 9980 more problems"),
    headers_of_holes: ("header-json", "expecting property name"),
    numbered_files: ("missing-file", "999998 of 999999 numbered files do not exist: `s0-00002-of-"),
    lists_in_an_index: ("index-json", "characters in one value"),
    names_in_an_index: ("index-json", f"at most {MAX_MEMBERS} entries"),
    lists_in_a_config: ("config-json", "bytes"),
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_it_is_refused_in_little_memory(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, peak = json.loads(done.stdout)
    code, says = CASES[make]
    assert code in [one[0] for one in found]
    assert says in str(found)
    assert peak < MEMORY


OPEN_ORBAX = OPEN.replace("checkpoint.safetensors import open_checkpoint", "checkpoint.orbax_reader import open_saved")
OPEN_ORBAX = OPEN_ORBAX.replace("len(open_checkpoint(Path(sys.argv[1])).tensors)", "open_saved(Path(sys.argv[1]))")
RESTORED = OPEN.replace("checkpoint.safetensors import open_checkpoint", "checkpoint.restored import open_restored")
RESTORED = RESTORED.replace("open_checkpoint(Path(sys.argv[1])).tensors", "open_restored(Path(sys.argv[1]))")


@pytest.mark.parametrize("size", [MAX_JSON, MAX_JSON + 1], ids=["as large as may be", "larger"])
@pytest.mark.parametrize("program", [OPEN_ORBAX, RESTORED], ids=["export", "verify"])
def test_metadata_of_orbax_is_refused_in_bounded_memory(program: str, size: int, tmp_path: Path) -> None:
    text = b'{"tree_metadata":[' + b"{}," * ((size - 24) // 3) + b"{}]}"
    (tmp_path / "_METADATA").write_bytes(text.ljust(size))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, peak = json.loads(done.stdout)
    assert found[0][0] in ("orbax-json", "damaged-output")
    assert ("too large to be metadata" in found[0][1]) == (size > MAX_JSON)
    assert peak < 1000 * MB


def test_beginnings_are_read_ahead_by_a_few_files_and_not_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "AHEAD", 10)
    read: list[str] = []
    ahead = directory.ahead(lambda name: read.append(name) or name, [str(n) for n in range(1000)])
    for number, (name, start) in enumerate(ahead):
        assert name == start == str(number)
        assert len(read) <= number + 10


def test_an_index_of_more_files_than_any_checkpoint_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "MAX_FILES", 3)
    names = {str(n): f"{n}.safetensors" for n in range(4)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(safetensors.InputError, match=r"index-invalid.*more files"):
        safetensors.open_checkpoint(tmp_path)


def test_headers_that_are_long_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_HEADERS", 1000)
    for number in range(10):
        write(tmp_path / f"{number}.safetensors", b"{}" + b" " * 200)
    with pytest.raises(safetensors.InputError, match="header-too-large"):
        safetensors.open_checkpoint(tmp_path)
