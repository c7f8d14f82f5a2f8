"""Boxes of a plan's outputs, made into memory of this process: what device arrays are filled from.

Threads make them, one unit of the plan at a time: reads, and the kernel's copies of large blocks, run outside of Python's
lock, and a process that has JAX cannot be forked. What a unit has for several boxes is read once where they cover what
is read of it; otherwise each box reads its own, so that no more is read than the boxes need and the reads' gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from math import prod
from threading import Event, Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import fail
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.plan.model import Box, Plan
from ckptc.plan.order import Unit, forwards
from ckptc.run.readers import Place, Readers
from ckptc.run.work import Progress, worker_bytes
from ckptc.run.worker import Worker

ALIGN = 64  # bytes: JAX's CPU devices take memory aligned so as it is

Values = npt.NDArray[Any]
Done = Callable[[int, Box, Values], None]


def allocate(shape: Sequence[int], dtype: str) -> Values:
    """An array whose memory begins at a multiple of ALIGN. Nothing is written to it: pages come as they are filled."""
    size = prod(shape) * itemsize(dtype)
    raw = np.empty(size + ALIGN, dtype=np.uint8)
    begin = -raw.ctypes.data % ALIGN
    return raw[begin : begin + size].view(numpy_dtype(dtype)).reshape(shape)


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    both = tuple((max(x, u), min(y, v)) for (x, y), (u, v) in zip(a, b, strict=True))
    return both if all(low < high for low, high in both) else None


def _size(box: Box) -> int:
    return prod(high - low for low, high in box)


def read_together(boxes: Sequence[Box]) -> Iterator[tuple[Box, list[int]]]:
    """What is read at once, and which of some boxes without common elements are made from it: all from the smallest box
    that holds them, where nothing of it is left over."""
    if not boxes:
        return
    around = tuple((min(low for low, _ in axis), max(high for _, high in axis)) for axis in zip(*boxes, strict=True))
    if _size(around) == sum(map(_size, boxes)):
        yield around, list(range(len(boxes)))
    else:
        yield from ((box, [n]) for n, box in enumerate(boxes))


@dataclass
class _Wanted:
    """A box that is being made."""

    box: Box
    left: int = 0  # units that have still to add to it
    values: Values | None = None
    lock: Lock = field(default_factory=Lock)


class Filling:
    """Makes some boxes of outputs. `wanted`: by the output's position in the plan, boxes without common elements."""

    def __init__(self, plan: Plan, place: Place, wanted: Mapping[int, Sequence[Box]], done: Done, jobs: int) -> None:
        self.plan, self.place, self.done = plan, place, done
        self.wanted = {n: [_Wanted(box) for box in boxes] for n, boxes in wanted.items()}
        self.units: list[Unit] = []
        for unit in forwards(plan):
            touched = [w for n in unit.outputs for w in self.wanted.get(n, ()) if intersection(unit.box, w.box)]
            if touched:
                self.units.append(unit)
            for w in touched:
                w.left += 1
        self.total = sum(
            _size(w.box) * itemsize(plan.arrays[n].dtype) for n, boxes in self.wanted.items() for w in boxes
        )
        held = worker_bytes(plan.totals.peak_memory_bytes)
        self.jobs = max(1, min(jobs, plan.choices.memory // max(1, held), len(self.units)))
        self.read = self.made = 0
        self._lock, self._failed = Lock(), Event()

    def run(self, on_progress: Callable[[Progress], None] = lambda _: None) -> int:
        """Makes every box, and hands each to `done` as soon as it is whole, from whichever thread. Returns the bytes read.

        Raises what a thread raised first, once all have stopped; no box is handed over after that.
        """
        units = iter(self.units)
        with ThreadPoolExecutor(self.jobs, "load") as pool:
            threads = [pool.submit(self._work, units, on_progress) for _ in range(self.jobs)]
            try:
                wait(threads, return_when=FIRST_EXCEPTION)
            finally:
                self._failed.set()
        for thread in threads:
            thread.result()
        return self.read

    def _take(self, units: Iterator[Unit]) -> Unit | None:
        with self._lock:
            return None if self._failed.is_set() else next(units, None)

    def _work(self, units: Iterator[Unit], on_progress: Callable[[Progress], None]) -> None:
        try:
            with Readers.of(self.plan, [self.place]) as readers:
                worker, read = Worker(self.plan, readers, lambda *_: None, lambda: None), 0
                while (unit := self._take(units)) is not None:
                    made = sum(self._make(worker, n, unit.box) for n in unit.outputs)
                    with self._lock:
                        self.made += made
                        self.read += readers.bytes_read - read
                        read = readers.bytes_read
                        if not self._failed.is_set():
                            on_progress(Progress(self.made, self.total, self.plan.outputs[unit.outputs[0]].name))
        except MemoryError:
            self._failed.set()
            help = "use less `memory`, or fewer `jobs`, or load for fewer devices"
            raise fail("out-of-memory", "the system has no more memory for these arrays", help=help) from None
        except BaseException:
            self._failed.set()
            raise

    def _make(self, worker: Worker, number: int, unit: Box) -> int:
        """Makes what a unit has for the boxes of an output. Returns the bytes made."""
        dtype = self.plan.arrays[number].dtype
        found = [(w, common) for w in self.wanted.get(number, ()) if (common := intersection(unit, w.box))]
        for around, members in read_together([common for _, common in found]):
            targets = []
            for w, common in (found[m] for m in members):
                with w.lock:
                    if w.values is None:
                        w.values = allocate([high - low for low, high in w.box], dtype)
                targets.append((common, w.box, w.values))
            worker.fill(number, around, targets)
        for w, _ in found:
            with w.lock:
                w.left -= 1
                values, w.values = w.values, None if w.left == 0 else w.values
                whole = w.left == 0 and not self._failed.is_set()
            if whole:
                assert values is not None
                self.done(number, w.box, values)
        return sum(_size(common) for _, common in found) * itemsize(dtype)
