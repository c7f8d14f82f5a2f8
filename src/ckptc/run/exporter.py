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
from ckptc.ops.nest import Part, restrict_part
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.plan.model import Box, Plan
from ckptc.plan.outputs import INDEX, Exported, Kind, Outputs, Padding, Stored, config_text, header, index
from ckptc.plan.regions import Region, indices, needs, padding_region, place_in, within
from ckptc.run.journal import output_error
from ckptc.run.kernel import Conversion, Kernel, Loop
from ckptc.run.memory import peak_resident_bytes
from ckptc.run.preflight import check_room
from ckptc.run.worker import Bytes, target_loops

Values = npt.NDArray[Any]
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

    Raises InputError: `unknown-source`, `source-changed`, what `find_items` and `CheckpointWriter` raise, what reading
    raises, and `disk-full` or `unwritable-output` when the system refuses to write.
    """
    started = time.perf_counter()
    outputs = plan.outputs
    assert outputs is not None and plan.made.kind == "export"
    items = _find(plan, source)
    check_saved(items, [SourceFile(f.name, f.size, f.header) for f in plan.files])
    copies = _companions(plan, outputs, companions)
    specs = [FileSpec(f.name, f.size, header(outputs.of_file(n), outputs.kinds)) for n, f in enumerate(outputs.files)]
    try:
        with CheckpointWriter(output, specs, force=force) as writer:
            check_room(output, sum(f.size for f in specs))
            writer.create()
            work = Exporter(plan, outputs, open_reader(items), writer)
            for _ in work.tensors(on_step):
                pass
            warnings = [*work.twins(), *work.padding()]
            texts = {INDEX: index(outputs)} if len(outputs.files) > 1 else {}
            writer.commit({**texts, "config.json": config_text(outputs.config)}, copies)
    except OSError as error:
        raise output_error(output, error, again="") from None
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
        self._places = outputs.places()

    @property
    def held_bytes(self) -> int:
        """Bytes of buffers."""
        return self._held.nbytes + self._made.nbytes

    def tensors(self, on_step: Step) -> Iterator[int]:
        """Writes every tensor, batch by batch; yields after each unit."""
        written = 0
        for batch in self.outputs.batches:
            tensors = [self.outputs.tensors[n] for n in batch]
            kind = self.outputs.kinds[tensors[0].kind]
            for box in kind.units():
                for number, values in zip(batch, self._boxes(tensors, kind, box), strict=True):
                    file, begin = self._places[number]
                    self.writer.write_box(file, begin, kind.shape, box, values)
                    written += values.nbytes
                on_step(written, tensors[0].name)
                yield written

    def _boxes(self, tensors: Sequence[Exported], kind: Kind, box: Box) -> Iterator[Values]:
        """The same box of each of some tensors of a kind, from boxes of the stored arrays that are read for all of them
        at once. What is yielded lasts until the next.
        """
        begins = np.array([t.begins for t in tensors], dtype=np.int64)
        regions = dict(needs(kind, begins, box))
        shape = tuple(high - low for low, high in box)
        made = prod(shape) * itemsize(kind.dtype)
        sizes = {s: r.size * itemsize(kind.sources[s].dtype) for s, r in regions.items()}
        self._held = _grown(self._held, sum(sizes.values()))
        held: dict[int, Values] = {}
        used = 0
        for s, r in regions.items():
            source = kind.sources[s]
            held[s] = self._held[used : used + sizes[s]].view(numpy_dtype(source.dtype))
            used += sizes[s]
            self._read(tensors[0].arrays[s], source, r, held[s].reshape(r.shape), self._held.nbytes + made)
        self._made = _grown(self._made, made)
        flat = self._made[:made].view(numpy_dtype(kind.dtype))
        copies = [
            _Copy.of(inside, kind, regions[part.source or 0], shape)
            for part in kind.parts
            for inside in restrict_part(part, box)
        ]
        for tensor in tensors:
            for copy in copies:
                s = copy.source
                start = place_in(copy.base + tensor.begins[s], kind.sources[s].shape, regions[s])
                self.kernel.copy(held[s], start, flat, copy.at, copy.loops, copy.conversion)
            yield flat.reshape(shape)

    def _read(self, tensor: int, stored: Stored, region: Region, out: Values, used: int) -> None:
        path = tuple(self.plan.tensors[tensor].name.split("/"))
        self.reader.read(path, region.axes, stored.chunk, out, max(0, self.plan.choices.memory - used))

    def twins(self) -> Iterator[str]:
        """Compares what arrays say of tensors that another array has given already; says where they differ."""
        numbers = {t.name: n for n, t in enumerate(self.outputs.tensors)} if self.outputs.twins else {}
        differ: dict[str, list[str]] = {}
        for twin in self.outputs.twins:
            kind = self.outputs.kinds[twin.kind]
            file, begin = self._places[numbers[twin.name]]
            for box in kind.units():
                taken = np.empty(tuple(high - low for low, high in box), dtype=numpy_dtype(kind.dtype))
                self.writer.read_box(file, begin, kind.shape, box, taken)
                (values,) = self._boxes([twin], kind, box)
                covered = _covered(kind, box)
                if not np.array_equal(values[covered], taken[covered], equal_nan=True):
                    differ.setdefault(kind.rule, []).append(twin.name)
                    break
        for rule, names in differ.items():
            count = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
            yield f"`{rule}` holds {count} of another array with other values: {names[0]}; the other array's are taken"

    def padding(self) -> Iterator[str]:
        """Looks for values where there should be padding; says how many rows have any."""
        for padding in self.outputs.padding:
            rows = sum(self._trained_rows(padding, *slab) for slab in _slabs(padding, self.plan.choices.memory // 4))
            if rows:
                name = self.plan.tensors[padding.tensor].name
                yield (
                    f"{rows} of the {padding.rows} rows of padding of `{name}` carry trained values (they should be "
                    f"{padding.value:g}): no tensor has a place for them, they are left out"
                )

    def _trained_rows(self, padding: Padding, low: int, high: int) -> int:
        """How many of the rows from `low` up to `high` are not what padding is."""
        axes = list(padding_region(padding).axes)
        at = [indices(a) - a.start for a in padding.axes]
        if axes:
            axes[padding.axis] = (low, 1, high - low)
            own = indices(padding.axes[padding.axis])
            at[padding.axis] = own[(own >= low) & (own < high)] - low
        region = Region(tuple(axes))
        size = region.size * itemsize(padding.array.dtype)
        self._held = _grown(self._held, size)
        values = self._held[:size].view(numpy_dtype(padding.array.dtype)).reshape(region.shape)
        self._read(padding.tensor, padding.array, region, values, self._held.nbytes)
        if any(len(own) < n for own, n in zip(at, region.shape, strict=True)):
            values = values[np.ix_(*at)]  # padding between other rows
        wrong = values != np.asarray(padding.value).astype(values.dtype)
        others = tuple(a for a in range(wrong.ndim) if a != padding.axis)
        return int(np.count_nonzero(wrong.any(axis=others))) if wrong.ndim else int(wrong)


@dataclass(frozen=True, slots=True)
class _Copy:
    """What is copied, of one part of a kind, into a box: the same for all tensors but for where it begins."""

    source: int
    base: int  # counted from where the tensor begins in the stored array
    loops: list[Loop]
    at: int  # first element in the box
    conversion: Conversion

    @staticmethod
    def of(part: Part, kind: Kind, region: Region, shape: tuple[int, ...]) -> _Copy:
        source = part.source or 0
        stored = kind.sources[source]
        loops, at = target_loops(within(replace(part, base=0), stored.shape, region), shape)
        return _Copy(source, part.base, loops, at, Conversion(stored.dtype, kind.dtype, part.math))


def _slabs(padding: Padding, most: int) -> Iterator[tuple[int, int]]:
    """Rows of the array that hold all of the padding's, in slabs of at most `most` bytes or a row."""
    if not padding.axes:
        yield 0, 1
        return
    region = padding_region(padding)
    low, _, count = region.axes[padding.axis]
    row = region.size // count * itemsize(padding.array.dtype)
    step = max(1, most // row)
    for at in range(low, low + count, step):
        yield at, min(at + step, low + count)


def _covered(kind: Kind, box: Box) -> npt.NDArray[np.bool_]:
    """Which elements of a box the kind's parts speak of."""
    shape = tuple(high - low for low, high in box)
    out = np.zeros(prod(shape), dtype=np.bool_)
    for part in kind.parts:
        for inside in restrict_part(part, box):
            loops, at = target_loops(replace(inside, base=0), shape)
            places = np.array([at])
            for loop in loops:
                places = (places[:, None] + np.arange(loop.size) * loop.target).ravel()
            out[places] = True
    return out.reshape(shape)


def _grown(buffer: Bytes, size: int) -> Bytes:
    return buffer if buffer.size >= size else np.empty(size, dtype=np.uint8)
