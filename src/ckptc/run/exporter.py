"""Running an export's plan: chunks of stored arrays are read once for all the tensors of a batch, and each tensor's
box is written in place.

A batch is several tensors that lie in the same chunks. For each of its units, what all of them need of each stored
array is read as one box; from it each tensor's own box is copied, with arithmetic, into one buffer, and written where
the plan says it belongs in the output. Buffers are as large as the plan's largest unit needs and are reused; besides
there are the chunks being decoded, and the kernel's scratch.

After the tensors, what no tensor has a place for is looked at: padding that training has changed is counted, and where
arrays hold a tensor twice, the second is compared with the one that was taken. Neither stops an export; both are said
in its report.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import fail
from ckptc.io.locate import recall
from ckptc.io.orbax_reader import ArrayReader, check_saved, find_items, open_reader
from ckptc.io.original import identify
from ckptc.io.safetensors_writer import CheckpointWriter, FileSpec
from ckptc.ir.source import SourceFile
from ckptc.ops.nest import restrict_part
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.plan.model import Array, Box, Plan
from ckptc.plan.outputs import INDEX, Outputs, Padding, config_text, header, index
from ckptc.plan.regions import Numbers, Region, bases, needs, within
from ckptc.run.kernel import Conversion, Kernel
from ckptc.run.memory import peak_resident_bytes
from ckptc.run.worker import Bytes, target_loops

Step = Callable[[int, str], None]  # bytes written so far, the tensor being made


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did."""

    output: str
    read_bytes: int  # of decoded chunks
    write_bytes: int
    seconds: float
    peak_resident_bytes: int
    warnings: tuple[str, ...]


def export(
    plan: Plan,
    output: Path,
    source: Path | None = None,
    companions: Path | None = None,
    on_step: Step = lambda *_: None,
    force: bool = False,
) -> ExportReport:
    """Executes exactly the plan, into `output`. `companions`: the directory with the files to copy, if there are any.

    Raises InputError: `unknown-source`, `source-changed`, what `find_items` and `CheckpointWriter` raise, and what
    reading raises.
    """
    started = time.perf_counter()
    outputs = plan.outputs
    assert outputs is not None and plan.made.kind == "export"
    items = _find(plan, source)
    check_saved(items, [SourceFile(f.name, f.size, f.header) for f in plan.files])
    copies = _companions(plan, outputs, companions)
    specs = [FileSpec(f.name, f.size, header(plan.arrays[f.first : f.first + len(f.begins)])) for f in outputs.files]
    with CheckpointWriter(output, specs, force=force) as writer:
        work = Exporter(plan, outputs, open_reader(items), writer)
        for _ in work.tensors(on_step):
            pass
        warnings = [*work.twins(), *work.padding()]
        texts = {INDEX: index(outputs.files, plan.arrays)} if len(outputs.files) > 1 else {}
        writer.commit({**texts, "config.json": config_text(outputs.config)}, copies)
    seconds = time.perf_counter() - started
    return ExportReport(
        str(output), work.reader.bytes_read, plan.totals.write_bytes, seconds, peak_resident_bytes(), tuple(warnings)
    )


def _find(plan: Plan, source: Path | None) -> Path:
    if source is None:
        source = recall(plan.made.source or "")
    if source is None:
        raise fail(
            "unknown-source",
            "where the plan's checkpoint lies is not known on this machine",
            help="say it with `--source DIR`",
        )
    return find_items(source)


def companions_digest(outputs: Outputs) -> str:
    """By which a machine remembers where the files to copy lie."""
    return "companions " + " ".join(f.header for f in outputs.companions)


def _companions(plan: Plan, outputs: Outputs, directory: Path | None) -> dict[str, Path]:
    """The files to copy. Raises `unknown-source` or `source-changed`."""
    if not outputs.companions:
        return {}
    directory = directory or recall(companions_digest(outputs))
    if directory is None:
        raise fail(
            "unknown-source",
            f"where the original's files lie is not known on this machine: {outputs.companions[0].name} and others",
            help="say it with `--config-from DIR`",
        )
    for file in outputs.companions:
        if identify(directory, file.name) != SourceFile(file.name, file.size, file.header):
            raise fail(
                "source-changed", f"`{file.name}` is not the file the plan was made from", help="compile the plan again"
            )
    return {file.name: directory / file.name for file in outputs.companions}


