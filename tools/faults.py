"""Disturbs runs, lets them go on, and compares what comes out with an undisturbed run's arrays, bit by bit.

    python tools/faults.py --kills 100                 everything, with so many kills
    python tools/faults.py kills --kills 20 --seed 7   one kind of fault

    kills    SIGKILL to the process group at random moments, again and again until a run comes through
    room     a small file system fills up on the way; room is made (needs root: a tmpfs is mounted), else a limit on the
             size of files stands in for it
    reads    reads fail, or give fewer bytes than asked for; a shard is cut short, or is gone, and comes back
    source   the source's directory is moved away half way, and put back
    exports  SIGKILL to exports that replace an older checkpoint

After every fault nothing may lie at the output that looks like a checkpoint, unless it is whole. The same command then
goes on. What is restored, by plain Orbax, must be what the undisturbed run gave. The exit code is 1 where it was not.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A run whose journal is written every few milliseconds, and whose reads take long enough to be disturbed.
CHILD = """
import os, sys, time
from ckptc.run import journal
journal.SYNC_SECONDS = 0.01
real, calls = os.preadv, 0
def preadv(descriptor, buffers, offset, *flags):
    global calls
    calls += 1
    time.sleep({pause})
    {patch}
    return real(descriptor, buffers, offset, *flags)
os.preadv = preadv
from ckptc.cli.main import main
main()
"""
EIO_PATCH = "if calls == {at}: raise OSError(5, 'Input/output error')"
SHORT_PATCH = "if calls % 2: buffers = [memoryview(b).cast('B')[: max(1, len(memoryview(b).cast('B')) // 3)] for b in buffers[:1]]"
PATIENCE = 300.0  # seconds for a run, on a slow machine


@dataclass
class Bench:
    """A checkpoint, its plan, and what an undisturbed run makes of it."""

    folder: Path
    source: Path
    plan: Path
    seconds: float = 0.0  # that an undisturbed run takes in all
    working: float = 0.0  # and from when its first files are there
    expected: dict[str, Any] = field(default_factory=dict)
    pause: float = 0.0

    def start(self, output: Path, patch: str = "pass", limit: int | None = None) -> subprocess.Popen[str]:
        """A run, in a process group of its own. `limit`: bytes that a file may have."""
        program = CHILD.format(patch=patch, pause=self.pause)
        command = [sys.executable, "-c", program, "run", str(self.plan), "--source", str(self.source)]
        command += ["--output", str(output), "--jobs", "2", "--quiet"]
        if limit is not None:
            command = ["prlimit", f"--fsize={limit}", *command]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self, output: Path, patch: str = "pass", limit: int | None = None) -> tuple[int, str]:
        """The exit code of a run, and what it said."""
        process = self.start(output, patch, limit)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out + err


@dataclass
class Result:
    """What became of one output."""

    fault: str
    disturbed: int = 0  # times
    said: str = ""  # the code of the last disturbed run's error
    wrong: str = ""


def restored(output: Path) -> dict[str, Any]:
    """Every array of a finished checkpoint, by plain Orbax, as bytes with dtype and shape."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    tree = ocp.StandardCheckpointer().restore(output / "0" / "items")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()}


def looks_finished(output: Path) -> bool:
    """Whether something lies where a step does, or where a reader of Orbax would find one."""
    return any(p.name.isdigit() for p in output.iterdir()) if output.is_dir() else False


def prepare(folder: Path, gigabytes: float, memory: str) -> Bench:
    """The checkpoint, the plan and the undisturbed result."""
    sys.path.insert(0, str(ROOT / "tools"))
    make_checkpoint = importlib.import_module("make_checkpoint")
    source = folder / "checkpoint"
    if make_checkpoint.main([str(source), "--gigabytes", str(gigabytes), "--shard-gigabytes", str(gigabytes / 3)]):
        raise RuntimeError("no checkpoint was made")
    plan = folder / "plan.json"
    command = [sys.executable, "-m", "ckptc", "compile", "--model", "llama3.1-8b", "--source", str(source)]
    subprocess.run([*command, "--memory", memory, "-o", str(plan)], check=True, stdout=subprocess.DEVNULL)
    bench = Bench(folder, source, plan, pause=0.004)
    started = time.monotonic()
    process = bench.start(folder / "undisturbed")
    wait_for_work(process, folder / "undisturbed")
    begun = time.monotonic()
    _, said = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise RuntimeError(f"the undisturbed run failed: {said}")
    bench.seconds, bench.working = time.monotonic() - started, time.monotonic() - begun
    bench.expected = restored(folder / "undisturbed")
    return bench


def wait_for_work(process: subprocess.Popen[str], output: Path) -> None:
    """Returns when a run has begun to write, or has ended."""
    while process.poll() is None and not any((output / ".ckptc-unfinished").glob("*")):
        time.sleep(0.002)


