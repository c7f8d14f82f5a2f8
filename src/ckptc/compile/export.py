"""The way back: a mapping, a model and an Orbax checkpoint's metadata become the plan of an export. Pure; no I/O.

    reading (dims, expand, match) -> fold -> invert -> rounding -> units -> lay_out

The rules are those of a conversion, read the other way: what they say of the forward direction is all that is known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from msgspec.structs import replace

import ckptc
from ckptc.compile.assemble import sha256
from ckptc.compile.config import adapt
from ckptc.compile.fill import copies, is_copy, left_in, schedule_both, source_of, towers_left_out
from ckptc.compile.fold import fold
from ckptc.compile.invert import Constant, Inverted, Piece, invert
from ckptc.compile.match import SHOWN, problems
from ckptc.compile.quantised import plain
from ckptc.compile.reading import SCALES, ExportOptions, Reading, read
from ckptc.compile.rounding import exactness, invert_math, worst
from ckptc.compile.units import schedule
from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ir.graph import Graph
from ckptc.ir.saved import Original, Saved, SavedArray
from ckptc.ir.source import Checkpoint, SourceFile, stated_dtype
from ckptc.ops.types import is_float
from ckptc.plan import model as plan
from ckptc.plan.files import lay_out
from ckptc.plan.model import Kind, Output, Padding, Stored
from ckptc.plan.regions import padding_bytes
from ckptc.spec.mapping import Family, Model
from ckptc.spec.target import target_tree

EIGHT_BITS = "float8"
RANDOM = "random weights: "  # begins a note that is a warning


def compile_export(
    mapping: Family,
    model: Model,
    options: ExportOptions,
    saved: Saved,
    original: Original | None = None,
    fill: Checkpoint | None = None,
) -> plan.Plan:
    """The plan. `fill`: a checkpoint whose tensors are copied where the target has no place for them.

    Raises InputError with everything that is wrong, found before an array is read.
    """
    _require_parameters(saved)
    config = original.config if original and original.config else model.config
    original, decoded = plain(original)
    found = read(mapping, model, options, saved, original, config)
    wrong = problems(found.graph, found.matched, options.multimodal if mapping.multimodal else None)
    if wrong:
        raise InputError(dict.fromkeys(wrong))
    return _Export(mapping, model, options, saved, original, config, found, decoded, fill).records()


def _require_parameters(saved: Saved) -> None:
    """Raises `no-parameters`: no array is of floating numbers, as when a run saved its step alone."""
    if any(is_float(a.dtype) for a in saved.arrays):
        return
    names = [f"`{a.name}` {a.dtype}{list(a.shape)}" for a in saved.arrays[:SHOWN]]
    more = len(saved.arrays) - len(names)
    holds = ", ".join(names) + (f" and {more} more" if more else "") if names else "no array"
    state = f", and {saved.optimizer} arrays of the optimizer's state" if saved.optimizer else ""
    help = "give a checkpoint that holds the weights; a LoRA run may save its step alone, and the base model's weights lie where it began"
    raise fail("no-parameters", "the checkpoint holds no parameters", notes=(f"it holds: {holds}{state}",), help=help)


class _Export:
    """The records of a plan, from a graph whose arrays are all there."""

    def __init__(
        self,
        mapping: Family,
        model: Model,
        options: ExportOptions,
        saved: Saved,
        original: Original | None,
        config: Mapping[str, Any],
        read: Reading,
        decoded: list[tuple[str, int]],
        fill: Checkpoint | None,
    ) -> None:
        self.mapping, self.model, self.options = mapping, model, options
        self.saved, self.original, self.config, self.read = saved, original, config, read
        pairs = read.matched.pairs(read.graph)
        self.targets = tuple(target for target, _ in pairs)
        self.stored = [array for _, array in pairs]
        self.alike = [Stored(a.dtype, a.shape, chunk=a.chunk) for a in self.stored]
        self.cut: dict[str, tuple[int, int]] = {}
        self.problems: list[Diagnostic] = []
        self.decoded, self.fill = decoded, fill
        self.codes: set[str] = set()  # tensors of codes, and their scales, that the checkpoint itself holds
        self.kinds: dict[Kind, int] = {}
        self.known: dict[object, tuple[int, tuple[tuple[int, int, int], ...]]] = {}  # kind and places, by pieces

    def records(self) -> plan.Plan:
        graph = Graph(self.targets, self.read.graph.ignored)
        tensors, constants = invert(graph, fold(graph))
        for name in (n for n in tensors if f"{n}{SCALES}" in tensors):
            if self.stored[tensors[name].pieces[0].template.target].dtype.startswith(EIGHT_BITS):
                self.codes |= {name, f"{name}{SCALES}"}
        exported, twins = [], []
        for name in sorted(tensors, key=_naturally):
            tensor, dtype = tensors[name], self._dtype(tensors[name])
            exported.append(self._exported(tensor, tensor.pieces, dtype))
            twins += [self._exported(tensor, [piece], dtype, self._shape(tensor)) for piece in tensor.twins]
        if self.problems:
            raise InputError(dict.fromkeys(self.problems))
        copied, copied_rows = self._copied(tensors)
        kinds = tuple(self.kinds)
        ordered, files = lay_out(exported + copied, kinds, self.options.max_shard)
        done = schedule_both(kinds, ordered, self.options.memory)
        compared = [schedule(kinds, [twin], self.options.memory) for twin in twins]  # a run compares one at a time
        made = tuple(dict.fromkeys((*done.kinds, *(kind for c in compared for kind in c.kinds))))
        padding = tuple(self._padding(c) for c in constants)
        rows = (*(plan.Tensor(a.name, -1, 0, a.nbytes) for a in self.stored), *copied_rows)
        counts = Counter(made[t.kind] for t in done.tensors)
        config, notes = self._config(counts, bool(twins))
        notes += self._filling(sum(is_copy(made[t.kind]) for t in done.tensors))
        return plan.Plan(
            made=plan.Made(
                ckptc=ckptc.__version__,
                model=self.model.name,
                family=self.mapping.family,
                repo=self.model.repo,
                mapping=sha256(self.mapping.document.text.encode()),
            ),
            choices=self._choices(counts),
            totals=plan.Totals(
                arrays=len(ordered),
                tensors=len(rows),
                parameters=sum(k.size * n for k, n in counts.items()),
                read_bytes=done.read_bytes + sum(c.read_bytes for c in compared) + sum(map(padding_bytes, padding)),
                write_bytes=sum(k.nbytes * n for k, n in counts.items()),
                peak_memory_bytes=max(done.peak, *(c.peak for c in compared), 0),
            ),
            sources=(self._source(), *((source_of(self.fill),) if self.fill and copied else ())),
            layout=plan.Safetensors(
                files=files,
                config=config,
                companions=_files(self.original.companions if self.original else ()),
            ),
            left_out=self._left_out(),
            kinds=made,
            outputs=done.tensors,
            tensors=rows,
            batches=done.batches,
            padding=padding,
            twins=tuple(replace(t, kind=made.index(c.kinds[t.kind])) for c in compared for t in c.tensors),
            notes=tuple(notes),
        )

    def _copied(self, made: Mapping[str, Inverted]) -> tuple[list[Output], list[plan.Tensor]]:
        """What is copied from the original."""
        if self.fill is None:
            return [], []
        logical = self.original.dtypes if self.decoded and self.original else None
        tied = bool(
            self.config.get(
                "tie_word_embeddings", (self.config.get("text_config") or {}).get("tie_word_embeddings", False)
            )
        )
        return copies(left_in(self.fill, made, tied, logical), len(self.stored), self.kinds)

    def _source(self) -> plan.Source:
        digest = sha256(
            "\n".join(f"{f.name} {f.size} {f.header_digest} {f.content}" for f in self.saved.files).encode()
        )
        return plan.Source("orbax", _files(self.saved.files), digest)

    def _choices(self, counts: Mapping[Kind, int]) -> plan.Choices:
        return plan.Choices(
            layout=self.read.layout,
            scan_axis=self.read.scan_axis,
            pipeline=str(self.read.pipeline or ""),
            dtype=_most(counts),
            multimodal=self.options.multimodal,
            shards=1,
            memory=self.options.memory,
            naming=self.read.naming,
            dims={n: v for n, v in self.read.dims.items() if not isinstance(v, Mapping)},
        )

    def _dtype(self, tensor: Inverted) -> str:
        """What a tensor is written as."""
        stored = self.stored[tensor.pieces[0].template.target].dtype
        known = self.original.dtypes.get(tensor.name) if self.original and self.original.dtypes else None
        default = stated_dtype(self.config)
        if known is not None and not is_float(known):
            return known
        if not is_float(stored) or tensor.name in self.codes:
            return stored
        return self.options.dtype or known or default

    def _exported(
        self, tensor: Inverted, pieces: list[Piece], dtype: str, shape: tuple[int, ...] | None = None
    ) -> Output:
        """A tensor made of these pieces; of `shape`, if they are not all of it. Those of other layers are of one kind
        with it, and are found to be without looking at their parts again.
        """
        first = pieces[0].offset
        key = (dtype, shape, tensor.leaf.each.shape, *((id(p.template), p.offset - first) for p in pieces))
        if key not in self.known:
            self.known[key] = self._kind(pieces, dtype, shape or self._shape(tensor))
        kind, places = self.known[key]
        arrays = tuple(target for target, _, _ in places)
        return Output(tensor.name, kind, arrays, tuple(pieces[piece].offset + begin for _, piece, begin in places))

    def _kind(
        self, pieces: list[Piece], dtype: str, shape: tuple[int, ...]
    ) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        """The position of the kind, and for each of its sources the target, one of the pieces that lie there, and
        where the tensor begins, counted from where that piece does.
        """
        targets = list(dict.fromkeys(p.template.target for p in pieces))
        begins = [
            min(part.base + p.offset for p in pieces if p.template.target == t for part in p.template.parts)
            for t in targets
        ]
        parts = tuple(
            replace(
                part,
                source=(n := targets.index(piece.template.target)),
                base=part.base + piece.offset - begins[n],
                math=invert_math(piece.template.math, dtype),
            )
            for piece in pieces
            for part in piece.template.parts
        )
        found = Kind(
            shape=shape,
            dtype=dtype,
            chunk=shape,
            unit=shape,
            rule=" + ".join(dict.fromkeys(self.targets[t].rule for t in targets)),
            ops=tuple(f"undo {step}" for step in reversed(self.targets[targets[0]].steps)),
            sources=tuple(self.alike[t] for t in targets),
            parts=parts,
            exactness=worst(
                exactness(p.template.math, self.stored[p.template.target].dtype, dtype) for p in _once(pieces)
            ),
        )
        lying = [next(n for n, p in enumerate(pieces) if p.template.target == t) for t in targets]
        places = tuple(
            (t, n, begins[k] - pieces[n].offset) for k, (t, n) in enumerate(zip(targets, lying, strict=True))
        )
        return self.kinds.setdefault(found, len(self.kinds)), places

    def _shape(self, tensor: Inverted) -> tuple[int, ...]:
        """The tensor's own shape, or the rows there are where some are nowhere."""
        each = tensor.leaf.each
        covered = sum(p.template.size for p in tensor.pieces)
        if covered == each.size:
            return each.shape
        parts = [part for p in tensor.pieces for part in p.template.parts]
        extents = tuple(max(part.axes[a].stop for part in parts) for a in range(len(each.axes)))
        if not tensor.partial or prod(extents) != covered:
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
        axes, stored = constant.part.axes, self.alike[constant.target]
        partly = [n for n, (axis, size) in enumerate(zip(axes, stored.shape, strict=True)) if axis.size < size]
        value = constant.part.value
        for step, operand in constant.part.math:
            value = value * float(operand) if step == "scale" else value + float(operand) if step == "add" else value
        return Padding(constant.target, stored, axes, partly[0] if partly else 0, value)

    def _left_out(self) -> tuple[plan.LeftOut, ...]:
        out = []
        if self.saved.optimizer:
            out.append(
                plan.LeftOut("opt_state/*", "the optimizer's state is no part of a model", self.saved.optimizer, 0)
            )
        for first, reason in target_tree(self.mapping.target).besides:
            if found := [a for a in self.saved.arrays if a.path[0] == first]:
                out.append(plan.LeftOut(f"{first}/*", reason, len(found), sum(a.nbytes for a in found)))
        passed = [a for a in self.read.matched.passed if a.path != ("step",)]
        if passed:
            reason = "counters and states of random numbers are no parameters"
            out.append(plan.LeftOut(_shown(passed), reason, len(passed), sum(a.nbytes for a in passed)))
        out += [plan.LeftOut(i.shown, i.reason, 0, 0) for i in self.read.graph.ignored]
        return tuple(out)

    def _filling(self, copied: int) -> list[str]:
        """What is said of tensors that are copied, or that nothing makes."""
        if copied:
            return [f"{copied} tensors that the target has no place for are copied from the original"]
        named = towers_left_out(self.config)
        if named is None or self.options.multimodal or self.fill is not None:
            return []
        return [
            f"{RANDOM}{named} has towers, which are not written: whoever loads it gets random weights for them; "
            "`--fill-from DIR`, with the original, copies them"
        ]

    def _config(self, counts: Mapping[Kind, int], twins: bool) -> tuple[dict[str, Any], list[str]]:
        notes = []
        if self.saved.place:
            notes.append(f"reads {self.saved.place}")
        for code, count in self.decoded:
            notes.append(f"{count} weights that the original stores as {code} are written as plain numbers")
        if twins:
            notes.append(
                "some tensors are stored twice: the first array, by path, is taken, and a run compares the others"
            )
        whole = bool(self.original and self.original.config)
        if self.codes:
            notes.append(f"{len(self.codes)} tensors are codes and their scales, as the checkpoint holds them")
        dtype = _most({k: n for k, n in counts.items() if is_float(k.dtype) and not k.dtype.startswith(EIGHT_BITS)})
        config, changed = adapt(
            self.config,
            self.mapping,
            self.read.dims,
            self.cut,
            dtype,
            whole,
            bool(self.codes),
            bool(self.options.dtype),
        )
        for name, (was, now) in self.cut.items():
            reasons = {t.partial for t in self.targets if t.partial}
            notes.append(
                f"{was - now} of {was} rows of `{name}` are not written: {'; '.join(sorted(filter(None, reasons)))}"
            )
        return config, notes + changed


def _files(files: Iterable[SourceFile]) -> tuple[plan.File, ...]:
    return tuple(plan.File(f.name, f.size, f.header_digest, f.content) for f in files)


def _once(pieces: list[Piece]) -> list[Piece]:
    return list({id(p.template): p for p in pieces}.values())


def _most(counts: Mapping[Kind, int]) -> str:
    """The dtype of most bytes; bfloat16 of none."""
    found: Counter[str] = Counter()
    for kind, count in counts.items():
        found[kind.dtype] += kind.nbytes * count
    return max(found, key=lambda dtype: found[dtype], default="bfloat16")


def _shown(arrays: list[SavedArray]) -> str:
    return arrays[0].name if len(arrays) == 1 else f"{arrays[0].name}, …"


def _naturally(name: str) -> tuple[tuple[int, int | str], ...]:
    """Names in the order of their numbers: layer 2 before layer 10."""
    return tuple((0, int(x)) if x.isdigit() else (1, x) for x in re.split(r"(\d+)", name) if x)
