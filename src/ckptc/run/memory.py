"""Resident memory of this process, in bytes."""

from __future__ import annotations

import resource
import sys


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