def judged(bench: Bench, output: Path, result: Result) -> Result:
    """Lets an output's run go on, and compares. The output is removed, unless something is wrong."""
    if not looks_finished(output):
        code, said = bench.run(output)
        if code:
            result.wrong = f"the same command does not go on: {said[-300:]}"
            return result
    try:
        found = restored(output)
    except Exception as error:  # whatever a reader says of it, it is no checkpoint
        result.wrong = f"what is there cannot be restored: {error}"[:300]
        return result
    differ = [n for n in bench.expected.keys() | found.keys() if bench.expected.get(n) != found.get(n)]
    if differ:
        result.wrong = f"{len(differ)} arrays differ, such as {min(differ)}"
    else:
        shutil.rmtree(output)
    return result


def error_code(said: str) -> str:
    return said.partition("error[")[2].partition("]")[0]


# -- the faults ----------------------------------------------------------------------------------------------


def kills(bench: Bench, rng: random.Random, count: int) -> Iterator[Result]:
    """Outputs whose runs are killed up to ten times each, until `count` kills have been made."""
    left = count
    while left > 0:
        output = bench.folder / f"killed-{left}"
        result = Result("killed")
        while left > 0 and result.disturbed < 10 and not looks_finished(output):
            process = bench.start(output)
            if rng.random() < 0.3:  # at any time
                time.sleep(rng.uniform(0, bench.seconds))
            else:
                wait_for_work(process, output)
                time.sleep(rng.uniform(0, bench.working))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                result.disturbed += 1
                left -= 1
            _, err = process.communicate(timeout=PATIENCE)
            if process.returncode not in (0, -signal.SIGKILL):
                result.wrong = f"a run that goes on fails: {err[-300:]}"
                break
        yield result if result.wrong else judged(bench, output, result)


def room(bench: Bench, rng: random.Random, count: int) -> Iterator[Result]:
    """A full file system: first too small from the start, then filled by another on the way."""
    size = sum(f.stat().st_size for f in bench.source.glob("*.safetensors"))
    for _ in range(max(1, count)):
        with small_disk(bench.folder / "disk", size * 3) as disk:
            if disk is None:
                yield limited(bench, rng, size)
                continue
            yield filled(bench, rng, disk)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path | None]:
    """A tmpfs of `size` bytes, None where this user may not mount one."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def filled(bench: Bench, rng: random.Random, disk: Path) -> Result:
    output, filler, result = disk / "out", disk / "filler", Result("disk full")
    process = bench.start(output)
    wait_for_work(process, output)
    time.sleep(rng.uniform(0, 0.5) * bench.working)
    try:
        with filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
    except OSError:
        result.disturbed = 1  # as full as it gets
    _, err = process.communicate(timeout=PATIENCE)
    result.said = error_code(err)
    if process.returncode and result.said != "disk-full":
        result.wrong = f"a full disk is not said: {err[-300:]}"
        return result
    if process.returncode and looks_finished(output):
        result.wrong = "a run without room left something that looks finished"
        return result
    again, said = bench.run(output) if process.returncode else (1, "")
    if not again:
        result.wrong = f"a run came through on a full disk: {said}"
        return result
    filler.unlink()
    return judged(bench, output, result)


def limited(bench: Bench, rng: random.Random, size: int) -> Result:
    output, result = bench.folder / "limited", Result("no file may be larger", disturbed=1)
    code, said = bench.run(output, limit=rng.randrange(size // 20, size // 4))
    result.said = error_code(said)
    if code and (result.said != "disk-full" or looks_finished(output)):
        result.wrong = f"a limit on files is not said: {said[-300:]}"
        return result
    return judged(bench, output, result)


def reads(bench: Bench, rng: random.Random, count: int) -> Iterator[Result]:
    """Reads that fail, reads that are short, shards that are cut or gone."""
    for number in range(max(1, count)):
        output = bench.folder / f"reads-{number}"
        at = rng.randrange(2, 60)
        code, said = bench.run(output, EIO_PATCH.format(at=at))
        failed = Result(f"read {at} of each process fails", 1, error_code(said))
        if code and (failed.said != "source-unreadable" or looks_finished(output)):
            failed.wrong = f"a read that fails is not said: {said[-300:]}"
            yield failed
        else:
            yield judged(bench, output, failed)

        code, said = bench.run(output, SHORT_PATCH)
        short = Result("every other read is short", 1, error_code(said))
        if code:
            short.wrong = f"short reads are not gone on with: {said[-300:]}"
        yield short if code else judged(bench, output, short)

        shard = rng.choice(sorted(bench.source.glob("*.safetensors")))
        yield disturbed(bench, rng, output, f"{shard.name} cut short", functools.partial(cut, shard))
        yield disturbed(bench, rng, output, f"{shard.name} gone", functools.partial(moved, shard))


def source(bench: Bench, rng: random.Random, count: int) -> Iterator[Result]:
    """The source's directory goes, and comes back."""
    for number in range(max(1, count)):
        yield disturbed(bench, rng, bench.folder / f"source-{number}", "source gone", lambda: moved(bench.source))


