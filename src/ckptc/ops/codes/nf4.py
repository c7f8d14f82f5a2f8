"""nf4: codes of four bits into a table of sixteen numbers, times a scale for each block of a weight's elements.

Source of the format: bitsandbytes, `nf4` and `fp4`, whose scales may be quantised in turn (`bnb_4bit_use_double_quant`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import Any, Self

import numpy as np

from ckptc.ops.codes.base import Array, Beside, Code, Factors, Found, RefusedError, RowLayout, Shape, Upload, per
from ckptc.ops.codes.tables import pairs
from ckptc.ops.types import OpError

BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
STATE_MOST = 4096  # bytes of the JSON that says shape, dtype and block sizes
NESTED = {"nested absmax": ".nested_absmax", "nested map": ".nested_quant_map"}


@dataclass(frozen=True, slots=True)
class Nf4(Code):
    """map[code] · absmax, in float32; of nested ones, absmax is nested map[absmax] · nested absmax + offset, rounded twice.

    Codes uint8 [out · in / 2, 1], the high four bits of a byte first, over the elements of the weight, row by row; absmax
    for each `block` of them, nested absmax for each `nested` of those. `state`, JSON, has the offset.
    """

    block: int
    nested: int  # 1: absmax is stored as numbers
    name = "nf4"
    methods = ("bitsandbytes",)
    dtypes = ("uint8",)
    by_row = True
    uploads = tuple(
        Upload(
            "", "", {"absmax": ".absmax", "map": ".quant_map", **nested, "state": f".quant_state.bitsandbytes__{kind}"}
        )
        for kind in ("nf4", "fp4")
        for nested in (NESTED, {})
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        storage = config.get("bnb_4bit_quant_storage", "uint8")
        if storage != "uint8":
            raise RefusedError("bnb_4bit_quant_storage", f"is {storage!r}: codes stored as uint8 are read")
        count, scales = prod(found[""].shape) * 2, prod(found["absmax"].shape)
        block = next((b for b in BLOCKS if per(count, b) == scales), None)
        if block is None:
            raise OpError(f"{scales} scales for {count} elements are no blocks of {BLOCKS[0]} to {BLOCKS[-1]}")
        if "nested absmax" not in found:
            return cls(block, 1)
        outer = prod(found["nested absmax"].shape)
        nested = next((n for n in (256, *BLOCKS) if per(scales, n) == outer), None)
        if nested is None:
            raise OpError(f"{outer} scales for {scales} scales are no blocks of {BLOCKS[0]} to {BLOCKS[-1]}")
        return cls(block, nested)

    def stored(self, shape: Shape) -> Shape:
        if prod(shape) % 2 or not shape:
            raise OpError(f"nf4 has two codes a byte, the rule's tensor is {list(shape)}")
        return (prod(shape) // 2, 1)

    def layout(self, shape: Shape) -> RowLayout:
        count = 2 * self.stored(shape)[0]
        length = lcm(shape[-1], self.block, 2)  # whole rows of whole blocks, where there are such
        length = length if count % length == 0 else count
        rows, blocks = count // length, per(count, self.block)
        kind = ("float32",) if self.nested == 1 else ("uint8",)
        beside = [Beside("absmax", kind, (blocks,), (1,)), Beside("map", ("float32",), (16,), (rows,))]
        if self.nested > 1:
            beside.append(Beside("nested absmax", ("float32",), (per(blocks, self.nested),), (rows,)))
            beside.append(Beside("nested map", ("float32",), (256,), (rows,)))
        beside.append(Beside("state", ("uint8",), (STATE_MOST,), (rows,), most=True))
        return RowLayout((rows,), length, length // 2, tuple(beside))

    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        return pairs(beside[1].reshape(16), high_first=True)

    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        offset = self._offset(beside[-1].reshape(-1), shape)
        if self.nested == 1:
            return Factors(beside[0], None, self.block)
        width = beside[0].shape[1]
        outer = (rows[:, None] * width + np.arange(width)) // self.nested
        scales = beside[3][0][beside[0]] * beside[2][0][outer]
        return Factors(scales + np.float32(offset), None, self.block)

    def _offset(self, state: Array, shape: Shape) -> float:
        """The offset that the state says. Raises OpError where it says another weight than the header and the rule."""
        try:
            said = json.loads(bytes(state).rstrip(b"\0"))
            stated = (tuple(said["shape"]), said["blocksize"], said.get("nested_blocksize", 1))
            offset = float(said.get("nested_offset", 0.0))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OpError("the state of an nf4 weight is not the JSON that bitsandbytes writes") from None
        if stated != (shape, self.block, self.nested):
            raise OpError(
                f"the state of an nf4 weight says {stated}, its tensors are {(shape, self.block, self.nested)}"
            )
        return offset

    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        codes, absmax, table = arrays[0].reshape(-1), arrays[1], arrays[2]
        values = table[np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)]
        if self.nested > 1:
            outer = np.repeat(arrays[3], self.nested)[: absmax.size]
            absmax = arrays[4][absmax] * outer + np.float32(self._offset(arrays[-1], shape))
        return np.asarray(values * np.repeat(absmax, self.block)[: values.size], np.float32).reshape(shape)

    def random(self, shape: Shape, rng: np.random.Generator) -> list[Array]:
        arrays = Code.random(self, shape, rng)
        state = {"shape": shape, "blocksize": self.block, "quant_type": "nf4"}
        if self.nested > 1:
            state |= {"nested_blocksize": self.nested, "nested_offset": float(rng.normal())}
        arrays[-1] = np.frombuffer(json.dumps(state).encode().ljust(160), np.uint8)
        return arrays

    def describe(self) -> str:
        return f"nf4 in blocks of {self.block}{', whose scales are quantised' if self.nested > 1 else ''}"


Nf4.examples = (
    (Nf4(64, 1), (4, 128)),
    (Nf4(64, 1), (4, 96)),
    (Nf4(64, 256), (3, 128)),
    (Nf4(64, 64), (130, 64)),
    (Nf4(128, 1), (3, 34)),
)
