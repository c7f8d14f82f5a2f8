"""Measures conversions next to the alternatives, interleaved in one session, as ratios to copying the same bytes.

    python tools/bench.py WORKDIR [--gigabytes 3,12] [--cache warm,cold] [--runs 5] [--json FILE]
                          [--maxtext-python PYTHON] [--slow-runs 1] [--only MODE] [--with OPTIONS]
    python tools/bench.py WORKDIR --export ...

Absolute times mean little on a shared machine; ratios within one session do. Every mode runs once per round, the order
turned by one from round to round, and the table shows medians of the rounds: rate relative to `cp` plus sync, processor
seconds per GB of source, and the most memory that the whole process tree held at once. The slow ones, numpy with Orbax
and MaxText's converter, run in the first `--slow-runs` rounds only. A mode that fails gets a row that says why, and one
that uses up the machine's memory is stopped. Ctrl-C ends a session early, with a table of what was measured until then.

The input is a random Llama, generated in WORKDIR once for each size. Cold means that what is read was dropped from the
page cache before; a warm source that does not fit into memory together with the output is partly cold. Micro-benchmarks
are in `bench_kernels.py` and `bench_compile.py`. MaxText's environment is described in `forward.py`; torch is not
needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_measure import Failed, Run, described, fill, forget, machine, measure, versions_in
from bench_modes import BASE, Mode, Place, generate, modes, prepare

FORMAT = 2  # of the JSON
NEAR = 0.1  # how far a checkpoint's size may be from the one asked for


@dataclass
class Result:
    """One mode's runs, in one state of the cache."""

    runs: list[Run] = field(default_factory=list)
    failed: str | None = None


Results = dict[str, dict[str, Result]]  # by cache and mode


def unmeasured(wanted: Sequence[Mode], caches: Sequence[str]) -> Results:
    return {cache: {mode.name: Result() for mode in wanted} for cache in caches}


def run_all(place: Place, wanted: Sequence[Mode], results: Results, runs: int, slow_runs: int) -> None:
    """All rounds, into `results`."""
    for number in range(runs):
        turned = [*wanted[number % len(wanted) :], *wanted[: number % len(wanted)]]
        for cache in results:
            for mode in turned:
                result = results[cache][mode.name]
                if result.failed or (mode.slow and number >= slow_runs):
                    continue
                one_run(place, mode, cache, result)
                said = result.failed or "{0.seconds:.2f} s, {0.cpu:.2f} CPU s".format(result.runs[-1])
                print(f"round {number + 1}, {cache}: {mode.name}: {said}", flush=True)


def one_run(place: Place, mode: Mode, cache: str, result: Result) -> None:
    """Runs a mode once and adds to its result."""
    shutil.rmtree(place.output, ignore_errors=True)
    reads = place.saved if mode.name.startswith("ckptc export") else place.source
    (forget if cache == "cold" else fill)(reads)
    settle(place.home)
    try:
        result.runs.append(measure(mode.command(place), place.output if mode.sync else None))
    except Failed as error:
        result.failed = str(error)
    finally:
        shutil.rmtree(place.output, ignore_errors=True)


