"""Micro-benchmarks: what a run does with bytes in memory, next to memcpy, by one process and by several at once.

    python tools/bench_kernels.py [--rounds 5] [--processes N] [--seconds 0.15] [--only TEXT] [--json FILE]

Each case makes the chunks of one unit of work as `ckptc.run.worker` does: from a buffer that holds source tensors, into
two chunks' memory by turns, all of it touched before. The shapes are those of real models at the default 16 shards.
`memcpy` is `np.copyto` of as many bytes into warm memory. A rate counts half of what is read plus half of what is
written, so that a copy of n bytes counts n. Of several processes it is the sum; they start each case together.
The cases follow each other in rounds, and the table shows medians and ratios to memcpy of the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench_measure import described, machine
from ckptc.ops.codes import Code
from ckptc.ops.codes.awq import Awq
from ckptc.ops.codes.fp8 import Fp8
from ckptc.ops.codes.gptq import Gptq
from ckptc.ops.codes.mxfp4 import Mxfp4
from ckptc.ops.codes.nf4 import Nf4
from ckptc.ops.codes.nvfp4 import Nvfp4
from ckptc.ops.codes.packed_int import PackedInt
from ckptc.ops.nest import Part, whole
from ckptc.ops.types import numpy_dtype
from ckptc.plan.model import Beside, Decode, Stored
from ckptc.plan.reads import need
from ckptc.run.decode import BesideRows, Coded, Decoder
from ckptc.run.kernel import Conversion, Kernel, Loop, Math
from ckptc.storage.formats.checksum import Summer
from ckptc.storage.sink.file import page_buffer

Array = npt.NDArray[Any]
Made = tuple[Callable[[], object], float]  # does the work once; the bytes it counts
FORMAT = 1  # of the JSON
BASE = "memcpy"
BF16, F16, F32 = "bfloat16", "float16", "float32"
ROPE = (3, 0, 2, 1)  # (heads, 2, half, embed) -> (embed, heads, half, 2): the halves of a head become pairs


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Made]


def memory(size: int, dtype: str) -> Array:
    """Memory as the worker's: whole pages."""
    kind = numpy_dtype(dtype)
    return page_buffer(size * kind.itemsize)[: size * kind.itemsize].view(kind)


@functools.cache
def random_block() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * np.float32(0.02)


def numbers(size: int, dtype: str) -> Array:
    """`size` weights of this dtype, or any codes if it is an integer: a block of random ones, repeated."""
    kind = numpy_dtype(dtype)
    block = random_block().view(np.uint8) if kind.kind in "ui" else random_block()
    found = block.astype(kind).view(np.uint8)
    out = memory(size, dtype)
    for begin in range(0, out.nbytes, found.size):
        part = out.view(np.uint8)[begin : begin + found.size]
        part[:] = found[: part.size]
    return out


def memcpy(size: int) -> Made:
    source, target = numbers(size, "uint8"), memory(size, "uint8")
    return lambda: np.copyto(target, source), size


def checksum(size: int) -> Made:
    data, summer = numbers(size, "uint8"), Summer()
    return lambda: summer.chunk(0, data), size / 2  # it writes nothing


def rearranged(
    shape: Sequence[int],
    order: Sequence[int],
    *,
    chunks: int = 16,
    source: str = BF16,
    target: str = BF16,
    math: Math = (),
    gap: int = 1,
) -> Made:
    """A row-major source of `shape`; the target has its axes in another `order`, and is cut into `chunks` along its first.
    `gap`: elements from one of the source's to the next."""
    steps = {axis: prod(shape[axis + 1 :]) * gap for axis in range(len(shape))}
    first, *rest = order
    extent = shape[first] // chunks
    sizes = [extent, *(shape[axis] for axis in rest)]
    loops = [Loop(n, steps[a], prod(sizes[i + 1 :])) for i, (n, a) in enumerate(zip(sizes, order, strict=True))]
    held, kernel, conversion = numbers(prod(shape) * gap, source), Kernel(), Conversion(source, target, math)
    made = [memory(prod(sizes), target) for _ in range(2)]

    def once() -> None:
        for i in range(chunks):
            kernel.copy(held, i * extent * steps[first], made[i % 2], 0, loops, conversion)

    return once, prod(shape) * (numpy_dtype(source).itemsize + numpy_dtype(target).itemsize) / 2


