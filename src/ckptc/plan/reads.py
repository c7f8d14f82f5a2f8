"""Which bytes a part of a target needs: contiguous runs of each source tensor.

Used twice, so that what the plan announces is what the executor does: to count bytes when a plan is made, and to read when it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

from ckptc.ops.nest import Factor, Part

WASTE = 2  # a run may be read with gaps as long as it is at most this many times the bytes needed


@dataclass(frozen=True, slots=True)
class Read:
    """`runs` ranges of `length` elements, at `start` + Σ i·step over `loops` (count, step), of one tensor. Read one after the other, they
    are the elements the part needs, in the tensor's order, with gaps only inside a run."""

    start: int  # elements from the tensor's start
    length: int
    loops: tuple[tuple[int, int], ...]

    @property
    def runs(self) -> int:
        return prod(count for count, _ in self.loops)

    @property
    def size(self) -> int:
        """Elements read."""
        return self.length * self.runs

    def starts(self) -> list[int]:
        """The first element of each run."""
        ranges = (range(0, count * step, step) for count, step in self.loops)
        return [self.start + sum(offsets) for offsets in product(*ranges)]


def element_loops(part: Part) -> list[Factor]:
    """The part's loops that move within a tensor, largest step first."""
    loops = [f for axis in part.axes for f in axis.factors if f.tensor == 0 and f.step != 0]
    return sorted(loops, key=lambda f: -f.step)


def tensor_loops(part: Part) -> list[Factor]:
    """The part's loops over the list of tensors."""
    return [f for axis in part.axes for f in axis.factors if f.tensor != 0]


def tensors_of(part: Part) -> list[int]:
    """Positions in the source's list of the tensors that the part reads, in the order of its loops."""
    ranges = (range(0, f.size * f.tensor, f.tensor) for f in tensor_loops(part))
    return [part.first + sum(offsets) for offsets in product(*ranges)]


def plan_read(part: Part) -> Read:
    """The runs that hold the part's elements in each tensor it reads.

    From the innermost loop outwards: a loop joins the run while the run, gaps included, stays within WASTE times what is needed.
    """
    loops = element_loops(part)
    needed, extent, outer = 1, 1, len(loops)
    while outer > 0:
        f = loops[outer - 1]
        grown, wanted = (f.size - 1) * f.step + extent, needed * f.size
        if grown > WASTE * wanted:
            break
        needed, extent, outer = wanted, grown, outer - 1
    return Read(part.base, extent, tuple((f.size, f.step) for f in loops[:outer]))
