"""Work in a process apart: what it makes comes back, and so does what it fails with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptc.diagnostics import InputError, Span, fail
from ckptc.storage import forked_call as module
from ckptc.storage.forked_call import can_fork
from waiting import SECONDS, alive, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests have loaded TensorStore."""
    monkeypatch.setattr(module, "THREADED", ())


def test_what_is_made_comes_back_from_another_process() -> None:
    assert module.forked_call(lambda: {"made in": os.getpid()})["made in"] != os.getpid()


def test_diagnostics_come_back_whole() -> None:
    error = fail("missing-file", "no such file", span=Span("a.yaml", 3, 4, 5), notes=("found: none",), help="make one")

    def failing() -> None:
        raise error

    with pytest.raises(InputError) as caught:
        module.forked_call(failing)
    assert caught.value.diagnostics == error.diagnostics


def test_another_failure_comes_back_as_text() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        module.forked_call(lambda: 1 / 0)


def test_a_process_that_is_killed_is_said_to_be() -> None:
    with pytest.raises(InputError, match="worker-died"):
        module.forked_call(lambda: os.kill(os.getpid(), signal.SIGKILL))


ORPHAN = """\
import os, sys, time
from pathlib import Path
from ckptc.storage import forked_call as module
def make():
    Path(sys.argv[1] + ".new").write_text(str(os.getpid()))
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    end = time.monotonic() + {seconds}
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.01)
    {then}
parent = os.getpid()
{patch}
module.forked_call(make)
"""


def orphan(pid: Path, then: str, patch: str = "") -> subprocess.Popen[str]:
    """A process that was killed while another worked for it, which notes its `pid`, and goes on with `then`."""
    script = ORPHAN.format(seconds=SECONDS, then=then, patch=patch)
    parent = subprocess.Popen([sys.executable, "-c", script, str(pid)], stderr=subprocess.PIPE, text=True)
    wait_for(pid.exists)
    parent.kill()
    return parent


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    with orphan(tmp_path / "pid", "time.sleep(600)"):
        wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_an_orphan_ends_in_silence_where_the_system_lets_it_live(tmp_path: Path) -> None:
    with orphan(tmp_path / "pid", "Path(sys.argv[1]).unlink()", "module.die_with = lambda parent: None") as parent:
        _, err = parent.communicate(timeout=SECONDS)  # until it has ended, too
    assert err == "" and not (tmp_path / "pid").exists()


def test_a_process_that_holds_threads_does_the_work_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREADED", ("a_library_with_threads",))
    assert can_fork()
    monkeypatch.setitem(sys.modules, "a_library_with_threads", module)
    assert not can_fork()
    assert module.forked_call(os.getpid) == os.getpid()
