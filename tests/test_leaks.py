"""Nothing leaks or escapes: no code of a checkpoint or mapping is run, no token is written, files are as the umask says."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import ckptc
from golden import known_cases

SOURCE = Path(ckptc.__file__).parent
CASE = next(case for case in known_cases() if case.id == "gemma2.scan")
TOKEN = "hf_" + "NotARealTokenButSpelledAsOne" * 2
SECONDS = 300
EXPECTED = {
    "api/arrays.py": ["compile"],
    "api/functions.py": ["compile"],
    "prove/sides/transformers_side.py": ["torch"],
}
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "torch", "runpy", "code", "imp"}
RUNNERS = {"eval", "exec", "compile", "__import__", "execfile"}
# Methods that unpickle, or run a shell, whatever they are called on.
METHODS = {"system", "popen", "load_module", "exec_module", "spawnl", "spawnv", "execv", "execve"}


def escapes(tree: ast.AST) -> list[str]:
    """What a module imports or calls that could run code it was given."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in LOADERS]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LOADERS:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in RUNNERS:
                found.append(called.id)
            elif isinstance(called, ast.Attribute) and called.attr in METHODS:
                found.append(called.attr)
            if any(k.arg in ("allow_pickle", "shell") and getattr(k.value, "value", True) for k in node.keywords):
                found.append("allow_pickle or shell")
    return found


def test_the_source_loads_no_pickle_and_runs_no_text() -> None:
    found = {
        f.relative_to(SOURCE).as_posix(): bad
        for f in SOURCE.rglob("*.py")
        if (bad := escapes(ast.parse(f.read_text("utf-8"))))
    }
    # `compile` of the interface is ckptc's own; what runs in an environment that has torch makes its own tiny models.
    assert found == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch import load",
        "import torch.nn",
        "eval(x)",
        "exec('x')",
        "__import__(name)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
    ],
)
def test_what_it_must_not_do_would_be_seen(text: str) -> None:
    assert escapes(ast.parse(text))


def command(*argv: str, cwd: Path, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    """A command with a token in its environment, as a user of the Hub has one."""
    environment = {
        **os.environ,
        "HF_TOKEN": TOKEN,
        "HUGGING_FACE_HUB_TOKEN": TOKEN,
        "XDG_CACHE_HOME": str(cwd / "cache"),
    }
    return subprocess.run(
        [sys.executable, "-m", "ckptc", *argv],
        cwd=cwd,
        env=environment,
        umask=umask,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


OPTIONS = ("--model", CASE.model, "--source", str(CASE.hf), "--set", "padded_vocab=160")


def test_a_token_is_never_written(tmp_path: Path) -> None:
    done = [
        command("compile", *OPTIONS, "-o", "plan.json", cwd=tmp_path),
        command("run", "plan.json", "--output", "out", cwd=tmp_path),
        command("verify", "plan.json", "--output", "out", cwd=tmp_path),
        command(
            "export",
            "--model",
            CASE.model,
            "--source",
            "out",
            "--output",
            "hf",
            "--config-from",
            str(CASE.hf),
            cwd=tmp_path,
        ),
        command("compile", "--model", CASE.model, "--source", "nowhere", cwd=tmp_path),
        command("run", "plan.json", "--output", "out", "--format", "json", cwd=tmp_path),
    ]
    assert [d.returncode for d in done] == [0, 0, 0, 0, 1, 1], [d.stderr for d in done]
    assert not any(TOKEN in d.stdout + d.stderr for d in done)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert [p for p in files if TOKEN.encode() in p.read_bytes()] == []


@pytest.mark.parametrize(
    ("umask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_files_get_the_permissions_of_the_umask(umask: int, file: int, directory: int, tmp_path: Path) -> None:
    compiled = command("compile", *OPTIONS, "-o", "plan.json", cwd=tmp_path, umask=umask)
    run = command("run", "plan.json", "--output", "out", cwd=tmp_path, umask=umask)
    argv = ("export", "--model", CASE.model, "--source", "out", "--output", "hf", "--config-from", str(CASE.hf))
    export = command(*argv, cwd=tmp_path, umask=umask)
    assert [d.returncode for d in (compiled, run, export)] == [0, 0, 0], run.stderr + export.stderr
    made = [
        tmp_path / "plan.json",
        *(p for name in ("out", "hf") for p in [tmp_path / name, *(tmp_path / name).rglob("*")]),
    ]
    assert len(made) > 10
    wrong = {
        str(p.relative_to(tmp_path)): oct(mode)
        for p in made
        if (mode := stat.S_IMODE(p.stat().st_mode)) != (directory if p.is_dir() else file)
    }
    assert wrong == {}
