"""Plans for tests, written array by array: what an array is, and what it reads, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from ckptc.ops.nest import Part
from ckptc.plan.model import Array, Decode, Kind, Operand, Plan, Stored, tabulated


def operand(
    dtype: str, shape: Sequence[int], tensors: Sequence[int], decode: Decode | None = None, *beside: Sequence[int]
) -> Operand:
    """Stored tensors of a plan, as an array reads them."""
    return Operand(Stored(dtype, tuple(shape), len(tensors), decode=decode), tuple(tensors), tuple(map(tuple, beside)))


def array(
    name: str,
    shape: Sequence[int],
    dtype: str,
    chunk: Sequence[int],
    unit: Sequence[int],
    sources: Sequence[Operand],
    parts: Sequence[Part],
    **rest: Any,
) -> Array:
    """An array of one shard, unless `rest` says more of its kind."""
    rest = {"rule": "rule", "shards": (1,) * len(shape), **rest}
    stored = tuple(s.stored for s in sources)
    kind = Kind(
        shape=tuple(shape),
        dtype=dtype,
        chunk=tuple(chunk),
        unit=tuple(unit),
        sources=stored,
        parts=tuple(parts),
        **rest,
    )
    return Array(name, kind, tuple(sources))


def altered(array: Array, **changes: Any) -> Array:
    """The array with other values of its own, or of its kind."""
    name, sources = changes.pop("name", array.name), changes.pop("sources", array.sources)
    kind = replace(array.kind, sources=tuple(s.stored for s in sources), **changes)
    return Array(name, kind, tuple(sources))


def with_arrays(plan: Plan, arrays: Sequence[Array]) -> Plan:
    """The plan with these outputs."""
    kinds, outputs = tabulated(arrays)
    return replace(plan, kinds=kinds, outputs=outputs)
