"""Closed and full streams, and signals: the exit code is the work's, or 128 and the signal's number."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from waiting import SECONDS, wait_for

CONVERT = "convert --mapping mapping.yaml --model tiny --source checkpoint --output out --jobs 1"
COMPILE = "compile --mapping mapping.yaml --model tiny --source checkpoint"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line of the shell, in which CKPTC stands for the command."""
    line = line.replace("CKPTC", f"{sys.executable} -m ckptc")
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=SECONDS)


def test_memory_that_the_system_refuses_is_said_to_be_that(mapping: str, source: str) -> None:
    """Too little for the libraries that read a checkpoint, where nothing of ours asks for much."""
    assert shell(f"CKPTC {CONVERT}").returncode == 0
    program = "from ckptc.cli.main import run; import resource, sys; from ckptc import api; import ckptc.cli.verify"
    program += "; used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()"
    program += "; resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2); sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "verify", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1 and "error[out-of-memory]" in done.stderr, done.stderr


def test_shared_memory_that_the_system_refuses_is_said_to_be_that(mapping: str, source: str) -> None:
    """In a mount namespace of its own, where /dev/shm can only be read."""
    if shell("unshare -rm mount -t tmpfs -o ro none /dev/shm").returncode:
        pytest.skip("this system gives no mount namespaces")
    done = shell(f"unshare -rm sh -c 'mount -t tmpfs -o ro none /dev/shm && CKPTC {CONVERT}'")
    assert done.returncode == 1 and "error[system-refused]" in done.stderr and "/dev/shm" in done.stderr, done.stderr
    assert not Path("out/0").exists()


@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1"]
)
@pytest.mark.parametrize("options", ["", "--quiet", "--json"])
def test_a_conversion_is_done_whoever_hears_of_it(mapping: str, source: str, redirection: str, options: str) -> None:
    done = shell(f"CKPTC {CONVERT} {options} {redirection}")
    assert (done.returncode, Path("out/0/_CHECKPOINT_METADATA").exists()) == (0, True), done.stderr
    assert "Traceback" not in done.stderr and "error" not in done.stderr
    assert shell("CKPTC verify out").returncode == 0


def test_stdout_that_is_full_is_said(mapping: str, source: str) -> None:
    assert "warning: cannot write to standard output: No space left" in shell(f"CKPTC {CONVERT} >/dev/full").stderr


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_fault_keeps_its_code(mapping: str, redirection: str) -> None:
    assert shell(f"CKPTC {COMPILE} {redirection}").returncode == 1
    assert shell(f"CKPTC nonsense {redirection}").returncode == 2


@pytest.mark.parametrize("command", ["models", f"{COMPILE} --dump-plan", f"{COMPILE} --json", "explain --list"])
def test_what_was_asked_for_on_a_full_stream_is_not_done(mapping: str, source: str, command: str) -> None:
    done = shell(f"CKPTC {command} >/dev/full")
    if done.returncode == 2:
        pytest.skip("no such command")
    assert done.returncode == 1 and "error[system-refused]: cannot write to standard output" in done.stderr


def test_a_plan_is_written_though_nothing_can_be_printed(mapping: str, source: str) -> None:
    assert shell(f"CKPTC {COMPILE} -o plan.json >/dev/full").returncode == 0
    assert shell("CKPTC run plan.json --output out >&-").returncode == 0


# -- signals -----------------------------------------------------------------------------------------------------------

SLOW = """\
import os, time
from ckptc.cli.main import main
from ckptc.run import worker
made = worker.Worker._make
def slow(*a):
    open(f"working.{os.getpid()}", "w").close()
    time.sleep(0.2)
    return made(*a)
worker.Worker._make = slow
"""
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}


def started(script: str) -> subprocess.Popen[str]:
    defaults = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    argv = [sys.executable, "-c", defaults + script]
    return subprocess.Popen(argv, stdout=-1, stderr=-1, text=True, start_new_session=True)


@pytest.mark.parametrize("whole_group", [False, True], ids=["one", "group"])
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("number", WORDS)
def test_a_signal_stops_workers_and_keeps_what_is_done(
    mapping: str, source: str, number: signal.Signals, jobs: int, whole_group: bool
) -> None:
    line = CONVERT.replace("--jobs 1", f"--jobs {jobs}").split()
    process = started(f"{SLOW}main({line!r})")
    wait_for(lambda: list(Path().glob("working.*")))
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (128 + number, WORDS[number] + "\n")
    for mark in Path().glob("working.*"):
        pid = int(mark.suffix[1:])
        assert not Path(f"/proc/{pid}").exists() or pid == process.pid
    assert Path("out/.ckptc-unfinished/plan").exists() and not Path("out/0").exists()
    assert shell(f"CKPTC {CONVERT}").returncode == 0


def test_a_signal_that_is_ignored_stays_ignored(mapping: str, source: str) -> None:
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = started(f"{ignored}{SLOW}main({CONVERT.split()!r})")
    wait_for(lambda: list(Path().glob("working.*")))
    os.kill(process.pid, signal.SIGHUP)
    assert process.communicate(timeout=SECONDS)[1] == "" and process.returncode == 0


@pytest.mark.parametrize("number", WORDS)
def test_a_signal_during_imports_leaves_no_traceback(number: signal.Signals) -> None:
    script = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "ckptc.cli.main":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from ckptc.__main__ import main
main()
"""
    process = started(script)
    assert process.stdout and process.stdout.readline() == "importing\n"
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number and re.fullmatch(r"interrupted\n|ended by signal \d+\n", err)


# -- paths -------------------------------------------------------------------------------------------------------------


def test_an_output_whose_path_is_not_utf_8_is_refused_before_any_work(mapping: str, source: str) -> None:
    line = CONVERT.replace("--output out", "--output \"$(printf 'caf\\351')\"")
    done = shell(f"CKPTC {line}")
    assert done.returncode == 1 and "error[unwritable-output]" in done.stderr and "not UTF-8" in done.stderr
    assert not [name for name in os.listdir() if name.startswith("caf")]


def test_a_checkpoint_whose_path_is_not_utf_8_is_refused(mapping: str, source: str) -> None:
    assert shell(f"CKPTC {CONVERT}").returncode == 0
    os.rename("out", b"caf\xe9")
    done = shell("CKPTC verify \"$(printf 'caf\\351')\"")
    assert done.returncode == 1 and "its path is not UTF-8" in done.stderr


def test_utf_8_works_in_any_locale(mapping: str, source: str) -> None:
    line = CONVERT.replace("--output out", "--output café")
    assert shell(f"LC_ALL=C CKPTC {line}").returncode == 0 and Path("café/0").is_dir()
    done = shell(f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 CKPTC {line.replace('café', 'thé')}")
    assert done.returncode == 1 and "PYTHONUTF8=1" in done.stderr and not Path("thé").exists()


def test_a_source_whose_path_is_not_utf_8_is_read(mapping: str, source: str) -> None:
    os.rename("checkpoint", b"caf\xe9")
    line = CONVERT.replace("checkpoint", "\"$(printf 'caf\\351')\"")
    assert shell(f"CKPTC {line}").returncode == 0
