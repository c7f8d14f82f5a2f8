"""Resident memory of this process, in bytes."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress


def peak_resident_bytes() -> int:
    """The most memory the process has had resident.

    From /proc where there is one: getrusage(2) also counts what the process was before it became this program, a large parent's copy.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def resident_bytes() -> int:
    """The memory the process has resident now; its peak where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


LARGE = 1 << 20  # bytes
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def return_large_blocks() -> None:
    """From now on, blocks of LARGE bytes or more go back to the system as soon as they are freed, where the C library
    can be told so (glibc).

    By itself it raises its threshold to the largest block that was freed, and then keeps such blocks, for each thread
    apart: chunks that a library decodes in its threads would add up to hundreds of megabytes that hold nothing.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)
