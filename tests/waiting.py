"""What tests of several processes wait for, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120  # that anything may take on a slow machine


def wait_for(condition: Callable[[], Any]) -> None:
    """AssertionError when the condition does not hold within SECONDS."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended, but was not waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