class Exporter:
    """Makes the tensors of one plan. Not for several threads."""

    def __init__(self, plan: Plan, outputs: Outputs, reader: ArrayReader, writer: CheckpointWriter) -> None:
        self.plan, self.outputs, self.reader, self.writer = plan, outputs, reader, writer
        self.kernel = Kernel()
        self._held = np.empty(0, dtype=np.uint8)  # boxes of stored arrays
        self._made = np.empty(0, dtype=np.uint8)  # a box of one tensor
        self._firsts = [f.first for f in outputs.files]

    @property
    def held_bytes(self) -> int:
        """Bytes of buffers."""
        return self._held.nbytes + self._made.nbytes

    def tensors(self, on_step: Step) -> Iterator[int]:
        """Writes every tensor, batch by batch; yields after each unit."""
        written = 0
        for batch in self.outputs.batches:
            arrays = [self.plan.arrays[n] for n in batch]
            begins = bases(arrays)
            for box in arrays[0].units():
                for number, array, values in self._boxes(batch, arrays, begins, box):
                    file, begin = self.place(number)
                    self.writer.write_box(file, begin, array.shape, box, values)
                    written += values.nbytes
                on_step(written, arrays[0].name)
                yield written

    def place(self, number: int) -> tuple[int, int]:
        """The file of an array, and the byte where it begins there."""
        file = bisect_right(self._firsts, number) - 1
        return file, self.outputs.files[file].begins[number - self._firsts[file]]

    def _boxes(
        self, numbers: Sequence[int], arrays: Sequence[Array], begins: Numbers, box: Box
    ) -> Iterator[tuple[int, Array, npt.NDArray[Any]]]:
        """The same box of each of some alike arrays, from boxes of the stored arrays that are read for all of them at
        once.
        """
        sources = arrays[0].sources
        regions = dict(needs(arrays[0], begins, box, [s.shape for s in sources]))
        held: dict[int, npt.NDArray[Any]] = {}
        self._held = _grown(self._held, sum(_nbytes(r, sources[s].dtype) for s, r in regions.items()))
        used = 0
        made = prod(high - low for low, high in box) * itemsize(arrays[0].dtype)
        for s, r in regions.items():
            size = _nbytes(r, sources[s].dtype)
            held[s] = self._held[used : used + size].view(numpy_dtype(sources[s].dtype))
            used += size
            self._read(sources[s].tensors[0], r, held[s].reshape(r.shape), self._held.nbytes + made)
        self._made = _grown(self._made, made)
        flat = self._made[:made].view(numpy_dtype(arrays[0].dtype))
        shape = tuple(high - low for low, high in box)
        for number, array in zip(numbers, arrays, strict=True):
            for part in array.parts:
                s = part.source or 0
                for inside in restrict_part(part, box):
                    local = within(inside, sources[s].shape, regions[s])
                    loops, at = target_loops(local, shape)
                    conversion = Conversion(sources[s].dtype, array.dtype, part.math)
                    self.kernel.copy(held[s], local.base, flat, at, loops, conversion)
            yield number, array, flat.reshape(shape)

    def _read(self, tensor: int, region: Region, out: npt.NDArray[Any], used: int) -> None:
        path = tuple(self.plan.tensors[tensor].name.split("/"))
        self.reader.read(path, region.axes, self.outputs.chunks[tensor], out, max(0, self.plan.choices.memory - used))

    def twins(self) -> Iterator[str]:
        """Compares what arrays say of tensors that another array has given already; says where they differ."""
        numbers = {a.name: n for n, a in enumerate(self.plan.arrays)}
        differ: dict[str, list[str]] = {}
        for twin in self.outputs.twins:
            number = numbers[twin.name]
            file, begin = self.place(number)
            for box in twin.units():
                shape = tuple(high - low for low, high in box)
                taken = np.empty(shape, dtype=numpy_dtype(twin.dtype))
                self.writer.read_box(file, begin, twin.shape, box, taken)
                ((_, _, values),) = self._boxes([number], [twin], bases([twin]), box)
                covered = _covered(twin, box)
                if not np.array_equal(values[covered], taken[covered], equal_nan=True):
                    differ.setdefault(twin.rule, []).append(twin.name)
                    break
        for rule, names in differ.items():
            count = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
            yield f"`{rule}` holds {count} of another array with other values: {names[0]}; the other array's are taken"

    def padding(self) -> Iterator[str]:
        """Looks for values where there should be padding; says how many rows have any."""
        for padding in self.outputs.padding:
            rows = sum(
                self._trained_rows(padding, low, high) for low, high in _slabs(padding, self.plan.choices.memory // 4)
            )
            low, high = padding.box[padding.axis] if padding.box else (0, 1)
            if rows:
                name = self.plan.tensors[padding.tensor].name
                yield (
                    f"{rows} of the {high - low} rows of padding of `{name}` carry trained values (they should be "
                    f"{padding.value:g}): no tensor has a place for them, they are left out"
                )

    def _trained_rows(self, padding: Padding, low: int, high: int) -> int:
        axes = [(a, 1, b - a) for a, b in padding.box]
        if axes:
            axes[padding.axis] = (low, 1, high - low)
        region = Region(tuple(axes))
        size = _nbytes(region, padding.dtype)
        self._held = _grown(self._held, size)
        values = self._held[:size].view(numpy_dtype(padding.dtype)).reshape(region.shape)
        self._read(padding.tensor, region, values, self._held.nbytes)
        wrong = values != np.asarray(padding.value).astype(values.dtype)
        others = tuple(a for a in range(wrong.ndim) if a != padding.axis)
        return int(np.count_nonzero(wrong.any(axis=others))) if wrong.ndim else int(wrong)


def _slabs(padding: Padding, most: int) -> Iterator[tuple[int, int]]:
    """The padding's rows, in slabs of at most `most` bytes or a row."""
    if not padding.box:
        yield 0, 1
        return
    low, high = padding.box[padding.axis]
    row = prod(b - a for a, b in padding.box) // (high - low) * itemsize(padding.dtype)
    step = max(1, most // row)
    for at in range(low, high, step):
        yield at, min(at + step, high)


def _covered(array: Array, box: Box) -> npt.NDArray[np.bool_]:
    """Which elements of a box the array's parts speak of."""
    shape = tuple(high - low for low, high in box)
    out = np.zeros(prod(shape), dtype=np.bool_)
    for part in array.parts:
        for inside in restrict_part(part, box):
            loops, at = target_loops(replace(inside, base=0), shape)
            places = np.array([at])
            for loop in loops:
                places = (places[:, None] + np.arange(loop.size) * loop.target).ravel()
            out[places] = True
    return out.reshape(shape)


def _nbytes(region: Region, dtype: str) -> int:
    return region.size * itemsize(dtype)


def _grown(buffer: Bytes, size: int) -> Bytes:
    return buffer if buffer.size >= size else np.empty(size, dtype=np.uint8)
