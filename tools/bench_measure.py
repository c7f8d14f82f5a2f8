"""What `bench*.py` measure with: a command's time, processor time and memory, the page cache, and the machine itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# Seconds between two looks at the process tree: at least, and at most. To sum a process's pages takes some 14 ms of a
# core per GB, and holds up its page faults meanwhile, so looks are rarer the longer they take: SHARE of a core up to
# 0.7 GB, a quarter of one at 4 GB. Rarer still, they would miss peaks.
SAMPLE, RARELY = 0.02, 0.2
SHARE = 0.05
SPARE = 1 / 16  # of the machine's memory: what takes more than the rest is stopped, before it takes others with it
PACKAGES = ("jax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes")


@dataclass(frozen=True)
class Run:
    """One run of a command."""

    seconds: float  # until it ended, and its output was durable where that was asked for
    cpu: float  # seconds of all its processes
    peak: int  # bytes: the most that all its processes held at once, pages they share counted once


class Failed(Exception):
    """A command that did not end well; the text is the reason, in a line."""


def tree_bytes(process: psutil.Process) -> int:
    """Proportional set size of a process and its children: pages they share count once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error, AttributeError):
            total += one.memory_full_info().pss
    return total


class Watch(threading.Thread):
    """Looks at a process tree until told to stop; kills its process group where the machine's memory runs out."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak, self.exhausted = 0, False
        self._process, self._done = psutil.Process(pid), threading.Event()
        self._least = psutil.virtual_memory().total * SPARE

    def run(self) -> None:
        wait = 0.0
        while not self._done.wait(wait):
            start = time.thread_time()
            with suppress(psutil.Error):
                self.peak = max(self.peak, tree_bytes(self._process))
            if psutil.virtual_memory().available < self._least:
                self.exhausted = True
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                return
            wait = min(max(SAMPLE, (time.thread_time() - start) / SHARE), RARELY)

    def stop(self) -> None:
        self._done.set()
        self.join()


def measure(command: list[str], durable: Path | None = None) -> Run:
    """Runs a command to its end, and to the end of a sync of the directory `durable`. Raises `Failed`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    pipe = subprocess.PIPE
    # With what Python has compiled kept, as where packages are installed the usual way: an eighth of a second.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    try:
        process = subprocess.Popen(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
        )
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    watch = Watch(process.pid)
    watch.start()
    try:
        output, _ = process.communicate()
    finally:
        watch.stop()
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if watch.exhausted:
        raise Failed(f"stopped at {watch.peak / 1e9:.1f} GB: the machine's memory was used up")
    if process.returncode:
        raise Failed(reason(output, process.returncode))
    if durable is not None:
        sync(durable)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, watch.peak)


def reason(output: str, code: int) -> str:
    """Why a command failed, in a line: its diagnostic's first, or the last that it said."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("error[")), lines[-1] if lines else "")
    if code < 0:
        return " ".join(filter(None, (f"ended by {signal.Signals(-code).name};", said))).rstrip(";")
    return said or f"exit code {code}"


def sync(directory: Path) -> None:
    """Makes every file below `directory` durable."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def forget(directory: Path) -> None:
    """Drops a directory's files from the page cache, so that the next read is from the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def fill(directory: Path) -> None:
    """Reads a directory's files, so that the page cache holds them, as far as it is large enough."""
    buffer = bytearray(1 << 24)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


def machine(directory: Path) -> dict[str, Any]:
    """What ran the benchmark: processor, memory, the file system of `directory`, versions."""
    model = platform.machine()
    with suppress(OSError, StopIteration):
        info = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    real = str(directory.resolve())
    mounts = [p for p in psutil.disk_partitions(all=True) if Path(real).is_relative_to(p.mountpoint)]
    disk = max(mounts, key=lambda p: len(p.mountpoint), default=None)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "disk": f"{disk.device} ({disk.fstype})" if disk else "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def versions_in(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of packages in another Python's environment; empty where it does not answer."""
    script = "import importlib.metadata as m, sys; print(*(m.version(p) for p in sys.argv[1:]))"
    try:
        done = subprocess.run([python, "-c", script, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(packages, done.stdout.split(), strict=True))


def described(found: dict[str, Any]) -> str:
    """A machine in a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['cores']} cores ({found['processor']}), {found['memory_gb']} GB of memory, disk {found['disk']}, "
        f"{found['system']}; {versions}"
    )
