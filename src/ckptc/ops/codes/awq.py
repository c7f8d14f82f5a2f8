"""awq: whole numbers of four bits, the matrix turned, with the elements of a word in an order of their own.

Source of the format: AutoAWQ's `gemm` packing.
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
    RefusedError,
    RowLayout,
    Shape,
    Upload,
    matrix,
    per,
)
from ckptc.ops.codes.tables import fields, integers
from ckptc.ops.nest import AxisMap, whole
from ckptc.ops.types import OpError

FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word, the field that holds each of its columns


@dataclass(frozen=True, slots=True)
class Awq(Code):
    """(code - zero point) · scale, rounded to the dtype of the scales, as AutoAWQ computes it.

    Codes int32 [in, out / 8] and zero points int32 [groups, out / 8]; field j of a word is its column 0 2 4 6 1 3 5 7 [j].
    Scales [groups, out].
    """

    group: int
    dtype: str  # of the scales

    name = "awq"
    methods = ("awq",)
    dtypes = ("int32",)
    unit = 8
    uploads = (Upload(".qweight", ".weight", {"scales": ".scales", "zero points": ".qzeros"}),)

    @classmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        if schemes.method(config) != "awq":
            return None
        if config.get("bits", 4) != 4:
            raise RefusedError("bits", f"is {config['bits']!r}: of AWQ, four bits are read")
        if str(config.get("version", "gemm")).lower() != "gemm":
            raise RefusedError("version", f"is {config['version']!r}: of AWQ, `gemm` is read")
        if config.get("zero_point") is False:
            raise RefusedError("zero_point", "is false: AWQ without zero points is not read")
        (_, (n, _)), (dtype, (groups, _)) = found[""], found["scales"]
        return cls(n if groups == 1 else schemes.group_size(config), dtype)

    def stored(self, shape: Shape) -> Shape:
        out, n = matrix(shape, self.name)
        if out % 8:
            raise OpError(f"{out} columns are no whole words of 8")
        return (n, out // 8)

    def layout(self, shape: Shape) -> RowLayout:
        n, words = self.stored(shape)
        groups = per(n, self.group)
        scales = Beside("scales", (self.dtype,), (groups, words * 8), (self.group,))
        zeros = Beside("zero points", ("int32",), (groups, words), (self.group,))
        return RowLayout((n,), words * 8, words, (scales, zeros))

    def place(self, shape: Shape) -> tuple[AxisMap, ...]:
        return (whole(shape[0], 1), whole(shape[1], shape[0]))

    def order(self, codes: Array) -> Array:
        # Bytes 0 2 1 3 of a word, then the two middle fields of each half exchanged: fields 0 4 1 5 2 6 3 7.
        words = codes.view(np.uint32)
        moved = (words ^ (words >> np.uint32(8))) & np.uint32(0x0000FF00)
        words = words ^ moved ^ (moved << np.uint32(8))
        moved = (words ^ (words >> np.uint32(4))) & np.uint32(0x00F000F0)
        out: Array = words ^ moved ^ (moved << np.uint32(4))
        return out.view(np.uint8)

    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        return integers(4, 0)

    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        zeros = fields(beside[1], 4)[..., FIELDS].reshape(len(beside[1]), -1)
        return Factors(beside[0].astype(np.float32), zeros.astype(np.float32), 1)

    @property
    def rounds(self) -> str | None:
        return self.dtype if self.dtype in FLOATS[1:] else None

    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        codes, zeros = (fields(a, 4)[..., FIELDS].reshape(len(a), -1) for a in (arrays[0], arrays[2]))
        of = np.arange(len(codes)) // self.group
        values = (codes - zeros[of]).astype(np.float32) * arrays[1][of].astype(np.float32)
        return np.ascontiguousarray(values.astype(arrays[1].dtype).astype(np.float32).T)

    def describe(self) -> str:
        return f"AWQ int4 in groups of {self.group}"


Awq.examples = ((Awq(4, "float16"), (16, 12)), (Awq(5, "bfloat16"), (8, 9)), (Awq(3, "float32"), (24, 3)))
