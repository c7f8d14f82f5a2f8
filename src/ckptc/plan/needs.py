"""What a unit needs of each source: ranges of tensors that can be read anywhere, boxes of those that lie in chunks.

Used twice, so that what the plan announces is what the executor does: to count bytes when a plan is made and divided,
and to read when it is run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckptc.ops.nest import restrict_part
from ckptc.ops.types import itemsize
from ckptc.plan.model import Output, Plan
from ckptc.plan.order import Unit, kind_of
from ckptc.plan.reads import need
from ckptc.plan.regions import Numbers, needs


def begins_of(outputs: Sequence[Output], sources: int) -> Numbers:
    """Where outputs begin in the tensors of each of their kind's sources: int64[outputs, sources]."""
    if any(o.begins for o in outputs):
        return np.array([o.begins or (0,) * sources for o in outputs], dtype=np.int64)
    return np.zeros((len(outputs), sources), dtype=np.int64)


def bytes_read(plan: Plan, unit: Unit) -> int:
    """Bytes that a unit reads: of chunks, those that are decoded."""
    kind = kind_of(plan, unit)
    total = 0
    for part in kind.parts:
        if part.source is not None and kind.sources[part.source].chunk is None:
            inside = restrict_part(part, unit.box)
            total += sum(need(p, kind.sources[part.source]).read for p in inside) * len(unit.outputs)
    if any(s.chunk is not None for s in kind.sources):
        begins = begins_of([plan.outputs[n] for n in unit.outputs], len(kind.sources))
        for source, region in needs(kind, begins, unit.box):
            stored = kind.sources[source]
            total += region.chunked(stored.chunk or stored.shape, stored.shape) * itemsize(stored.dtype)
    return total
