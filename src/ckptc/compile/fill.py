"""fill: tensors of the original that the target has no place for become outputs, copied bit for bit.

Before: an export of the text model of Gemma 3, and an original with a vision tower.
After: the tower's tensors are outputs of the same plan, of kinds that read one range of the original's files.

A text model beside a config.json that speaks of towers is loaded all the same, and the towers are random then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from msgspec.structs import replace

from ckptc.compile.assemble import source_digest
from ckptc.compile.units import Scheduled, schedule
from ckptc.ir.source import Checkpoint, SourceTensor
from ckptc.ops.nest import Part, whole
from ckptc.ops.types import itemsize
from ckptc.plan import model as plan
from ckptc.plan.files import DTYPES
from ckptc.plan.model import Exactness, Kind, Output, Stored

RULE = "copied from the original"
UNIT = 16 << 20  # bytes of a unit
TOWERS = ("vision_config", "audio_config")  # sections of config.json


def left_in(
    original: Checkpoint, made: Iterable[str], tied: bool, logical: Mapping[str, str] | None
) -> list[SourceTensor]:
    """The tensors of the original that an export does not make, in the order of their names.

    Not among them: the copy of tied embeddings, which training has not changed with them, and what of a quantised original
    are codes or lie beside codes. `logical`: its tensors with codes as plain weights, by name.
    """
    have = set(made)
    return [
        tensor
        for name, tensor in sorted(original.tensors.items())
        if name not in have
        and tensor.dtype in DTYPES
        and not (tied and name.rpartition(".")[0].endswith("lm_head"))
        and (logical is None or logical.get(name) == tensor.dtype)
    ]


def copies(
    tensors: Sequence[SourceTensor], first: int, kinds: dict[Kind, int]
) -> tuple[list[Output], list[plan.Tensor]]:
    """An output for each tensor, and the rows of the plan's table of tensors, which begins at `first` for them. New kinds are
    added to `kinds`.
    """
    outputs, rows = [], []
    for number, t in enumerate(tensors):
        kind = kinds.setdefault(_kind(t.dtype, t.shape), len(kinds))
        outputs.append(Output(t.name, kind, (first + number,), (0,)))
        rows.append(plan.Tensor(t.name, t.file, t.begin, t.end, source=1))
    return outputs, rows


def _kind(dtype: str, shape: tuple[int, ...]) -> Kind:
    steps = [prod(shape[n + 1 :]) for n in range(len(shape))]
    part = Part(0, 0, 0, tuple(map(whole, shape, steps)))
    unit, left = list(shape), UNIT // itemsize(dtype)
    for n in range(len(shape)):  # whole rows, as many as fit
        unit[n] = max(1, min(shape[n], left // max(1, steps[n])))
        if unit[n] * steps[n] >= min(left, shape[n] * steps[n]) and steps[n] <= left:
            break
    return Kind(
        rule=RULE, shape=shape, dtype=dtype, chunk=tuple(unit), unit=tuple(unit),
        sources=(Stored(dtype, shape),), parts=(part,), exactness=Exactness(),
    )  # fmt: skip


def is_copy(kind: Kind) -> bool:
    return kind.rule == RULE


def schedule_both(kinds: Sequence[Kind], ordered: Sequence[Output], memory: int) -> Scheduled:
    """As `schedule`, of outputs some of which are copies, which have their units."""
    made = [n for n, o in enumerate(ordered) if not is_copy(kinds[o.kind])]
    done = schedule(kinds, [ordered[n] for n in made], memory)
    found = {kind: n for n, kind in enumerate(done.kinds)}
    outputs = list(ordered)
    for n, output in zip(made, done.tensors, strict=True):
        outputs[n] = output
    batches = [tuple(made[i] for i in batch) for batch in done.batches]
    read, peak = done.read_bytes, done.peak
    for n, output in enumerate(ordered):
        kind = kinds[output.kind]
        if is_copy(kind):
            outputs[n] = replace(output, kind=found.setdefault(kind, len(found)))
            batches.append((n,))
            read += kind.nbytes
            peak = max(peak, 2 * prod(kind.unit) * itemsize(kind.dtype))
    return Scheduled(tuple(found), tuple(outputs), tuple(batches), read, peak)


def source_of(original: Checkpoint) -> plan.Source:
    files = tuple(plan.File(f.name, f.size, f.header_digest, f.content) for f in original.files)
    return plan.Source("safetensors", files, source_digest(original), original.name)


def towers_left_out(config: Mapping[str, Any]) -> str | None:
    """The class that config.json names, where it has towers; None where it has none."""
    names = config.get("architectures") or [""]
    return str(names[0]) if any(config.get(section) for section in TOWERS) else None