def exports(bench: Bench, rng: random.Random, count: int) -> Iterator[Result]:
    """Exports over an older checkpoint, killed: it is there until the new one is; the next export is whole."""

    def start(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ckptc", "export", "--model", "llama3.1-8b", "--source"]
        command += [str(bench.folder / "undisturbed"), "--output", str(output), "--config-from", str(bench.source)]
        return subprocess.Popen([*command, "--force", "--quiet"], stdout=subprocess.DEVNULL, start_new_session=True)

    def files(output: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in output.iterdir() if not p.name.startswith(".")}

    older, whole = {"config.json": b"{}", "model-00001-of-00009.safetensors": b"old"}, bench.folder / "exported"
    started = time.monotonic()
    if start(whole).wait(PATIENCE):
        raise RuntimeError("the undisturbed export failed")
    seconds, expected = time.monotonic() - started, files(whole)
    for number in range(max(1, count)):
        output, result = bench.folder / f"export-{number}", Result("export killed")
        output.mkdir()
        for name, content in older.items():
            (output / name).write_bytes(content)
        for _ in range(3):
            process = start(output)
            time.sleep(rng.uniform(0.3, 1) * seconds)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                result.disturbed += 1
            process.wait(PATIENCE)
            found = files(output)
            if found not in (older, expected) and "config.json" in found:
                result.wrong = f"half of a checkpoint looks whole: {sorted(found)}"
        if start(output).wait(PATIENCE) or files(output) != expected or len(os.listdir(output)) != len(expected):
            result.wrong = result.wrong or f"the next export is another: {sorted(os.listdir(output))}"
        yield result
        shutil.rmtree(output)
    shutil.rmtree(whole)


def disturbed(bench: Bench, rng: random.Random, output: Path, name: str, fault: Callable[[], Any]) -> Result:
    """A run during which the source is not as it was; it may fail, in a few words, or come through."""
    result = Result(name, 1)
    process = bench.start(output)
    wait_for_work(process, output)
    time.sleep(rng.uniform(0, 0.7) * bench.working)
    with fault():
        _, err = process.communicate(timeout=PATIENCE)
        result.said = error_code(err)
        if process.returncode not in (0, 1) or (process.returncode and not result.said.startswith("source-")):
            result.wrong = f"what is wrong with the source is not said: {err[-300:]}"
        elif process.returncode and looks_finished(output):
            result.wrong = "a run that failed left something that looks finished"
        elif process.returncode:
            code, said = bench.run(output)
            if not code:
                result.wrong = f"a run came through without its source: {said}"
    return result if result.wrong else judged(bench, output, result)


@contextmanager
def cut(shard: Path) -> Iterator[None]:
    """Half of a file, in place, as a disk that loses its end; then all of it again."""
    whole = shard.read_bytes()
    times = shard.stat()
    os.truncate(shard, len(whole) // 2)
    try:
        yield
    finally:
        with shard.open("r+b") as file:
            file.write(whole)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextmanager
def moved(path: Path) -> Iterator[None]:
    elsewhere = path.with_name(path.name + ".elsewhere")
    path.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(path)


FAULTS: dict[str, Callable[[Bench, random.Random, int], Iterator[Result]]] = {
    f.__name__: f for f in (kills, room, reads, source, exports)
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", nargs="?", choices=FAULTS, help="one kind of fault (default: all)")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="kills to make (default: 100)")
    parser.add_argument("--times", type=int, default=3, metavar="N", help="times for each other fault (default: 3)")
    parser.add_argument("--gigabytes", type=float, default=0.06, help="size of the checkpoint (default: 0.06)")
    parser.add_argument("--memory", default="1MiB", help="of the plan: little makes many units (default: 1MiB)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, results = random.Random(args.seed), list[Result]()
    with tempfile.TemporaryDirectory(prefix="ckptc-faults-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        bench = prepare(Path(folder), args.gigabytes, args.memory)
        print(f"undisturbed: {bench.seconds:.1f} s, {len(bench.expected)} arrays")
        print(f"{'FAULT':44} {'TIMES':>5}  {'LAST SAID':20} RESULT")
        for name in [args.fault] if args.fault else FAULTS:
            for result in FAULTS[name](bench, rng, args.kills if name == "kills" else args.times):
                results.append(result)
                end = result.wrong or "goes on, and is equal"
                print(f"{result.fault:44} {result.disturbed:5}  {result.said or '-':20} {end}", flush=True)
    wrong = sum(bool(r.wrong) for r in results)
    print(f"{sum(r.disturbed for r in results)} faults to {len(results)} outputs, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
