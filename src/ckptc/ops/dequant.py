"""`dequant_block_fp8` and `dequant_mxfp4`: stored codes and their scales as float32 numbers.

Both decode a source tensor as it is stored, before anything moves, so that a range of it can be decoded on its own.
Neither is inverted: a checkpoint goes back to the Hub with plain numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from ckptc.ops.base import Array, Op, Parts
from ckptc.ops.types import Axis, OpError, TensorType, replace_axis


@dataclass(frozen=True, slots=True)
class RowLayout:
    """A decoded tensor as rows of its last axis: the stretch that is decoded on its own.

    A row's codes lie together in the stored tensor, and its scales in the tensor of scales, which several rows may
    share.
    """

    axes: tuple[int, ...]  # sizes of the axes that count rows
    blocks: tuple[int, ...]  # along each of them, how many in succession have the same scales
    length: int  # elements of a row, decoded
    stored: int  # elements of the stored tensor for a row
    group: int  # elements of a row that share a scale; the last group may be short

    @property
    def scales(self) -> int:
        """Scales of a row."""
        return -(-self.length // self.group)

    def scale_rows(self, rows: Array) -> Array:
        """The rows of scales that rows of values have: int64[n] -> int64[n]."""
        out, weight = np.zeros_like(rows), 1
        for size, block in zip(reversed(self.axes), reversed(self.blocks), strict=True):
            rows, at = np.divmod(rows, size)
            out += at // block * weight
            weight *= -(-size // block)
        return out


class Decode(Op):
    """An op on a source tensor and its tensor of scales. It has no index nest: the fold sees a source in it."""

    arity = 2
    dtypes: ClassVar[tuple[str, ...]]  # that values may be stored in
    scale_dtypes: ClassVar[tuple[str, ...]]

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        raise OpError(f"`{self.name}` decodes a source tensor as it is stored: it comes first")

    def stored(self, values: TensorType) -> TensorType:
        """The type as stored of a tensor that, decoded, has the axes of `values`; its dtype is the stored one."""
        return values

    @abstractmethod
    def scales_shape(self, values: TensorType) -> tuple[int, ...]:
        """The shape the tensor of scales must have."""

    @abstractmethod
    def rows(self, stored: tuple[int, ...]) -> RowLayout:
        """The rows of what a tensor of this stored shape decodes to."""

    def _check(self, inputs: Sequence[TensorType]) -> TensorType:
        if len(inputs) != 2:
            raise OpError(f"`{self.name}` takes a tensor and its scales")
        values, scales = inputs
        if values.dtype not in self.dtypes:
            raise OpError(f"`{self.name}` decodes {' or '.join(self.dtypes)}, the tensor is {values.dtype}")
        if scales.dtype not in self.scale_dtypes:
            raise OpError(f"`{self.name}` takes scales in {' or '.join(self.scale_dtypes)}, they are {scales.dtype}")
        expected = self.scales_shape(values)
        if scales.shape != expected:
            raise OpError(
                f"`{self.name}`: the scales of {list(values.shape)} are {list(expected)}, found {list(scales.shape)}"
            )
        return values


@dataclass(frozen=True, slots=True)
class DequantBlockFp8(Decode):
    """value · scale, one scale for each block of the trailing axes.

    [.., m, n] float8_e4m3fn or float8_e5m2 with scales [.., ceil(m/bm), ceil(n/bn)] -> [.., m, n] float32. Blocks at
    the edges may be incomplete. Source of the format: the DeepSeek-V3 repository's README_WEIGHTS.md, on
    `weight_scale_inv`.
    """

    block: tuple[int, ...]
    name = "dequant_block_fp8"
    dtypes = ("float8_e4m3fn", "float8_e5m2")
    scale_dtypes = ("float32", "bfloat16", "float8_e8m0fnu")

    def scales_shape(self, values: TensorType) -> tuple[int, ...]:
        lead = len(values.shape) - len(self.block)
        if lead < 0 or any(b < 1 for b in self.block):
            raise OpError(f"a block {list(self.block)} does not fit a tensor {list(values.shape)}")
        return (*values.shape[:lead], *(-(-n // b) for n, b in zip(values.shape[lead:], self.block, strict=True)))

    def rows(self, stored: tuple[int, ...]) -> RowLayout:
        # A block that says nothing of the last axis gives every element its own scale; a scalar is a row of one.
        *axes, length = stored or (1,)
        *blocks, group = (1,) * (max(1, len(stored)) - len(self.block)) + self.block
        return RowLayout(tuple(axes), tuple(blocks), length, length, group)

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        values = self._check(inputs)
        return TensorType(values.axes, "float32")

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        values, scales = arrays[0].astype(np.float32), arrays[1].astype(np.float32)
        lead = values.ndim - len(self.block)
        for i, b in enumerate(self.block):
            index = np.arange(values.shape[lead + i]) // b
            scales = np.take(scales, index, axis=lead + i)
        return np.asarray(values * scales)

    def describe(self) -> str:
        return f"dequant_block_fp8 {'x'.join(map(str, self.block))}"


# The sixteen values of e2m1, by code: OCP Microscaling Formats (MX) specification 1.0, section 5.3.3.
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
MX_GROUP = 32  # elements that share a scale (same specification, section 5.1)


@dataclass(frozen=True, slots=True)
class DequantMxfp4(Decode):
    """e2m1 code · 2^(scale - 127), a scale for each group of 32, two codes a byte, the low four bits first.

    [.., groups, 16] uint8 with scales [.., groups] uint8 (e8m0) -> [.., groups·32] float32.
    Source of the format: OCP Microscaling Formats (MX) specification 1.0, sections 5.1 to 5.4.
    """

    flat: bool = False  # whether the groups of a row are fused: [.., n/2] bytes with scales [.., n/32]
    name = "dequant_mxfp4"
    dtypes = ("uint8", "int8")
    scale_dtypes = ("uint8", "float8_e8m0fnu")

    def stored(self, values: TensorType) -> TensorType:
        if not self.flat:
            return values  # groups are axes of their own: a rule names them as they are stored
        *lead, last = values.axes or (Axis("", 1),)
        if last.size % MX_GROUP:
            raise OpError(f"`{self.name}` needs rows of whole groups of {MX_GROUP}: {values}")
        return TensorType((*lead, Axis(last.name, last.size // 2)), values.dtype)

    def scales_shape(self, values: TensorType) -> tuple[int, ...]:
        if self.flat:
            if not values.shape or values.shape[-1] % (MX_GROUP // 2):
                raise OpError(f"mxfp4 rows are groups of {MX_GROUP // 2} bytes, found {list(values.shape)}")
            return (*values.shape[:-1], values.shape[-1] // (MX_GROUP // 2))
        if len(values.shape) < 2 or values.shape[-1] != MX_GROUP // 2:
            raise OpError(f"mxfp4 blocks are [.., groups, {MX_GROUP // 2}] bytes, found {list(values.shape)}")
        return values.shape[:-1]

    def rows(self, stored: tuple[int, ...]) -> RowLayout:
        if self.flat:
            stored = (*stored[:-1], stored[-1] // (MX_GROUP // 2), MX_GROUP // 2)
        *axes, groups, packed = stored
        return RowLayout(tuple(axes), (1,) * len(axes), groups * MX_GROUP, groups * packed, MX_GROUP)

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        values = self._check(inputs)
        if self.flat:
            *lead, last = values.axes
            return TensorType((*lead, Axis(last.name, last.size * 2)), "float32")
        groups = values.axes[-2]
        merged = replace_axis(values, len(values.axes) - 1)
        return TensorType((*merged.axes[:-1], Axis(groups.name, groups.size * MX_GROUP)), "float32")

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        codes = arrays[0].view(np.uint8)
        if self.flat:
            codes = codes.reshape(*codes.shape[:-1], -1, MX_GROUP // 2)
        pairs = np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(*codes.shape[:-1], MX_GROUP)
        scales = arrays[1].view(np.uint8)[..., None]
        # ldexp is exact, also at the ends of the exponent's range. Scale 255 is NaN, even for codes of zero.
        values = np.where(scales == 255, np.float32(np.nan), np.ldexp(E2M1[pairs], scales.astype(np.int32) - 127))
        return values.reshape(*codes.shape[:-2], -1).astype(np.float32)

    def describe(self) -> str:
        return "dequant_mxfp4"


def decode_op(name: str, block: tuple[int, ...]) -> Decode:
    """The op of a plan's record of it. Raises OpError for a name that decodes nothing."""
    if name == DequantBlockFp8.name:
        return DequantBlockFp8(block)
    if name == DequantMxfp4.name:
        return DequantMxfp4()
    raise OpError(f"`{name}` does not decode")
