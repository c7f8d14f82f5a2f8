"""packed_int: whole numbers of 8, 4 or 2 bits in words of 32, times a scale for each group, or row, of a matrix.

Source of the format: compressed-tensors, `pack-quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ckptc.ops.codes import schemes
from ckptc.ops.codes.base import (
    FLOATS,
    Array,
    Beside,
    Code,
    Factors,
    Found,
    RowLayout,
    Shape,
    Upload,
    matrix,
    per,
)
from ckptc.ops.codes.tables import fields, integers
from ckptc.ops.types import OpError


@dataclass(frozen=True, slots=True)
class PackedInt(Code):
    """(code - zero point) · scale, in float32.

    Codes int32 [out, ceil(in · bits / 32)], the lowest bits of a word first; the field is the code plus 2^(bits - 1), and
    so are those of zero points, int32 [ceil(out · bits / 32), groups], of which a word holds rows that follow each other.
    Scales [out, groups]. With an `index`, int32 [in], it says which group a column is of.
    """

    bits: int
    group: int
    zeros: bool = False
    index: bool = False

    name = "packed_int"
    methods = ("compressed-tensors",)
    dtypes = ("int32",)
    uploads = tuple(
        Upload(
            ".weight_packed",
            ".weight",
            {"scales": ".weight_scale", **zeros, **index},
            (".weight_shape",),
        )
        for zeros in ({"zero points": ".weight_zero_point"}, {})
        for index in ({"index": ".weight_g_idx"}, {})
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        (dtype, (_, words)), (_, (_, groups)) = found[""], found["scales"]
        if dtype not in cls.dtypes:
            return None
        scheme = schemes.weights(config, module)
        bits = schemes.integer_bits(scheme)
        # A scale for each row is a group as long as the row, whose end the words only bound.
        group = schemes.group_size(scheme) if groups > 1 else words * 32 // bits
        return cls(bits, group, "zero points" in found, "index" in found)

    def stored(self, shape: Shape) -> Shape:
        out, n = matrix(shape, self.name)
        if n * self.bits % 8:
            raise OpError(f"rows of {n} codes of {self.bits} bits do not end with a byte")
        return (out, per(n * self.bits, 32))

    def layout(self, shape: Shape) -> RowLayout:
        out, words = self.stored(shape)
        n, each = shape[1], 32 // self.bits
        groups = per(n, self.group)
        beside = [Beside("scales", FLOATS, (out, groups), (1,))]
        if self.zeros:
            beside.append(Beside("zero points", ("int32",), (per(out, each), groups), (each,)))
        if self.index:
            beside.append(Beside("index", ("int32",), (n,), (out,)))
        return RowLayout((out,), n, words, tuple(beside))

    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        return integers(self.bits, 0 if self.zeros else 1 << (self.bits - 1))

    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        scales, group, zeros = beside[0].astype(np.float32), self.group, None
        if self.zeros:
            each = 32 // self.bits
            shifts = (rows % each * self.bits).astype(np.uint32)[:, None]
            zeros = (beside[1].view(np.uint32) >> shifts & np.uint32((1 << self.bits) - 1)).astype(np.float32)
        if self.index:
            columns, group = beside[-1][0], 1
            scales, zeros = scales[:, columns], None if zeros is None else zeros[:, columns]
        return Factors(scales, zeros, group)

    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        out, n = shape
        codes = fields(arrays[0], self.bits).reshape(out, -1)[:, :n]
        of = arrays[-1] if self.index else np.arange(n) // self.group
        zeros: Array = np.full((out, n), 1 << (self.bits - 1))
        if self.zeros:  # a word holds rows that follow each other
            zeros = fields(arrays[2].T, self.bits).reshape(arrays[2].shape[1], -1)[of, :out].T
        return np.asarray((codes - zeros).astype(np.float32) * arrays[1].astype(np.float32)[:, of])

    def random(self, shape: Shape, rng: np.random.Generator) -> list[Array]:
        arrays = Code.random(self, shape, rng)
        if self.index:
            arrays[-1] = rng.integers(0, arrays[1].shape[1], shape[1], np.int32)
        return arrays

    def describe(self) -> str:
        return f"int{self.bits} in groups of {self.group}{' with zero points' if self.zeros else ''}"


PackedInt.examples = (
    (PackedInt(4, 32), (3, 64)),
    (PackedInt(4, 4, True), (11, 10)),
    (PackedInt(8, 20), (5, 17)),
    (PackedInt(2, 8, True), (17, 36)),
    (PackedInt(4, 6, True, True), (9, 12)),
    (PackedInt(4, 6, False, True), (3, 12)),
)
