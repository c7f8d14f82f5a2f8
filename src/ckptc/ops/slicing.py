"""`slice`: part of an axis, or one index of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from ckptc.ops.base import Array, Op, Parts, one
from ckptc.ops.nest import restrict_part
from ckptc.ops.types import Axis, OpError, TensorType


@dataclass(frozen=True, slots=True)
class Slice(Op):
    """Keeps [begin, end) of each named axis, or drops the axis at one index (`end` None).

    Shape rule: size end - begin, or no axis. The dtype stays. The elements it drops are those that
    other rules keep, and an export puts all of them back.
    """

    cuts: tuple[tuple[str, int, int | None], ...]
    name = "slice"

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        input = one(inputs, self.name)
        kept = self._kept(input)
        return input.with_axes(
            tuple(
                Axis(axis.name, end - begin)
                for axis, (begin, end, drop) in zip(input.axes, kept, strict=True)
                if not drop
            )
        )

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        index = tuple(begin if drop else slice(begin, end) for begin, end, drop in self._kept(inputs[0]))
        out: Array = arrays[0][(*index, ...)]  # with `...` a single element stays an array
        return out

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        kept = self._kept(inputs[0])
        box = tuple((begin, end) for begin, end, _ in kept)
        found = [p for part in parts[0] for p in restrict_part(part, box)]
        return [
            replace(p, axes=tuple(a for a, (_, _, drop) in zip(p.axes, kept, strict=True) if not drop)) for p in found
        ]

    def _kept(self, input: TensorType) -> list[tuple[int, int, bool]]:
        kept = [(0, axis.size, False) for axis in input.axes]
        names = [name for name, _, _ in self.cuts]
        for name, begin, end in self.cuts:
            position = input.find(name)
            if names.count(name) > 1:
                raise OpError(f"`slice` cuts axis `{name}` twice")
            size = input.axes[position].size
            stop = begin + 1 if end is None else end
            if not 0 <= begin < stop <= size:
                shown = str(begin) if end is None else f"[{begin}, {end})"
                raise OpError(f"{shown} is not within axis `{name}` of size {size}")
            kept[position] = (begin, stop, end is None)
        return kept

    def describe(self) -> str:
        return "slice " + ", ".join(f"{n}={b}" if e is None else f"{n}={b}:{e}" for n, b, e in self.cuts)
