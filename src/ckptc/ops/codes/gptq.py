"""gptq: whole numbers of 8, 4 or 2 bits, the matrix turned, words along its inputs, groups by an index of inputs.

Source of the format: AutoGPTQ and GPTQModel, `checkpoint_format` gptq (or none stated) and gptq_v2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
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
from ckptc.ops.nest import AxisMap, Factor, whole
from ckptc.ops.types import OpError

FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class Gptq(Code):
    """(code - zero point) · scale, rounded to the dtype of the scales, as GPTQModel computes it.

    Codes int32 [in / n, out] of n fields of consecutive inputs, the lowest bits first. Scales [groups, out], zero points
    int32 [groups, out / n]. An `index` int32 [in] says which group an input is of; without one, groups follow each other.
    """

    bits: int
    group: int
    dtype: str  # of the scales
    index: bool = True
    less: bool = True  # whether stored zero points are one less; the subtraction went through whole words

    name = "gptq"
    methods = ("gptq",)
    dtypes = ("int32",)
    by_row = True
    uploads = tuple(
        Upload(".qweight", ".weight", {"scales": ".scales", "zero points": ".qzeros", **index})
        for index in ({"index": ".g_idx"}, {})
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        if schemes.method(config) != "gptq":
            return None
        bits = schemes.bits(config, "bits")
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        if form not in FORMATS:
            raise RefusedError("checkpoint_format", f"is {form!r}: {' and '.join(FORMATS)} are read")
        if str(config.get("pack_dtype") or "int32") != "int32":
            raise RefusedError("pack_dtype", f"is {config['pack_dtype']!r}: words of int32 are read")
        words, (dtype, (groups, _)) = found[""].shape[0], found["scales"]
        if "index" in found and (inputs := prod(found["index"].shape)):
            bits = words * 32 // inputs  # modules may differ: `dynamic`
            if bits not in schemes.BITS or words * 32 != inputs * bits:
                raise RefusedError("bits", f"of {module} are {words * 32 / inputs:g}: they must fill bytes")
        inputs = words * 32 // bits
        group = config.get("group_size")
        one = groups == 1 or "index" in found
        return cls(
            bits,
            per(inputs, groups) if one or group == -1 else schemes.group_size(config),
            dtype,
            "index" in found,
            form == "gptq",
        )

    @property
    def _each(self) -> int:
        return 32 // self.bits

    def stored(self, shape: Shape) -> Shape:
        out, n = matrix(shape, self.name)
        if n % self._each or out % self._each:
            raise OpError(f"a matrix {list(shape)} has no whole words of {self._each} codes")
        if not self.index and self.group % self._each and self.group < n:
            raise OpError(f"a group of {self.group} does not end with a word of {self._each} codes")
        return (n // self._each, out)

    def layout(self, shape: Shape) -> RowLayout:
        words, out = self.stored(shape)
        n, each = shape[1], self._each
        groups = per(n, self.group)
        blocks = (words if self.index or groups == 1 else self.group // each,)
        beside = [
            Beside("scales", (self.dtype,), (groups, out), blocks),
            Beside("zero points", ("int32",), (groups, out // each), blocks),
        ]
        if self.index:
            beside.append(Beside("index", ("int32", "int64"), (n,), (1,)))
        return RowLayout((words,), out * each, out, tuple(beside))

    def place(self, shape: Shape) -> tuple[AxisMap, ...]:
        out, n = shape
        each = self._each
        # A row of words is, for each output, `each` inputs one after the other.
        inputs = tuple(f for f in (Factor(n // each, each, out * each), Factor(each, 1, 1)) if f.size > 1)
        return (whole(out, each), AxisMap(0, inputs))

    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        return integers(self.bits, 0)

    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        out, each = shape[0], self._each
        scales = beside[0].reshape(-1, out)
        zeros = self._zeros(beside[1].reshape(-1, out // each))
        if not self.index:
            return Factors(scales.astype(np.float32), zeros.astype(np.float32), each)
        of = beside[2]
        if (of == of[:, :1]).all():  # the inputs of a word are of one group, unless they were ordered by activation
            return Factors(scales[of[:, 0]].astype(np.float32), zeros[of[:, 0]].astype(np.float32), each)
        wide = [x[of].astype(np.float32).transpose(0, 2, 1).reshape(len(of), -1) for x in (scales, zeros)]
        return Factors(wide[0], wide[1], 1)

    def _zeros(self, words: Array) -> Array:
        """int32[groups, out / n] -> int32[groups, out]."""
        if self.less:
            ones = sum(1 << shift for shift in range(0, 32, self.bits))
            words = words.view(np.uint32) + np.uint32(ones)  # modulo 2^32: what one field borrowed goes back
        return fields(words, self.bits).reshape(len(words), -1)

    @property
    def rounds(self) -> str | None:
        return self.dtype if self.dtype in FLOATS[1:] else None

    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        out, n = shape
        codes = fields(arrays[0], self.bits).transpose(0, 2, 1).reshape(n, out)
        of = arrays[3] if self.index else np.arange(n) // self.group
        values = (codes - self._zeros(arrays[2])[of]).astype(np.float32) * arrays[1][of].astype(np.float32)
        return np.ascontiguousarray(values.astype(arrays[1].dtype).astype(np.float32).T)

    def random(self, shape: Shape, rng: np.random.Generator) -> list[Array]:
        arrays = Code.random(self, shape, rng)
        if self.index:
            arrays[3] = rng.integers(0, len(arrays[1]), shape[1], arrays[3].dtype)
        return arrays

    def describe(self) -> str:
        return f"GPTQ int{self.bits} in groups of {self.group}"


Gptq.examples = (
    (Gptq(4, 8, "float16"), (16, 24)),
    (Gptq(4, 8, "float16", False), (8, 24)),
    (Gptq(8, 4, "bfloat16", True, False), (4, 12)),
    (Gptq(2, 16, "float32", True, True), (16, 32)),
)
