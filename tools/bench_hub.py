"""Measures conversions of what is on the Hub, against a server on this machine that answers as the Hub does.

    python tools/bench_hub.py WORKDIR [--gigabytes 1] [--runs 3] [--latency 0.02] [--broken 0.01]

WORKDIR receives a generated checkpoint, which the server gives out, and what is made of it. In each round, one after the
other: the Hub's own client downloads the checkpoint (with a sync at the end); ckptc converts it while it streams; the
download and then a conversion of what was downloaded, as people do without streaming. Rates are relative to the download
alone: 1 where the conversion is hidden behind the fetch. Memory is the peak of all processes together.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_measure import Run, measure

HERE = Path(__file__).resolve().parent
MODEL, REPO = "llama3.1-8b", "org/model"
DOWNLOAD = f"import os, huggingface_hub as h; h.snapshot_download({REPO!r}, local_dir=%r); os.sync()"


@contextmanager
def server(source: Path, latency: float, broken: float) -> Iterator[str]:
    """The endpoint of a server that gives out the checkpoint."""
    command = [
        sys.executable,
        str(HERE.parent / "tests" / "hub_server.py"),
        str(source),
        "--repo",
        REPO,
        "--no-digests",
    ]
    command += ["--latency", str(latency), "--broken", str(broken)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def environment(endpoint: str, home: Path) -> dict[str, str]:
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}
    return {
        **os.environ,
        **own,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def one_round(home: Path, endpoint: str) -> dict[str, tuple[Run, ...]]:
    """The processes of each way, which start from nothing."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    os.environ.update(environment(endpoint, home))
    convert = [sys.executable, "-m", "ckptc", "convert", "--model", MODEL, "--quiet"]
    download = [sys.executable, "-c", DOWNLOAD % str(home / "downloaded")]
    fetched = measure(download)
    streamed = measure([*convert, "--source", f"hf://{REPO}", "--output", str(home / "streamed")])
    shutil.rmtree(home / "streamed")
    converted = measure([*convert, "--source", str(home / "downloaded"), "--output", str(home / "converted")])
    shutil.rmtree(home)
    return {"hf download": (fetched,), "ckptc, streaming": (streamed,), "hf download, then ckptc": (fetched, converted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, metavar="WORKDIR")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--broken", type=float, default=0.0, help="share of ranges that break off")
    args = parser.parse_args()
    source = args.work / f"source-{args.gigabytes:g}"
    if not source.exists():
        command = [sys.executable, str(HERE / "make_checkpoint.py"), str(source), "--gigabytes", f"{args.gigabytes:g}"]
        subprocess.run(command, check=True)
    with server(source, args.latency, args.broken) as endpoint:
        rounds = [one_round(args.work / "made", endpoint) for _ in range(args.runs)]
    print("| way | rate, hf download = 1 | CPU s per GB | peak memory |\n|---|---|---|---|")
    for way in rounds[0]:
        seconds = [sum(r.seconds for r in made[way]) for made in rounds]
        rates = [made["hf download"][0].seconds / s for made, s in zip(rounds, seconds, strict=True)]
        cpu = statistics.median(sum(r.cpu for r in made[way]) for made in rounds) / args.gigabytes
        peak = max(r.peak for made in rounds for r in made[way])
        spread = f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
        print(f"| {way} | {spread} | {cpu:.2f} | {peak / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