def plausible(array: Array) -> Array:
    """Scales of plausible weights in place of any bits: infinities and the smallest numbers cost a processor more."""
    if array.dtype.kind in "ui" or array.dtype.itemsize == 1:
        return array
    found: Array = (0.001 + 0.01 * np.random.default_rng(0).random(array.shape)).astype(array.dtype)
    return found


def decoded(code: Code, shape: tuple[int, ...]) -> Made:
    """A whole weight of codes, to float32."""
    arrays = [plausible(a) for a in code.random(shape, np.random.default_rng(0))]
    beside = tuple(Beside(a.dtype.name, a.shape) for a in arrays[1:])
    decode = Decode(code.name, code.settings(), shape, beside)
    layout = code.layout(shape)
    count = prod(layout.axes)
    whole_rows = Part(0, 0, 0, (whole(count, layout.length), whole(layout.length, 1)))
    needed = need(whole_rows, Stored(arrays[0].dtype.name, arrays[0].shape, decode=decode))
    assert needed.rows is not None
    rows = needed.rows
    codes, out = memory(arrays[0].nbytes, "uint8"), memory(count * layout.length, F32)
    codes[:] = np.ascontiguousarray(arrays[0]).reshape(-1).view(np.uint8)
    held = [
        BesideRows(np.ascontiguousarray(a).reshape(-1), b.places, a.size // layout.count(of), layout.count(of) == 1)
        for a, b, of in zip(arrays[1:], needed.beside, layout.beside, strict=True)
    ]
    how, decoder = Coded(code, shape, arrays[0].dtype.name), Decoder()
    size = (codes.nbytes + sum(a.nbytes for a in arrays[1:]) + out.nbytes) / 2
    return lambda: decoder.decode(how, rows, codes, held, out), size


SCALED: Math = (("scale", 0.08838834764831845), ("cast", BF16))
CASES = [
    Case(BASE, lambda: memcpy(1 << 25)),
    Case("checksum of chunks of 2 MB (reads alone)", lambda: checksum(1 << 21)),
    Case("plain copy, bfloat16 (llama embedding)", lambda: rearranged((4008 * 4096,), (0,), chunks=1)),
    Case("transpose 3584x4096 (llama wi)", lambda: rearranged((3584, 4096), (1, 0))),
    Case("transpose 1024x14336 (llama wo)", lambda: rearranged((1024, 14336), (1, 0))),
    Case("transpose 4008x4096 (llama logits)", lambda: rearranged((4008, 4096), (1, 0))),
    Case("transpose 4608x2304 (gemma wi)", lambda: rearranged((4608, 2304), (1, 0))),
    Case("transpose 768x2048 (qwen3 expert)", lambda: rearranged((768, 2048), (1, 0), chunks=1)),
    Case("transpose 2048x7168 (deepseek expert)", lambda: rearranged((2048, 7168), (1, 0), chunks=1)),
    Case("stack of 4, transposed (llama value)", lambda: rearranged((4, 8, 128, 4096), (3, 0, 1, 2))),
    Case("stack of 9, transposed (deepseek router)", lambda: rearranged((9, 256, 7168), (2, 0, 1))),
    Case("permute_rope, transposed (llama key)", lambda: rearranged((32, 2, 64, 4096), ROPE)),
    Case("the same, scaled (llama query)", lambda: rearranged((32, 2, 64, 4096), ROPE, math=SCALED)),
    Case("every second (gpt-oss gate)", lambda: rearranged((2880, 2880), (0, 1), chunks=1, gap=2)),
    Case("scaled (gemma embedding)", lambda: rearranged((5336, 2304), (0, 1), chunks=1, math=SCALED)),
    Case("float32 to bfloat16", lambda: rearranged((4096, 4096), (0, 1), source=F32)),
    Case("float32 to bfloat16, transposed", lambda: rearranged((4096, 4096), (1, 0), source=F32)),
    Case("float16 to bfloat16", lambda: rearranged((4096, 4096), (0, 1), source=F16)),
    Case("bfloat16 to float32", lambda: rearranged((4096, 4096), (0, 1), target=F32)),
    Case("fp8 blocks decoded (deepseek)", lambda: decoded(Fp8((128, 128)), (2048, 7168))),
    Case("mxfp4 decoded (gpt-oss)", lambda: decoded(Mxfp4(True), (1, 2880, 2880))),
    Case("nvfp4 decoded", lambda: decoded(Nvfp4(True), (2048, 4096))),
    Case("int4 decoded, groups of 32 (kimi)", lambda: decoded(PackedInt(4, 32), (2048, 7168))),
    Case("int4 decoded, groups of 128, zero points", lambda: decoded(PackedInt(4, 128, True), (2048, 4096))),
    Case("awq decoded", lambda: decoded(Awq(128, F16), (2048, 4096))),
    Case("gptq decoded", lambda: decoded(Gptq(4, 128, F16, False), (2048, 4096))),
    Case("nf4 decoded, nested", lambda: decoded(Nf4(64, 256), (2048, 4096))),
]


def rate(made: Made, seconds: float) -> float:
    """GB/s of a case that has run once before."""
    once, size = made
    count, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds or not count:
        once()
        count += 1
    return count * size / took / 1e9


def process(number: int, cases: Sequence[Case], rounds: int, seconds: float, together: Any, pipe: Any) -> None:
    """One of the processes: sends, for each round and case, its rate alone (process 0) and beside the others."""
    for _ in range(rounds):
        for case in cases:
            made = case.make()
            made[0]()
            together.wait()
            alone = rate(made, seconds) if number == 0 else 0.0
            together.wait()
            pipe.send((alone, rate(made, seconds)))


def measured(
    cases: Sequence[Case], rounds: int, processes: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """{case: for each round, GB/s of one process and of all}."""
    context = multiprocessing.get_context("fork")
    together = context.Barrier(processes)
    started, pipes = [], []
    for number in range(processes):
        here, there = context.Pipe(duplex=False)
        one = context.Process(target=process, args=(number, cases, rounds, seconds, together, there), daemon=True)
        one.start()
        there.close()
        started.append(one)
        pipes.append(here)
    out: dict[str, list[tuple[float, float]]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found = [pipe.recv() for pipe in pipes]
            out[case.name].append((sum(alone for alone, _ in found), sum(beside for _, beside in found)))
    for one in started:
        one.join()
    return out


def rows(found: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Medians, and medians of the ratios to memcpy of the same rounds: of one process, and of all."""
    out = []
    for name, rates in found.items():
        row: dict[str, Any] = {"kernel": name}
        for which, key in enumerate(("one", "all")):
            own = [r[which] for r in rates]
            ratios = [r[which] / base[which] for r, base in zip(rates, found[BASE], strict=True)]
            row[key] = {
                "gb_per_s": round(statistics.median(own), 3),
                "of_memcpy": round(statistics.median(ratios), 3),
                "rounds_gb_per_s": [round(r, 3) for r in own],
            }
        out.append(row)
    return out


def markdown(found: list[dict[str, Any]], processes: int) -> str:
    lines = [
        f"| kernel | 1 process, GB/s | of memcpy | {processes} processes, GB/s | of memcpy |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        cells = [f"{row[key][what]:.2f}" for key in ("one", "all") for what in ("gb_per_s", "of_memcpy")]
        lines.append(f"| {' | '.join([row['kernel'], *cells])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, metavar="N", help="default: the cores there are")
    parser.add_argument("--seconds", type=float, default=0.15, metavar="S", help="of a measurement (default: 0.15)")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="only cases with this in the name; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    cases = [c for c in CASES if not args.only or c.name == BASE or any(text in c.name for text in args.only)]
    found = rows(measured(cases, args.rounds, args.processes, args.seconds))
    here = machine(Path.cwd())
    print(f"medians of {args.rounds} rounds\n\n{markdown(found, args.processes)}\n\n{described(here)}")
    if args.json:
        report = {
            "format": FORMAT,
            "rounds": args.rounds,
            "processes": args.processes,
            "machine": here,
            "kernels": found,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
