"""The work of a plan, divided among processes: a pure function of the plan's units, so that each process finds its own part.

Units stand in the order in which files are read forwards, and each process has a stretch of them: it reads a stretch of the
source, and nothing twice that the plan does not read twice. Stretches are cut where the bytes read and written so far pass
equal portions of all, so each is within one unit of its portion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckptc.plan.model import Plan
from ckptc.plan.needs import bytes_read
from ckptc.plan.order import Unit, forwards, written


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes of sources read, and of outputs written."""

    read: int
    written: int

    @property
    def moved(self) -> int:
        return self.read + self.written

    def __add__(self, other: Load) -> Load:
        return Load(self.read + other.read, self.written + other.written)


def load(plan: Plan, unit: Unit) -> Load:
    """What a unit reads and writes."""
    return Load(bytes_read(plan, unit), written(plan, unit))


def divide(loads: Sequence[Load], processes: int) -> list[range]:
    """The units of each process, as positions in `loads`: one stretch each, none left out, some empty where units are few."""
    total, before, cuts, process = sum(x.moved for x in loads), 0, [0], 1
    for position, x in enumerate(loads):
        # A unit belongs to the process in whose portion its middle lies.
        while process < processes and (2 * before + x.moved) * processes >= 2 * process * total:
            cuts.append(position)
            process += 1
        before += x.moved
    cuts += [len(loads)] * (processes + 1 - len(cuts))
    return [range(a, b) for a, b in pairwise(cuts)]


def shares(plan: Plan, processes: int) -> list[Load]:
    """What each of some processes reads and writes when it runs its part of the whole plan."""
    return totals([load(plan, unit) for unit in forwards(plan)], processes)


def totals(loads: Sequence[Load], processes: int) -> list[Load]:
    return [sum((loads[i] for i in part), Load(0, 0)) for part in divide(loads, processes)]


@dataclass(frozen=True, slots=True)
class Spread:
    """Bytes of the process with the least, of the one with the most, and on average."""

    least: int
    most: int
    mean: int


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly a plan spreads over some processes."""

    processes: int
    read: Spread
    written: Spread
    scaling: tuple[tuple[int, float], ...]  # number of processes, and how many times as fast as one they would be


def balance(plan: Plan, processes: int) -> Balance:
    """The bytes of each process, and the scaling that they allow: a run is as fast as the process that moves the most.

    Left out: what does not divide (compiling, starting, the index over all chunks), and storage that gets slower when many
    use it.
    """
    loads = [load(plan, unit) for unit in forwards(plan)]
    all_moved = sum(x.moved for x in loads)
    counts = [*(1 << k for k in range((processes - 1).bit_length())), processes]
    scaling = tuple((n, all_moved / max(1, *(x.moved for x in totals(loads, n)))) for n in counts)
    parts = totals(loads, processes)
    return Balance(processes, _spread([x.read for x in parts]), _spread([x.written for x in parts]), scaling)


def _spread(values: Sequence[int]) -> Spread:
    return Spread(min(values), max(values), round(sum(values) / len(values)))
