"""The way back: a mapping, a model and an Orbax checkpoint's metadata become the plan of an export. Pure; no I/O.

    reading (dims, expand, match) -> fold -> invert -> rounding -> units -> lay_out

The rules are those of a conversion, read the other way: what they say of the forward direction is all that is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as MappingOf
from dataclasses import replace
from typing import Any

import ckptc
from ckptc.compile.assemble import sha256
from ckptc.compile.config import adapt
from ckptc.compile.fold import fold
from ckptc.compile.invert import Constant, Inverted, Piece, invert
from ckptc.compile.match import problems
from ckptc.compile.reading import SCALES, ExportOptions, Reading, most, read
from ckptc.compile.rounding import exactness, invert_math, worst
from ckptc.compile.units import Stored, schedule
from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.saved import Original, Saved, SavedArray
from ckptc.ops.nest import AxisMap, Part
from ckptc.ops.types import is_float
from ckptc.plan import model as plan
from ckptc.plan.outputs import Outputs, Padding, lay_out
from ckptc.spec.mapping import Mapping, Model

EIGHT_BITS = "float8"
PLAIN = ("bfloat16", "float16", "float32")  # dtypes that weights are published in as they are


def compile_export(
    mapping: Mapping, model: Model, options: ExportOptions, saved: Saved, original: Original | None = None
) -> plan.Plan:
    """The plan. Raises InputError with everything that is wrong, found before an array is read."""
    config = original.config if original and original.config else model.config
    found = read(mapping, model, options, saved, original, config)
    wrong = problems(found.graph, found.matched, options.multimodal if mapping.multimodal else None)
    if wrong:
        raise InputError(dict.fromkeys(wrong))
    return _Export(mapping, model, options, saved, original, config, found).records()


class _Export:
    """The records of a plan, from a graph whose arrays are all there."""

    def __init__(
        self,
        mapping: Mapping,
        model: Model,
        options: ExportOptions,
        saved: Saved,
        original: Original | None,
        config: MappingOf[str, Any],
        read: Reading,
    ) -> None:
        self.mapping, self.model, self.options = mapping, model, options
        self.saved, self.original, self.config, self.read = saved, original, config, read
        self.targets = read.graph.targets
        self.stored = [read.matched.arrays[t.path] for t in self.targets]
        self.cut: dict[str, tuple[int, int]] = {}
        self.problems: list[Diagnostic] = []
        self.decoded: dict[str, int] = {}
        self.codes: set[str] = set()  # tensors of codes, and their scales, that the checkpoint itself holds

    def records(self) -> plan.Plan:
        tensors, constants = invert(self.read.graph, fold(self.read.graph))
        for name in (n for n in tensors if f"{n}{SCALES}" in tensors):
            if self.stored[tensors[name].pieces[0].template.target].dtype.startswith(EIGHT_BITS):
                self.codes |= {name, f"{name}{SCALES}"}
        arrays, twins = [], []
        for name in sorted(tensors, key=_naturally):
            arrays.append(self._tensor(tensors[name]))
            twins += [self._twin(tensors[name], arrays[-1], piece) for piece in tensors[name].twins]
        if self.problems:
            raise InputError(dict.fromkeys(self.problems))
        ordered, files = lay_out(arrays, self.options.max_shard)
        chunks = [Stored(a.shape, a.dtype, a.chunk) for a in self.stored]
        done = schedule(ordered, chunks, self.options.memory)
        compared = schedule(twins, chunks, self.options.memory) if twins else None
        padding = tuple(self._padding(c) for c in constants)
        padded = sum(self._padding_bytes(p) for p in padding)
        rows = tuple(plan.Tensor(a.name, 0, 0, a.nbytes) for a in self.stored)
        config, notes = self._config(ordered, bool(twins))
        return plan.Plan(
            made=self._made(),
            choices=self._choices(ordered),
            files=tuple(plan.File(f.name, f.size, f.header_digest) for f in self.saved.files),
            tensors=rows,
            arrays=done.arrays,
            left_out=self._left_out(),
            totals=plan.Totals(
                arrays=len(ordered),
                tensors=len(rows),
                parameters=sum(a.size for a in ordered),
                read_bytes=done.read_bytes + (compared.read_bytes if compared else 0) + padded,
                write_bytes=sum(a.nbytes for a in ordered),
                peak_memory_bytes=max(done.peak, compared.peak if compared else 0),
            ),
            outputs=Outputs(
                files=files,
                batches=done.batches,
                config=config,
                companions=tuple(
                    plan.File(f.name, f.size, f.header_digest)
                    for f in (self.original.companions if self.original else ())
                ),
                padding=padding,
                twins=compared.arrays if compared else (),
                chunks={n: a.chunk for n, a in enumerate(self.stored)},
                notes=tuple(notes),
            ),
        )

    def _made(self) -> plan.Made:
        digest = sha256("\n".join(f"{f.name} {f.size} {f.header_digest}" for f in self.saved.files).encode())
        return plan.Made(
            ckptc=ckptc.__version__,
            model=self.model.name,
            family=self.mapping.family,
            repo=self.model.repo,
            mapping=sha256(self.mapping.document.text.encode()),
            source=digest,
            kind="export",
        )

    def _choices(self, arrays: tuple[plan.Array, ...]) -> plan.Choices:
        return plan.Choices(
            layout=self.read.layout,
            dtype=most(arrays),
            multimodal=self.options.multimodal,
            shards=1,
            memory=self.options.memory,
            naming=self.read.naming,
            dims=tuple((n, v) for n, v in self.read.dims.items() if not isinstance(v, MappingOf)),
        )

    def _dtype(self, tensor: Inverted) -> str:
        """What a tensor is written as."""
        leaf, stored = tensor.leaf, self.stored[tensor.pieces[0].template.target].dtype
        known = self.original.dtypes.get(tensor.name) if self.original and self.original.dtypes else None
        default = str(self.config.get("torch_dtype") or self.config.get("dtype") or "bfloat16")
        default = default if default in PLAIN else "bfloat16"
        if leaf.decoded:
            self.decoded[leaf.decoded.stored.dtype] = self.decoded.get(leaf.decoded.stored.dtype, 0) + 1
            return self.options.dtype or default
        if known is not None and not is_float(known):
            return known
        if not is_float(stored) or tensor.name in self.codes:
            return stored
        return self.options.dtype or known or default

    def _tensor(self, tensor: Inverted) -> plan.Array:
        dtype = self._dtype(tensor)
        shape = self._shape(tensor)
        sources, parts = self._parts(tensor.pieces, dtype)
        targets = {p.template.target: None for p in tensor.pieces}
        first = self.targets[next(iter(targets))]
        exact = worst(
            exactness(p.template.math, self.stored[p.template.target].dtype, dtype) for p in _once(tensor.pieces)
        )
        return plan.Array(
            path=tuple(tensor.name.split("/")),
            shape=shape,
            dtype=dtype,
            chunk=shape,
            unit=shape,
            shards=(1,) * len(shape),
            axes=(None,) * len(shape),
            rule=" + ".join(dict.fromkeys(self.targets[t].rule for t in targets)),
            ops=tuple(f"undo {step}" for step in reversed(first.steps)),
            sources=sources,
            parts=parts,
            exactness=exact,
        )

    def _twin(self, tensor: Inverted, array: plan.Array, piece: Piece) -> plan.Array:
        sources, parts = self._parts([piece], array.dtype)
        return replace(array, sources=sources, parts=parts, rule=self.targets[piece.template.target].rule)

    def _parts(self, pieces: list[Piece], dtype: str) -> tuple[tuple[plan.Source, ...], tuple[Part, ...]]:
        positions = list(dict.fromkeys(p.template.target for p in pieces))
        sources = tuple(plan.Source(self.stored[n].dtype, self.stored[n].shape, (n,)) for n in positions)
        parts = tuple(
            replace(
                part,
                source=positions.index(piece.template.target),
                base=part.base + piece.offset,
                math=invert_math(piece.template.math, dtype),
            )
            for piece in pieces
            for part in piece.template.parts
        )
        return sources, parts

    def _shape(self, tensor: Inverted) -> tuple[int, ...]:
        """The tensor's own shape, or the rows there are where some are nowhere."""
        each = tensor.leaf.each
        covered = sum(p.template.size for p in tensor.pieces)
        if covered == each.size:
            return each.shape
        parts = [part for p in tensor.pieces for part in p.template.parts]
        extents = tuple(max(part.axes[a].stop for part in parts) for a in range(len(each.axes)))
        size = 1
        for n in extents:
            size *= n
        if not tensor.partial or size != covered:
            self.problems.append(
                Diagnostic(
                    "partly-covered-tensor",
                    f"the arrays hold {covered} of the {each.size} elements of `{tensor.name}`",
                    tensor.leaf.span,
                    (f"reason: {tensor.partial}",) if tensor.partial else (),
                    "another rule should hold the rest",
                )
            )
            return each.shape
        for axis, n in zip(each.axes, extents, strict=True):
            if axis.size != n:
                self.cut[axis.name] = (axis.size, n)
        return extents

    def _padding(self, constant: Constant) -> Padding:
        stored = self.stored[constant.target]
        box = tuple((a.start, a.stop) for a in constant.part.axes)
        assert all(_contiguous(a) for a in constant.part.axes), "a constant is a box"
        partly = [n for n, ((low, high), size) in enumerate(zip(box, stored.shape, strict=True)) if high - low < size]
        value = constant.part.value
        for step, operand in constant.part.math:
            value = value * float(operand) if step == "scale" else value + float(operand) if step == "add" else value
        return Padding(constant.target, stored.shape, stored.dtype, box, partly[0] if partly else 0, value)

    def _padding_bytes(self, padding: Padding) -> int:
        chunk = self.stored[padding.tensor].chunk
        out = self.stored[padding.tensor].nbytes
        for (low, high), c, n in zip(padding.box, chunk, padding.shape, strict=True):
            out = out // n * (min(-(-high // c) * c, n) - low // c * c)
        return out

    def _left_out(self) -> tuple[plan.LeftOut, ...]:
        out = []
        if self.saved.optimizer:
            out.append(
                plan.LeftOut("opt_state/*", "the optimizer's state is no part of a model", self.saved.optimizer, 0)
            )
        passed = [a for a in self.read.matched.passed if a.path != ("step",)]
        if passed:
            reason = "counters and states of random numbers are no parameters"
            out.append(plan.LeftOut(_shown(passed), reason, len(passed), sum(a.nbytes for a in passed)))
        out += [plan.LeftOut(i.shown, i.reason, 0, 0) for i in self.read.graph.ignored]
        return tuple(out)

    def _config(self, arrays: tuple[plan.Array, ...], twins: bool) -> tuple[dict[str, Any], list[str]]:
        notes = []
        if self.saved.place:
            notes.append(f"reads {self.saved.place}")
        for dtype, count in self.decoded.items():
            notes.append(
                f"{count} tensors that the original stores as {dtype} with scales are written as plain numbers"
            )
        if twins:
            notes.append(
                "some tensors are stored twice: the first array, by path, is taken, and a run compares the others"
            )
        whole = bool(self.original and self.original.config)
        if self.codes:
            notes.append(f"{len(self.codes)} tensors are codes and their scales, as the checkpoint holds them")
        dtype = most([a for a in arrays if is_float(a.dtype) and not a.dtype.startswith(EIGHT_BITS)])
        config, changed = adapt(self.config, self.mapping, self.read.dims, self.cut, dtype, whole, bool(self.codes))
        for name, (was, now) in self.cut.items():
            reasons = {t.partial for t in self.targets if t.partial}
            notes.append(
                f"{was - now} of {was} rows of `{name}` are not written: {'; '.join(sorted(filter(None, reasons)))}"
            )
        return config, notes + changed


def _once(pieces: list[Piece]) -> list[Piece]:
    return list({id(p.template): p for p in pieces}.values())


def _contiguous(axis: AxisMap) -> bool:
    return axis.size == axis.stop - axis.start


def _shown(arrays: list[SavedArray]) -> str:
    return arrays[0].name if len(arrays) == 1 else f"{arrays[0].name}, …"


def _naturally(name: str) -> tuple[tuple[int, int | str], ...]:
    """Names in the order of their numbers: layer 2 before layer 10."""
    return tuple((0, int(x)) if x.isdigit() else (1, x) for x in re.split(r"(\d+)", name) if x)
