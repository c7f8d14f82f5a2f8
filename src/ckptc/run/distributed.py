"""One output of several processes: process 0 opens the unfinished run and says what is in it, the others join it.

What they say to each other (`ckptc.run.coordinator`), by topic, in this order:

    plan       each: the digest of its plan, and its version of ckptc; all must have the same
    opened     process 0: what earlier runs have done, or that they have committed
    written    each: its part of the work is durable
    committed  process 0: the output has its name

Units that are not done are divided by bytes (`ckptc.plan.division`), and worker k of process i of n is writer i + n·k:
no two processes write one file, whatever the numbers of processes before, and whatever `--jobs` each has.

A local output lies on a file system that all processes share, which may show one machine's files to another a little
later (NFS: some seconds).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import ckptc
from ckptc.diagnostics import fail
from ckptc.plan.division import divide, load
from ckptc.plan.model import Plan
from ckptc.plan.order import Unit
from ckptc.run.coordinator import Alone, seen
from ckptc.run.output import Output, Unfinished


def agree(peers: Alone, digest: str) -> None:
    """Raises `plans-differ` unless all processes have the same plan, and divide it in the same way."""
    peers.say("plan", json.dumps({"plan": digest, "ckptc": ckptc.__version__}))
    said = [json.loads(text) for _, text in sorted(peers.hear("plan", peers.processes).items())]
    other = next((i for i, one in enumerate(said) if one != said[0]), None)
    if other is not None:
        raise fail(
            "plans-differ",
            f"process {other} and process 0 have different plans",
            notes=[f"process {i}: {said[i]['plan']}, ckptc {said[i]['ckptc']}" for i in (0, other)],
            help="give all the same command, but for --process-id, --source and --jobs; with `compile -o` and `run` all have one plan",
        )


def announce(peers: Alone, unfinished: Unfinished) -> None:
    """Says to the other processes what process 0 has opened."""
    if peers.processes == 1:
        return
    token = unfinished.show()
    numbers = sorted(unfinished.done)
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    done = [[numbers[a], numbers[b - 1] + 1] for a, b in pairwise(cuts) if a < b]
    said = {"token": token, "done": done, "writers": sorted(unfinished.writers), "committed": unfinished.committed}
    peers.say("opened", json.dumps(said))


def join_unfinished(peers: Alone, output: Output) -> Unfinished:
    """What process 0 has opened, seen from another process, with the states of this process's writers.

    Raises `output-not-shared`, and what opening may raise.
    """
    said = json.loads(peers.hear("opened")[0])
    return output.join(peers, said, [k for k in said["writers"] if k % peers.processes == peers.process])


def divided(peers: Alone, plan: Plan, units: Sequence[Unit], todo: Sequence[int]) -> Sequence[int]:
    """This process's part of the units that are still to be made."""
    if peers.processes == 1:
        return todo
    part = divide([load(plan, units[n]) for n in todo], peers.processes)[peers.process]
    return todo[part.start : part.stop]


@dataclass(frozen=True, slots=True)
class Written:
    """What one process has done in this run."""

    read: int  # bytes
    written: int
    peak: int  # bytes of memory
    writers: tuple[int, ...]  # numbers of its writers, those of earlier runs included
    journals: tuple[int, ...] = ()  # and of all that have a journal, where some have no files of their own


def gather(peers: Alone, unfinished: Unfinished, mine: Written) -> list[Written]:
    """Says that this process's work is durable, and, in process 0, waits for that of all and until it is seen here."""
    wrote = {"writers": unfinished.wrote(mine.writers), "journals": mine.writers}
    peers.say("written", json.dumps({**asdict(mine), **wrote}))
    if peers.process:
        return [mine]
    parts = [Written(**json.loads(text)) for _, text in sorted(peers.hear("written", peers.processes).items())]
    numbers = [k for part in parts for k in part.writers]
    journals = [k for part in parts for k in part.journals]
    seen(lambda: unfinished.shows(numbers, journals), peers)  # if not, `finish` says what is missing
    return parts
