"""The op vocabulary. One module per kind; `VOCABULARY` is every word a mapping can use."""

from ckptc.ops.arithmetic import Add, Cast, Scale
from ckptc.ops.base import Op, infer_chain
from ckptc.ops.joining import Concat, Stack
from ckptc.ops.padding import Pad, Resize
from ckptc.ops.rearrange import Rearrange
from ckptc.ops.slicing import Slice
from ckptc.ops.sugar import Interleave, PermuteRope, ReshapeHeads, Split, SplitLast, Transpose
from ckptc.ops.types import Axis, OpError, TensorType

VOCABULARY: tuple[type[Op], ...] = (
    Rearrange, Transpose, ReshapeHeads, SplitLast, Split, Slice, Concat, Stack, Interleave, PermuteRope, Scale, Add, Pad, Resize, Cast,
)  # fmt: skip

__all__ = [
    "VOCABULARY", "Add", "Axis", "Cast", "Concat", "Interleave", "Op", "OpError",
    "Pad", "PermuteRope", "Rearrange", "ReshapeHeads", "Resize", "Scale", "Slice", "Split", "SplitLast", "Stack", "TensorType", "Transpose",
    "infer_chain",
]  # fmt: skip
