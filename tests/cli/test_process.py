"""What only another process shows: terminals, pipes, signals, what is imported."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from .conftest import MAPPING, python, write_checkpoint

CKPTC = ("-m", "ckptc")
SECONDS = 120  # that anything here may take on a slow machine
HEAVY = ("numpy", "jax", "ml_dtypes", "orbax", "tensorstore", "ruamel", "jinja2", "jsonschema", "rich")


def test_python_m_ckptc_is_the_command() -> None:
    process = python(*CKPTC, "models", "no-such-model-at-all")
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error[unknown-model]: ")
    process = python(*CKPTC, "no-such-command")
    assert "usage: ckptc" in process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 2


@pytest.mark.parametrize("argv", [["--help"], ["compile", "--help"], ["--version"], ["compile"]])
def test_help_loads_none_of_the_libraries(argv: list[str]) -> None:
    script = f"""\
import json, sys
from ckptc.cli.main import run
try:
    run({argv!r})
except SystemExit as stop:
    pass
print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)
"""
    err = python("-c", script).communicate(timeout=SECONDS)[1]
    assert json.loads(err.splitlines()[-1]) == []


@pytest.mark.parametrize("argv", [["models"], ["models", "--json"], ["--help"], ["compile", "--model", "llama3.1-8b"]])
def test_a_reader_that_goes_away_is_no_error(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)  # before anything is written: no race, unlike `| head -1`
    try:
        done = subprocess.run(
            [sys.executable, *CKPTC, *argv], stdout=write, stderr=subprocess.PIPE, text=True, timeout=SECONDS
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_goes_away_between_lines_is_no_error() -> None:
    process = python("-u", *CKPTC, "models")
    assert process.stdout and process.stdout.readline().startswith("MODEL")
    process.stdout.close()
    assert process.stderr and process.stderr.read() == ""
    assert process.wait(SECONDS) == 0


@pytest.fixture
def large(tmp_path: Path) -> tuple[str, ...]:
    """A conversion that takes long enough for a bar to be drawn while it goes."""
    (tmp_path / "mapping.yaml").write_text(MAPPING, "utf-8")
    write_checkpoint(tmp_path / "checkpoint", layers=24, embed=512, mlp=2048, vocab=8192)
    options = ("--mapping", "mapping.yaml", "--model", "tiny", "--source", "checkpoint", "--memory", "8MiB")
    return ("convert", *options, "--output", "out")


def on_a_terminal(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """A Python's exit code, its stdout, and what its stderr sent to a terminal of 200 columns."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=side,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", **environment},
    )
    os.close(side)
    seen: list[bytes] = []

    def watch() -> None:
        with suppress(OSError):  # which is how Linux says that the other side is closed
            while data := os.read(main, 1 << 16):
                seen.append(data)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.communicate(timeout=SECONDS)[0].decode()
    watcher.join(SECONDS)
    os.close(main)
    return process.returncode, out, b"".join(seen).decode()


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_on_a_terminal_a_run_shows_a_bar_and_takes_it_away(large: tuple[str, ...]) -> None:
    code, out, shown = on_a_terminal(*CKPTC, *large)
    assert (code, out.count("\n")) == (0, 1)
    assert re.search(r"[━╸╺] [0-9.]+/58\.7 MB ", plain(shown)), shown
    assert re.search(r" [0-9.]+ MB resident params/params/(token_embedder|decoder)/", plain(shown)), shown
    assert shown.endswith("\x1b[2K"), "the last thing sent erases the line"


def test_the_bar_shows_bytes_rate_time_left_memory_and_the_array() -> None:
    script = """\
import time
from ckptc.cli.progress import show_progress
from ckptc.run.runner import Progress
with show_progress(enabled=True) as step:
    for n in range(20):
        step(Progress(n * 10**6, 40 * 10**6, "params/params/decoder/a[bold]/kernel"))
        time.sleep(0.05)
"""
    code, out, shown = on_a_terminal("-c", script)
    assert (code, out) == (0, "")
    drawn = plain(shown).split("\r")
    bar, memory, array = r"[━╸╺]+", r"[0-9.]+ MB resident", r"params/params/decoder/a\[bold\]/kernel"
    line = rf"{bar} 1[0-9]\.0/40\.0 MB [0-9.]+ MB/s 0:00:[0-9]{{2}} {memory} {array} *"
    assert any(re.fullmatch(line, text) for text in drawn), drawn


@pytest.mark.parametrize("options", [("--quiet",), ("--json",)])
def test_on_a_terminal_quiet_and_json_show_no_progress(options: tuple[str, ...], large: tuple[str, ...]) -> None:
    code, out, shown = on_a_terminal(*CKPTC, *large, *options)
    assert (code, out.count("\n"), shown) == (0, 1, "")


def test_in_a_pipe_there_is_the_final_line_and_nothing_else(large: tuple[str, ...]) -> None:
    process = python(*CKPTC, *large)
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, "")
    assert re.fullmatch(r"tiny: 2 arrays, 58\.7 MB written to out/0 in [^\n]*\n", out), out


def test_errors_are_coloured_on_a_terminal_unless_told_not_to() -> None:
    code, _, shown = on_a_terminal(*CKPTC, "models", "no-such-model-at-all")
    assert (code, shown.startswith("\x1b[1;31merror[unknown-model]\x1b[0m")) == (1, True)
    code, _, shown = on_a_terminal(*CKPTC, "models", "no-such-model-at-all", NO_COLOR="1")
    assert (code, shown.startswith("error[unknown-model]")) == (1, True)
    process = python(*CKPTC, "models", "no-such-model-at-all")
    assert process.communicate(timeout=SECONDS)[1].startswith("error[unknown-model]")
