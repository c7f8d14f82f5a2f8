"""Feeds ckptc broken inputs, by the thousand, and watches what it does with each.

    python tools/fuzz.py all --count 20000            what a release must survive
    python tools/fuzz.py plans --seconds 60           as many as a minute allows
    python tools/fuzz.py plans --seed 0 --only 4711   one input again, with what ckptc says of it

An input is a valid one with a few lies in it (`fuzz_headers`, `fuzz_plans`, `fuzz_mappings`), and its number and the
seed are all that decides it. Whatever it is, a command must end with exit code 0 or 1, say nothing of a traceback or an
internal error, end within LIMIT seconds of a processor and MEMORY bytes, and open nothing for writing outside its output. Inputs run
through the real entry, `ckptc.cli.main.run`, in processes that are replaced when one of them hangs or dies. The exit
code of this program is 1 when an input broke a promise.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz_headers
import fuzz_mappings
import fuzz_plans
from fuzz_values import Case

LIMIT = 10.0  # seconds of a processor for one input
HANGS = 60.0  # seconds by the clock, after which an input's process is ended
MEMORY = 2 << 30  # bytes of address space that a process may take besides what it has loaded
BATCH = 200  # inputs that one process takes, so that caches and leaks of one input do not outlive it by far
KINDS: dict[str, Callable[[Path], Callable[[random.Random], Case]]] = {
    "headers": fuzz_headers.mutator,
    "plans": fuzz_plans.mutator,
    "mappings": fuzz_mappings.mutator,
}
CODE = re.compile(r"^error\[([a-z-]+)\]", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What one input led to. `wrong` says which promise was broken, None when all were kept."""

    kind: str
    number: int
    lies: list[str]
    code: int | None
    said: list[str]  # codes of diagnostics
    seconds: float
    wrong: str | None
    text: str = ""  # what was printed, where something is wrong


def make(kind: str, seed: int, number: int, base: Path) -> Case:
    """The input of that number."""
    return KINDS[kind](base)(random.Random(f"{seed}/{kind}/{number}"))


def attempt(kind: str, seed: int, number: int, base: Path, box: Path) -> Outcome:
    """Runs one input in this process. `box` is a directory of its own."""
    from ckptc.cli.main import run

    case = make(kind, seed, number, base)
    shutil.rmtree(box, ignore_errors=True)
    work, output = box / "work", box / "work" / "out"
    for path in (work, box / "outside"):
        path.mkdir(parents=True)
    (box / "outside" / "precious.txt").write_text("not yours")
    case.lay_out(work)
    before = _files(box, output)
    os.chdir(work)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    text = box / "text"
    code: int | None = None
    wrong = None
    started = time.process_time()
    with _said_to(text), _watched_writes(_allowed(work)) as writes:
        try:
            code = run([a.replace("{work}", str(work)) for a in case.argv])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 2
        except BaseException as error:
            wrong = f"{type(error).__name__} escaped: {error}"
    seconds = time.process_time() - started
    printed = text.read_text("utf-8", "replace")
    text.unlink()
    said = CODE.findall(printed)
    if wrong is None:
        wrong = _broken(code, printed, said, seconds)
    if wrong is None and writes:
        wrong = f"opened for writing outside of the output: {writes[:3]}"
    if wrong is None and (changed := sorted(before.items() ^ _files(box, output).items())):
        wrong = f"touched outside of the output: {changed[:2]}"
    return Outcome(kind, number, case.lies, code, said, seconds, wrong, printed[-4000:] if wrong else "")


def _broken(code: int | None, printed: str, said: Sequence[str], seconds: float) -> str | None:
    """Which promise of the command line the printed text and the code break."""
    if code not in (0, 1):
        return f"exit code {code}"
    if "Traceback (most recent" in printed or "internal error" in printed:
        return "a traceback, or an internal error"
    if code == 1 and not said:
        return "exit code 1 without a diagnostic"
    if code == 0 and said:
        return "a diagnostic with exit code 0"
    return f"took {seconds:.1f} s" if seconds > LIMIT else None


def _allowed(work: Path) -> tuple[str, ...]:
    """Where a command may write: its output, the plan beside it, the notes of where checkpoints lie."""
    return (str(work / "out"), str(work / ".out"), str(work / "cache"), "/dev/", "/proc/self/")


