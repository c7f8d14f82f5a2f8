"""What ckptc says, word for word: every directory here is a case, and a new case needs no Python.

`<code>/` or `<code>.<variant>/` holds the files a user has, and `expected.txt`, what is then printed on stderr. The
files are copied to an empty directory in which the command runs, so that texts name them as given. Three are special:

    headers.json   {name: [dtype, shape]}: becomes checkpoint/model.safetensors, all zeros
    config.json    becomes checkpoint/config.json
    args           command lines; the last is the one that fails, those before it set the stage (default: COMPILE)

`args` may also say `write FILE TEXT`, `header FILE TEXT BYTES` (a safetensors file with so many bytes of tensors),
`endless FILE TEXT MORE TIMES` (one whose header is TEXT, then MORE so many times),
`repeat FILE TEXT TIMES`, `replace FILE OLD NEW`, `patch FILE OFFSET TEXT`, `remove PATH`, `mkdir DIR`, `lock OUTPUT` (as
a run does that is under way) and `limit BYTES` (that a file may have, as on a disk without room). A plan's digest changes
whenever plans do: every sha256 is shown as `sha256:…`.

After a change of wording, `CKPTC_UPDATE=1 pytest tests/diagnostics` writes every expected.txt anew: read the diff as a
user would.
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import re
import resource
import shlex
import shutil
from contextlib import ExitStack
from math import prod
from pathlib import Path

import pytest

from ckptc.cli.explain import catalogue
from ckptc.cli.main import INPUT_AT_FAULT, run
from ckptc.run.journal import LOCK
from ckptc.storage.formats.safetensors import DTYPES

HERE = Path(__file__).parent
CASES = sorted(p.name for p in HERE.iterdir() if p.is_dir() and p.name != "__pycache__")
COMPILE = "compile --mapping mapping.yaml --model tiny --source checkpoint"
# Of the machine or of another process, and one whose text has times of files in it.
FAULTS = {
    "connection-lost", "linked-changed", "no-cache", "out-of-memory", "output-not-shared", "output-store", "plans-differ", "port-in-use",
    "process-failed", "processes-missing", "worker-died",
    # What a server on the network answers.
    "bucket-library", "bucket-missing", "bucket-no-access", "bucket-no-credentials", "bucket-unreachable",
    "hub-bad-token", "hub-gated", "hub-no-commit", "hub-no-token", "hub-no-file", "hub-no-ranges", "hub-no-repository", "hub-no-revision",
    "hub-offline", "hub-refused", "hub-unreachable",
    "proof-not-converted",  # of a checkpoint that transformers makes
    "leaf-mismatch", "tree-mismatch",  # of `ckptc.load`, which no command calls
}  # fmt: skip

EXPECTING = {"pytest.raises", "pytest.mark.parametrize", "refused", "refusal", "raises"}


@pytest.mark.parametrize("name", CASES)
def test_text_is_exactly_the_expected(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, expected = HERE / name, HERE / name / "expected.txt"
    _lay_out(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    *before, last = (case / "args").read_text("utf-8").splitlines() if (case / "args").exists() else [COMPILE]
    with ExitStack() as undo:
        for line in before:
            _set_the_stage(shlex.split(line), undo)
        capsys.readouterr()
        code = run(shlex.split(last))
        out, err = capsys.readouterr()
    err = re.sub(r"sha256([: ])[0-9a-f]{64}", r"sha256\1…", err.replace(str(tmp_path), "DIR"))
    if os.environ.get("CKPTC_UPDATE"):
        expected.write_text(err, "utf-8")
    assert code == INPUT_AT_FAULT, out + err
    assert out == "", "what is wrong belongs on stderr"
    assert f"error[{name.partition('.')[0]}]" in err
    assert err == expected.read_text("utf-8")


def test_every_code_has_a_fixture() -> None:
    assert sorted(catalogue().keys() - {name.partition(".")[0] for name in CASES} - FAULTS) == []


def test_what_no_file_can_cause_is_tested_where_it_is_caused() -> None:
    asserted = {
        text for f in HERE.parent.rglob("test_*.py") if f != Path(__file__) for text in _expected(f.read_text("utf-8"))
    }
    assert [code for code in sorted(FAULTS) if not any(re.search(rf"\b{code}\b", text) for text in asserted)] == []


def test_a_comment_is_no_test_of_a_code() -> None:
    said = '"""worker-died"""\n# worker-died\nx = "worker-died"\ndef test_y():\n    "worker-died"\n    assert z == "other"\n'
    assert _expected(said) == {"other"}
    assert _expected('with pytest.raises(E, match="worker-died"):\n    x()\n') == {"worker-died"}


def _expected(source: str) -> set[str]:
    """The texts that a module of tests compares something with: those in its assertions, in what `raises` is called
    with, and in the arguments of its parametrised tests.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Assert) or called in EXPECTING:
            found |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def test_every_fixture_is_of_a_code_that_exists() -> None:
    assert [name for name in CASES if name.partition(".")[0] not in catalogue()] == []


def _lay_out(case: Path, directory: Path) -> None:
    for file in case.iterdir():
        if file.name not in ("args", "expected.txt", "headers.json", "config.json"):
            shutil.copy(file, directory / file.name)
    checkpoint = directory / "checkpoint"
    if (case / "headers.json").exists():
        checkpoint.mkdir()
        _write_safetensors(checkpoint / "model.safetensors", json.loads((case / "headers.json").read_text("utf-8")))
    if (case / "config.json").exists():
        checkpoint.mkdir(exist_ok=True)
        shutil.copy(case / "config.json", checkpoint)


def _write_safetensors(file: Path, headers: dict[str, tuple[str, list[int]]]) -> None:
    sizes, entries, end = dict(DTYPES.values()), {}, 0
    names = {canonical: stored for stored, (canonical, _) in DTYPES.items()}
    for name, (dtype, shape) in headers.items():
        begin, end = end, end + prod(shape) * sizes[dtype]
        entries[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


def _set_the_stage(words: list[str], undo: ExitStack) -> None:
    match words:
        case ["replace", file, old, new]:
            old, new = (text.encode().decode("unicode_escape") for text in (old, new))
            data = Path(file).read_bytes()
            assert data.count(old.encode()) == 1, f"{file} has {old!r} {data.count(old.encode())} times"
            Path(file).write_bytes(data.replace(old.encode(), new.encode()))
        case ["write", file, text]:
            Path(file).write_text(text, "utf-8")
        case ["header", file, text, size]:
            header = text.encode("utf-8", "surrogatepass")
            Path(file).write_bytes(len(header).to_bytes(8, "little") + header + bytes(int(size)))
        case ["endless", file, text, more, times]:
            header = (text + more * int(times)).encode()
            Path(file).write_bytes(len(header).to_bytes(8, "little") + header)
        case ["lock", output]:
            Path(output).mkdir()
            lock = os.open(Path(output, LOCK), os.O_RDWR | os.O_CREAT)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        case ["limit", size]:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            undo.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), before[1]))
        case ["repeat", file, text, times]:
            Path(file).write_text(text * int(times), "utf-8")
        case ["patch", file, offset, text]:
            with open(file, "r+b") as binary:
                binary.seek(int(offset), os.SEEK_END if offset.startswith("-") else os.SEEK_SET)
                binary.write(text.encode())
        case ["remove", path]:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        case ["mkdir", directory]:
            Path(directory).mkdir(parents=True)
        case _:
            assert run(words) == 0, words
