"""The ways to convert that `bench.py` compares."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = "llama3.1-8b"
BASE = "cp + sync"  # what the others are compared with
CKPTC = (sys.executable, "-m", "ckptc")


@dataclass(frozen=True)
class Place:
    """The directory of one size of checkpoint."""

    home: Path

    @property
    def source(self) -> Path:
        """The generated checkpoint."""
        return self.home / "source"

    @property
    def saved(self) -> Path:
        """What it was converted to, for the way back."""
        return self.home / "saved"

    @property
    def plan(self) -> Path:
        return self.home / "plan.json"

    @property
    def output(self) -> Path:
        return self.home / "output"


@dataclass(frozen=True)
class Mode:
    name: str
    command: Callable[[Place], list[str]]
    sync: bool = False  # whether the time of a sync at the end is added; ckptc's own sync is part of its run
    slow: bool = False  # runs in the first rounds only


def convert(*options: str) -> Callable[[Place], list[str]]:
    return lambda place: [
        *CKPTC, "convert", "--model", MODEL, "--source", str(place.source), "--output", str(place.output), "--quiet",
        *options,
    ]  # fmt: skip


def run(*options: str) -> Callable[[Place], list[str]]:
    """From the plan that `prepare` has left."""
    return lambda place: [
        *CKPTC, "run", str(place.plan), "--source", str(place.source), "--output", str(place.output), "--quiet",
        *options,
    ]  # fmt: skip


def beside(processes: int, command: list[str]) -> list[str]:
    """The same command with `--process-id` 0, 1, …, all at once, by a shell that fails where one of them does."""
    start = "".join(f'"$@" --process-id {i} & p{i}=$!; ' for i in range(processes))
    ended = "; ".join(f"wait $p{i} || failed=1" for i in range(processes))
    return ["sh", "-c", f"{start}{ended}; exit $failed", "sh", *command]


def together(processes: int, *options: str) -> Callable[[Place], list[str]]:
    """The same run, by several processes."""

    def command(place: Place) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes)]
        return beside(processes, run(*options, *common)(place))

    return command


def export(*options: str) -> Callable[[Place], list[str]]:
    """The way back, from what `prepare` has converted."""
    return lambda place: [
        *CKPTC, "export", "--model", MODEL, "--source", str(place.saved), "--output", str(place.output), "--quiet",
        "--config-from", str(place.source), *options,
    ]  # fmt: skip


def copy(place: Place) -> list[str]:
    files = 'mkdir "$1" && cp "$0"/*.safetensors "$0"/config.json "$1"'
    return ["sh", "-c", files, str(place.source), str(place.output)]


def script(python: str, name: str) -> Callable[[Place], list[str]]:
    return lambda place: [python, str(HERE / name), str(place.source), str(place.output)]


def modes(extra: list[str], way_back: bool, maxtext: str | None) -> list[Mode]:
    """All of them, the base first. `extra`: more options to run ckptc with; `maxtext`: a Python that has MaxText."""
    base = Mode(BASE, copy, sync=True)
    if way_back:
        exports = ["", "--jobs 1", *extra]
        return [base, *(Mode(f"ckptc export {o}".strip(), export(*o.split())) for o in exports)]
    options = ["", "--jobs 1", "--link", "--compression blosc-lz4", "--compression zstd", *extra]
    found = [base, *(Mode(f"ckptc {o}".strip(), convert(*o.split())) for o in options)]
    found += [
        Mode("ckptc run, 1 process of 2 jobs", run("--jobs", "2")),
        Mode("ckptc run, 2 processes of 1 job", together(2, "--jobs", "1")),
        Mode("numpy + Orbax", script(sys.executable, "bench_naive.py"), sync=True, slow=True),
    ]
    if maxtext:
        found.append(Mode("MaxText's converter", script(maxtext, "bench_maxtext.py"), sync=True, slow=True))
    return found


def generate(place: Place, gigabytes: float) -> None:
    """Makes the checkpoint, if it is not there."""
    if place.source.exists():
        return
    place.home.mkdir(parents=True, exist_ok=True)
    part = place.home / "source.part"
    subprocess.run(["rm", "-rf", str(part)], check=True)
    make = [sys.executable, str(HERE / "make_checkpoint.py"), str(part), "--family", "llama"]
    subprocess.run([*make, "--gigabytes", str(gigabytes)], check=True)
    part.rename(place.source)


def prepare(place: Place, way_back: bool) -> None:
    """Makes what the modes start from, besides the checkpoint: the plan, or the converted checkpoint."""
    said = subprocess.DEVNULL
    if way_back:
        if not (place.saved / "0").exists():
            made = [*CKPTC, "convert", "--model", MODEL, "--source", str(place.source), "--output", str(place.saved)]
            subprocess.run([*made, "--quiet"], check=True, stdout=said)
    else:
        made = [*CKPTC, "compile", "--model", MODEL, "--source", str(place.source), "-o", str(place.plan), "--force"]
        subprocess.run(made, check=True, stdout=said)