def _files(box: Path, output: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file in the box, but for those of the output."""
    found = {}
    for folder, _, names in os.walk(box):
        for name in names:
            path = os.path.join(folder, name)
            if not path.startswith((str(output), str(box / "text"), str(box / "work" / "cache"))):
                status = os.lstat(path)
                found[path] = (status.st_size, status.st_mtime_ns)
    return found


class _said_to:
    """Everything that is printed, by this process and those that it starts, goes to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._kept = [os.dup(1), os.dup(2)]
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.close(descriptor)
        self._streams = sys.stdout, sys.stderr  # which need not be what writes there, as under a test runner
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)

    def __exit__(self, *_: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = self._streams
        for number, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)


class _watched_writes:
    """The paths, outside of the allowed ones, that Python is asked to open for writing, to make, move or remove."""

    watching: _watched_writes | None = None
    hooked = False

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed, self.seen = allowed, list[str]()

    def __enter__(self) -> list[str]:
        if not _watched_writes.hooked:  # a hook cannot be taken away again
            sys.addaudithook(_audit)
            _watched_writes.hooked = True
        _watched_writes.watching = self
        return self.seen

    def __exit__(self, *_: object) -> None:
        _watched_writes.watching = None

    def note(self, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            whole = os.path.abspath(os.fsdecode(path))
            if not whole.startswith(self.allowed):
                self.seen.append(whole)


_CHANGING = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    watching = _watched_writes.watching
    if watching is None:
        return
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        watching.note(args[0])
    elif event in _CHANGING:
        if any(type(a) is int and a >= 0 for a in args[1:]):
            return  # relative to a descriptor of a directory, which was opened by a path that is no secret
        for path in args[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            watching.note(path)


# -- processes -----------------------------------------------------------------------------------------------


class Lane:
    """One process at a time that takes inputs of one kind, in order, and says what came of each."""

    def __init__(self, kind: str, seed: int, numbers: Sequence[int], base: Path, box: Path) -> None:
        self.kind, self.seed, self.numbers, self.base, self.box = kind, seed, list(numbers), base, box
        self._pid, self._pipe, self._buffer, self._since = 0, -1, b"", 0.0

    @property
    def descriptor(self) -> int:
        if not self._pid and self.numbers:
            self._start()
        return self._pipe

    def _start(self) -> None:
        ours, theirs = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(ours)
            os.setpgid(0, 0)
            _serve(self.kind, self.seed, self.numbers[:BATCH], self.base, self.box, theirs)
        os.close(theirs)
        self._pipe, self._buffer, self._since = ours, b"", time.monotonic()

    def read(self) -> Iterator[Outcome]:
        """What the process has said; when it ended or is overdue, that is an outcome too."""
        data = os.read(self._pipe, 1 << 20)
        if not data:
            _, status = os.waitpid(self._pid, 0)
            self._ended()
            if status:
                yield self._lost(f"the process ended with status {status}")
            return
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self.numbers.pop(0)
            self._since = time.monotonic()
            yield Outcome(**json.loads(line))

    def overdue(self) -> Iterator[Outcome]:
        """An outcome when the input at work is past its time; its process is ended."""
        if self._pid and time.monotonic() - self._since > HANGS:
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._ended()
            yield self._lost("hangs")

    def _ended(self) -> None:
        os.close(self._pipe)
        self._pid, self._pipe = 0, -1

    def _lost(self, wrong: str) -> Outcome:
        number = self.numbers.pop(0) if self.numbers else -1
        lies = make(self.kind, self.seed, number, self.base).lies
        return Outcome(self.kind, number, lies, None, [], time.monotonic() - self._since, wrong)

    def stop(self) -> None:
        if self._pid:
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._ended()


def _serve(kind: str, seed: int, numbers: Sequence[int], base: Path, box: Path, pipe: int) -> None:
    """The body of a process: takes its inputs, says a line for each, ends."""
    code = 1
    try:
        bound_memory()
        for number in numbers:
            line = json.dumps(asdict(attempt(kind, seed, number, base, box))).encode() + b"\n"
            while line:
                line = line[os.write(pipe, line) :]
        code = 0
    finally:
        os._exit(code)


def bound_memory() -> None:
    """Lets this process take MEMORY more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def preload() -> None:
    """What every command imports, once, before processes are forked."""
    import ckptc.cli.commands
    import ckptc.cli.export
    import ckptc.cli.verify
    import ckptc.compile.compiler
    import ckptc.run.runner  # noqa: F401


def fuzz(kinds: Sequence[str], count: int, seed: int, seconds: float, jobs: int) -> Iterator[Outcome]:
    """Outcomes of `count` inputs, shared out over the kinds, until the time is over."""
    preload()
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="ckptc-fuzz-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        bases = {kind: Path(folder) / "base" / kind for kind in kinds}
        for kind, base in bases.items():
            base.mkdir(parents=True)
            KINDS[kind](base)  # makes what valid inputs are made of, once
        lanes = []
        for k in range(jobs):
            for kind in kinds:
                numbers = range(k, count // len(kinds), jobs)
                lanes.append(Lane(kind, seed, numbers, bases[kind], Path(folder) / f"box-{kind}-{k}"))
        waiting, at_work = lanes, list[Lane]()
        try:
            while (waiting or at_work) and time.monotonic() < until:
                while waiting and len(at_work) < jobs:
                    at_work.append(waiting.pop(0))
                by_descriptor = {d: lane for lane in at_work if (d := lane.descriptor) >= 0}
                at_work = list(by_descriptor.values())
                ready, _, _ = select.select(list(by_descriptor), [], [], 0.5)
                for descriptor in ready:
                    yield from by_descriptor[descriptor].read()
                for lane in at_work:
                    yield from lane.overdue()
        finally:
            for lane in lanes + at_work:
                lane.stop()
            os.chdir("/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--count", type=int, default=20_000, help="inputs in all (default: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after this time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--only", type=int, metavar="N", help="run input N of the kind in this process and show it")
    args = parser.parse_args()
    kinds = list(KINDS) if args.kind == "all" else [args.kind]
    if args.only is not None:
        return show(kinds[0], args.seed, args.only)
    codes: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    wrong: list[Outcome] = []
    slowest, spent = Outcome("", 0, [], 0, [], 0.0, None), dict.fromkeys(kinds, 0.0)
    for outcome in fuzz(kinds, args.count, args.seed, args.seconds, args.jobs):
        codes.update(set(outcome.said))
        ends[f"{outcome.kind}: exit code {outcome.code}"] += 1
        slowest = max(slowest, outcome, key=lambda o: o.seconds)
        spent[outcome.kind] += outcome.seconds
        if outcome.wrong:
            wrong.append(outcome)
            print(f"{outcome.kind} {outcome.number}: {outcome.wrong} {outcome.lies}\n{outcome.text}", flush=True)
    print("\n".join(f"{n:7.0f} s {kind}" for kind, n in spent.items()))
    print("\n".join(f"{n:7} {end}" for end, n in sorted(ends.items())))
    print("\n".join(f"{n:7} {code}" for code, n in codes.most_common()))
    print(f"{sum(ends.values())} inputs, {len(wrong)} broke a promise")
    print(f"the slowest was {slowest.kind} {slowest.number}: {slowest.seconds:.1f} s {slowest.lies}")
    return 1 if wrong else 0


def show(kind: str, seed: int, number: int) -> int:
    with tempfile.TemporaryDirectory(prefix="ckptc-fuzz-") as folder:
        os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "CKPTC_TRACEBACK": "1"}
        base = Path(folder) / "base"
        base.mkdir()
        preload()
        bound_memory()
        make(kind, seed, number, base)  # and what inputs are made of, which takes its time
        faulthandler.dump_traceback_later(LIMIT, file=os.fdopen(os.dup(2), "w"))  # where a hang hangs
        outcome = attempt(kind, seed, number, base, Path(folder) / "box")
        os.chdir("/")
    print(
        f"{outcome.lies}\n{outcome.text}\ncode {outcome.code}, {outcome.said}, {outcome.seconds:.1f} s: {outcome.wrong or 'as it should be'}"
    )
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
