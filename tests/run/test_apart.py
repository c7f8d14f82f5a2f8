"""Work in a process apart: what it makes comes back, and so does what it fails with."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from ckptc.diagnostics import InputError, Span, fail
from ckptc.run import apart
from ckptc.run.apart import can_fork

pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests have loaded TensorStore."""
    monkeypatch.setattr(apart, "THREADED", ())


def test_what_is_made_comes_back_from_another_process() -> None:
    assert apart.apart(lambda: {"made in": os.getpid()})["made in"] != os.getpid()


def test_diagnostics_come_back_whole() -> None:
    error = fail("missing-file", "no such file", span=Span("a.yaml", 3, 4, 5), notes=("found: none",), help="make one")

    def failing() -> None:
        raise error

    with pytest.raises(InputError) as caught:
        apart.apart(failing)
    assert caught.value.diagnostics == error.diagnostics


def test_another_failure_comes_back_as_text() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        apart.apart(lambda: 1 / 0)


def test_a_process_that_is_killed_is_said_to_be() -> None:
    with pytest.raises(InputError, match="worker-died"):
        apart.apart(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_process_that_holds_threads_does_the_work_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "THREADED", ("a_library_with_threads",))
    assert can_fork()
    monkeypatch.setitem(sys.modules, "a_library_with_threads", apart)
    assert not can_fork()
    assert apart.apart(os.getpid) == os.getpid()
