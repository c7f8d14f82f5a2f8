"""Measures conversions next to the alternatives, interleaved in one session, as ratios to copying the same bytes.

    python tools/bench.py WORKDIR --gigabytes 3 [--runs 5] [--cold] [--export] [--json FILE] [--maxtext-python PYTHON]

Absolute times mean little on a shared machine; ratios within one run do. Every mode runs once per round, the rounds are repeated, and the
table shows medians: rate relative to `cp` plus sync, CPU seconds per GB written, and the peak resident memory of the whole process tree.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
SAMPLE = 0.02  # seconds between two looks at the process tree


@dataclass
class Result:
    """One mode's runs."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    failed: str | None = None


@dataclass(frozen=True)
class Mode:
    name: str
    command: Callable[[Path, Path], list[str]]  # source, output
    sync: bool = True  # whether the time of a sync at the end counts, as it does for what syncs itself


def tree_bytes(process: psutil.Process) -> int:
    """Proportional set size of a process and its children: pages they share count once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except (psutil.Error, AttributeError):
            continue
    return total


def measure(command: list[str], sync_directory: Path | None) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak bytes of a command. Raises CalledProcessError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, running = 0, True

    def watch() -> None:
        nonlocal peak
        watched = psutil.Process(process.pid)
        while running:
            try:
                peak = max(peak, tree_bytes(watched))
            except psutil.Error:
                return
            time.sleep(SAMPLE)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    running = False
    watcher.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    if sync_directory is not None:
        sync(sync_directory)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, peak


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


def ckptc(*options: str) -> Callable[[Path, Path], list[str]]:
    def command(source: Path, output: Path) -> list[str]:
        base = [sys.executable, "-m", "ckptc", "convert", "--model", "llama3.1-8b", "--source", str(source), "--quiet"]
        return [*base, "--output", str(output), *options]

    return command


def back(*options: str) -> Callable[[Path, Path], list[str]]:
    """The way back, from what was converted of `source` beside it."""

    def command(source: Path, output: Path) -> list[str]:
        base = [sys.executable, "-m", "ckptc", "export", "--model", "llama3.1-8b", "--quiet", "--output", str(output)]
        return [*base, "--source", str(source.parent / "saved"), "--config-from", str(source), *options]

    return command


def naive(source: Path, output: Path) -> list[str]:
    return [sys.executable, str(HERE / "bench_naive.py"), str(source), str(output)]


def modes(extra: list[str], export: bool) -> list[Mode]:
    if export:
        exports = ["", "--jobs 1", *extra]
        files = 'mkdir "$1" && cp "$0"/*.safetensors "$0"/config.json "$1"'
        copy = Mode("cp + sync", lambda source, output: ["sh", "-c", files, str(source), str(output)])
        return [copy, *(Mode(f"ckptc export {o}".strip(), back(*o.split()), sync=False) for o in exports)]
    found = [
        Mode("cp + sync", lambda source, output: ["cp", "-rL", str(source), str(output)]),
        Mode("ckptc", ckptc(), sync=False),
        Mode("ckptc --jobs 1", ckptc("--jobs", "1"), sync=False),
        Mode("ckptc --link", ckptc("--link"), sync=False),
        Mode("ckptc --compression blosc-lz4", ckptc("--compression", "blosc-lz4"), sync=False),
        Mode("ckptc --compression zstd", ckptc("--compression", "zstd"), sync=False),
        Mode("numpy + Orbax", naive),
    ]
    found += [Mode(f"ckptc {options}", ckptc(*options.split()), sync=False) for options in extra]
    return found


def run(work: Path, wanted: list[Mode], runs: int, cold: bool) -> dict[str, Result]:
    source = work / "source"
    results = {mode.name: Result() for mode in wanted}
    for round_ in range(runs):
        for mode in wanted:
            result, output = results[mode.name], work / "output"
            if result.failed:
                continue
            shutil.rmtree(output, ignore_errors=True)
            if cold:
                forget(source)
                forget(work / "saved")
            else:
                subprocess.run(["sh", "-c", f"cat {source}/*.safetensors > /dev/null"], check=True)
                if mode.name.startswith("ckptc export"):
                    subprocess.run(["sh", "-c", f"cat {work}/saved/0/items/*/d/* > /dev/null"], check=True)
            try:
                seconds, cpu, peak = measure(mode.command(source, output), output if mode.sync else None)
            except subprocess.CalledProcessError as error:
                result.failed = str(error.output).strip().splitlines()[-1] if error.output else str(error)
                continue
            result.seconds.append(seconds)
            result.cpu.append(cpu)
            result.peak.append(peak)
            print(f"round {round_ + 1}: {mode.name}: {seconds:.2f} s, {cpu:.2f} CPU s, {peak / 1e6:.0f} MB", flush=True)
    shutil.rmtree(work / "output", ignore_errors=True)
    return results


def table(results: dict[str, Result], gigabytes: float) -> list[dict[str, object]]:
    base = statistics.median(results["cp + sync"].seconds)
    rows: list[dict[str, object]] = []
    for name, r in results.items():
        if r.failed or not r.seconds:
            rows.append({"mode": name, "failed": r.failed})
            continue
        seconds = statistics.median(r.seconds)
        rows.append(
            {
                "mode": name,
                "rate": round(base / seconds, 2),
                "best": round(base / min(r.seconds), 2),
                "worst": round(base / max(r.seconds), 2),
                "cpu_s_per_gb": round(statistics.median(r.cpu) / gigabytes, 2),
                "peak_mb": round(max(r.peak) / 1e6),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a directory on the disk to measure; the input is generated there once")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before each run")
    parser.add_argument("--export", action="store_true", help="measure the way back, from Orbax to safetensors")
    parser.add_argument("--only", action="append", help="measure only these modes (cp + sync always)")
    parser.add_argument(
        "--with", action="append", default=[], dest="extra", metavar="OPTIONS", help="also ckptc with these options"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = args.work / "source"
    if not source.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        make = [
            sys.executable,
            str(HERE / "make_checkpoint.py"),
            str(source),
            "--family",
            "llama",
            "--gigabytes",
            str(args.gigabytes),
        ]
        subprocess.run(make, check=True)
    if args.export and not (args.work / "saved" / "0").exists():
        subprocess.run(ckptc()(source, args.work / "saved"), check=True)
    size = sum(p.stat().st_size for p in source.glob("*.safetensors")) / 1e9
    wanted = [
        m for m in modes(args.extra, args.export) if not args.only or m.name in args.only or m.name == "cp + sync"
    ]
    rows = table(run(args.work, wanted, args.runs, args.cold), size)
    cache = "cold" if args.cold else "warm"
    print(f"\n{size:.2f} GB, {cache} cache, {os.cpu_count()} cores, medians of {args.runs} interleaved runs\n")
    print("| mode | rate, cp + sync = 1 | CPU s per GB | peak memory of the tree |\n|---|---|---|---|")
    for row in rows:
        if "failed" in row:
            print(f"| {row['mode']} | failed: {row['failed']} | | |")
        else:
            print(
                f"| {row['mode']} | {row['rate']} ({row['worst']} to {row['best']}) | {row['cpu_s_per_gb']} | {row['peak_mb']} MB |"
            )
    if args.json:
        args.json.write_text(
            json.dumps({"gigabytes": size, "cache": cache, "runs": args.runs, "modes": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
