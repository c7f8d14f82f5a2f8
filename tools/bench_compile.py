"""Measures compiling: seconds and memory from a checkpoint's headers to the written plan, and to load the plan again.

    python tools/bench_compile.py WORKDIR [--model NAME] [--runs 3] [--json FILE]

WORKDIR receives, for each model, a checkpoint of the published sizes whose files have real headers and holes for
weights: some megabytes of disk. Each measurement is a process of its own, its start-up included; scanned and unscanned
follow each other in each round. `load` is the time of `ckptc.plan.json.loads` alone, in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_measure import Failed, Run, described, machine, measure
from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.plan.model import Plan
from ckptc.spec.mapping import find_model
from make_checkpoint import GIGABYTE, Tensor, header, split_shards, write_json

FORMAT = 1  # of the JSON
MODELS = ("qwen3-235b-a22b", "deepseek3-671b")  # 36,945 and 45,395 tensors
LAYOUTS = ("scanned", "unscanned")
SHARD_GIGABYTES = 4  # about what both are published in
ITEM, TYPE = 2, "BF16"
LOAD = """
import json, sys, time
from pathlib import Path
from ckptc.plan.json import loads
text = Path(sys.argv[1]).read_bytes()
start = time.perf_counter()
loads(text)
Path(sys.argv[2]).write_text(str(time.perf_counter() - start))
"""


def tensors(plan: Plan) -> Iterator[Tensor]:
    """The source tensors of a plan, with their shapes, in the order of the plan's list."""
    shapes: dict[int, tuple[int, ...]] = {}
    for array in plan.arrays:
        for source in array.sources:
            shapes |= dict.fromkeys(source.tensors, source.stored.shape)
    for position, tensor in enumerate(plan.tensors):
        yield Tensor(tensor.name, shapes[position])


def write_hollow(directory: Path, model: str) -> None:
    """A checkpoint of a named model in bfloat16: config, index and headers as published, holes for weights."""
    mapping, named = find_model(model)
    wanted = list(tensors(compile_plan(mapping, named, Options(layout="unscanned"))))
    shards = split_shards(wanted, SHARD_GIGABYTES * GIGABYTE, ITEM)
    directory.mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(directory / name, "wb") as stream:
            stream.write(header(shard, TYPE, ITEM))
            stream.truncate(stream.tell() + sum(tensor.elements for tensor in shard) * ITEM)
        weight_map |= {tensor.name: name for tensor in shard}
    size = sum(tensor.elements for tensor in wanted) * ITEM
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(directory / "config.json", dict(named.config))


def compile_once(work: Path, model: str, layout: str) -> tuple[Run, Run, float]:
    """One compilation, one loading, and the seconds of loading alone. Raises `Failed`."""
    plan, said = work / f"{model}.{layout}.json", work / "seconds"
    command = [sys.executable, "-m", "ckptc", "compile", "--model", model, "--source", str(work / model)]
    command += ["-o", str(plan), *(["--no-scan"] if layout == "unscanned" else [])]
    made = measure(command)
    loaded = measure([sys.executable, "-c", LOAD, str(plan), str(said)])
    return made, loaded, float(said.read_text())


def measured(work: Path, models: Sequence[str], runs: int) -> list[dict[str, Any]]:
    """A record for each model and layout."""
    cases = [(model, layout) for model in models for layout in LAYOUTS]
    found: dict[tuple[str, str], list[tuple[Run, Run, float]]] = {case: [] for case in cases}
    failed: dict[tuple[str, str], str] = {}
    for _ in range(runs):
        for case in cases:
            if case not in failed:
                try:
                    found[case].append(compile_once(work, *case))
                except Failed as error:
                    failed[case] = str(error)
    return [row(work, *case, found[case], failed.get(case)) for case in cases]


def row(work: Path, model: str, layout: str, found: list[tuple[Run, Run, float]], failed: str | None) -> dict[str, Any]:
    index = json.loads((work / model / "model.safetensors.index.json").read_text("utf-8"))
    out: dict[str, Any] = {
        "model": model,
        "layout": layout,
        "tensors": len(index["weight_map"]),
        "runs": len(found),
        "failed": failed,
    }
    if found and failed is None:
        out |= {
            "compile_seconds": round(statistics.median(made.seconds for made, _, _ in found), 3),
            "compile_cpu_seconds": round(statistics.median(made.cpu for made, _, _ in found), 3),
            "compile_peak_mb": round(max(made.peak for made, _, _ in found) / 1e6),
            "plan_bytes": (work / f"{model}.{layout}.json").stat().st_size,
            "load_seconds": round(statistics.median(seconds for _, _, seconds in found), 3),
            "load_peak_mb": round(max(loaded.peak for _, loaded, _ in found) / 1e6),
        }
    return out


def markdown(found: list[dict[str, Any]]) -> str:
    lines = ["| model, layout | tensors | compile | peak memory | plan | load the plan | peak memory |"]
    lines.append("|---|---|---|---|---|---|---|")
    for one in found:
        start = f"| {one['model']}, {one['layout']} | {one['tensors']:,} |"
        if "compile_seconds" in one:
            lines.append(
                f"{start} {one['compile_seconds']:.2f} s | {one['compile_peak_mb']} MB | {one['plan_bytes'] / 1e6:.2f} MB "
                f"| {one['load_seconds']:.2f} s | {one['load_peak_mb']} MB |"
            )
        else:
            lines.append(f"{start} failed: {one['failed']} | | | | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORKDIR")
    parser.add_argument("--model", action="append", metavar="NAME", help=f"default: {' and '.join(MODELS)}")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    models = args.model or MODELS
    for model in models:
        if not (args.work / model).exists():
            write_hollow(args.work / model, model)
    found = measured(args.work, models, args.runs)
    here = machine(args.work)
    print(f"medians of {args.runs} interleaved runs, the most of memory\n\n{markdown(found)}\n\n{described(here)}")
    if args.json:
        report = {"format": FORMAT, "runs": args.runs, "machine": here, "compilations": found}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