def settle(directory: Path) -> None:
    """Waits until the file system has removed what was removed here, which the next mode's sync would wait for else."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def rows(results: dict[str, Result], gigabytes: float) -> list[dict[str, Any]]:
    """A record for each mode; without figures where it failed or there is nothing to compare it with."""
    base = results[BASE]
    out = []
    for name, result in results.items():
        row: dict[str, Any] = {"mode": name, "runs": len(result.runs), "failed": result.failed}
        if result.runs and base.runs and not result.failed:
            seconds = [run.seconds for run in result.runs]
            copied = statistics.median(run.seconds for run in base.runs)
            row |= {
                "rate": round(copied / statistics.median(seconds), 3),
                "best": round(copied / min(seconds), 3),
                "worst": round(copied / max(seconds), 3),
                "median_seconds": round(statistics.median(seconds), 3),
                "cpu_s_per_gb": round(statistics.median(run.cpu for run in result.runs) / gigabytes, 3),
                "peak_mb": round(max(run.peak for run in result.runs) / 1e6),
                "seconds": [round(s, 3) for s in seconds],
                "cpu_seconds": [round(run.cpu, 3) for run in result.runs],
                "peak_bytes": [run.peak for run in result.runs],
            }
        out.append(row)
    return out


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for people."""
    lines = ["| mode | rate, cp + sync = 1 | seconds | CPU s per GB | peak memory of all processes | runs |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found:
        if "rate" in row:
            rate = f"{row['rate']:.2f} ({row['worst']:.2f} to {row['best']:.2f})"
            rest = f"{row['median_seconds']:.2f} | {row['cpu_s_per_gb']:.2f} | {row['peak_mb']} MB | {row['runs']}"
            lines.append(f"| {row['mode']} | {rate} | {rest} |")
        else:
            lines.append(
                f"| {row['mode']} | failed: {row['failed'] or 'nothing to compare with'} | | | | {row['runs']} |"
            )
    return "\n".join(lines)


def size_of(source: Path) -> float:
    """Gigabytes of a checkpoint's shards."""
    return sum(p.stat().st_size for p in source.glob("*.safetensors")) / 1e9


def place_for(work: Path, gigabytes: float) -> Place:
    """Where the checkpoint of this size is, or will be: WORKDIR itself if it holds it, else a directory in it."""
    itself = Place(work)
    if itself.source.exists() and abs(size_of(itself.source) - gigabytes) <= NEAR * gigabytes:
        return itself
    return Place(work / f"{gigabytes:g}gb")


def choice(text: str) -> list[str]:
    found = text.split(",")
    if not set(found) <= {"warm", "cold"}:
        raise argparse.ArgumentTypeError(f"warm, cold or both with a comma, not {text}")
    return found


def sizes(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORKDIR", help="a directory on the disk to measure")
    parser.add_argument("--gigabytes", type=sizes, default=[3.0], metavar="N[,N]", help="sizes (default: 3)")
    parser.add_argument("--cache", type=choice, default=["warm"], metavar="warm[,cold]", help="default: warm")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--slow-runs", type=int, default=1, metavar="N", help="of the slow modes (default: 1)")
    parser.add_argument("--maxtext-python", metavar="PYTHON", help="a Python with MaxText: also measure its converter")
    parser.add_argument("--export", action="store_true", help="the way back, from Orbax to safetensors")
    parser.add_argument("--only", action="append", metavar="MODE", help="only these modes, and cp; may be repeated")
    parser.add_argument(
        "--with", action="append", default=[], dest="extra", metavar="OPTIONS", help="also ckptc with these options"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    known = [mode.name for mode in modes(args.extra, args.export, args.maxtext_python)]
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"no mode {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a table of what there is, and nothing left
    every = modes(args.extra, args.export, args.maxtext_python)
    wanted = [m for m in every if not args.only or m.name in args.only or m.name == BASE]
    args.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "format": FORMAT,
        "direction": "export" if args.export else "convert",
        "rounds": args.runs,
        "interrupted": False,
        "machine": machine(args.work),
        "maxtext": versions_in(args.maxtext_python, ("maxtext", "jax", "orbax-checkpoint"))
        if args.maxtext_python
        else {},
        "measurements": [],
    }
    tables = []
    for gigabytes in args.gigabytes:
        place = place_for(args.work, gigabytes)
        results = unmeasured(wanted, args.cache)
        try:
            generate(place, gigabytes)
            prepare(place, args.export)
            run_all(place, wanted, results, args.runs, args.slow_runs)
        except KeyboardInterrupt:
            report["interrupted"] = True
        if report["interrupted"] and not any(r.runs for one in results.values() for r in one.values()):
            break  # there may be no source yet
        size = size_of(place.source)
        for cache in args.cache:
            found = rows(results[cache], size)
            report["measurements"].append({"gigabytes": round(size, 3), "cache": cache, "modes": found})
            title = f"{report['direction']}, {size:.3g} GB, {cache} cache, medians of {args.runs} interleaved runs"
            tables.append(f"{title}\n\n{markdown(found)}")
        if args.json:  # after each size, for the next may take long
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if report["interrupted"]:
            break
    maxtext = ", ".join(f"{name} {number}" for name, number in report["maxtext"].items())
    print("", *tables, described(report["machine"]) + (f"; beside it {maxtext}" if maxtext else ""), sep="\n\n")

    if report["interrupted"]:
        sys.exit("interrupted: the figures are those of the rounds before")


if __name__ == "__main__":
    main()
