"""One output of several processes: process 0 opens the unfinished run and says what is in it, the others join it.

What they say to each other (`ckptc.run.peers`), by topic, in this order:

    plan       each: the digest of its plan, and its version of ckptc; all must have the same
    opened     process 0: what earlier runs have done, or that they have committed
    written    each: its part of the work is durable
    committed  process 0: the output has its name

Units that are not done are divided by bytes (`ckptc.plan.division`), and worker k of process i of n is writer i + n·k:
no two processes write one file, whatever the numbers of processes before, and whatever `--jobs` each has.

The output lies on a file system that all processes share, which may show one machine's files to another a little later
(NFS: some seconds).
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import ckptc
from ckptc.diagnostics import fail
from ckptc.plan.division import divide, load
from ckptc.plan.model import Plan
from ckptc.plan.order import Unit
from ckptc.run.journal import UNFINISHED, Unfinished, flock, output_error, read_writers
from ckptc.run.peers import Alone

SHOWN = 90.0  # seconds within which a file that another machine has written must be seen


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
    token = secrets.token_hex(16)
    (unfinished.directory / "token").write_text(token)
    numbers = sorted(unfinished.done)
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    done = [[numbers[a], numbers[b - 1] + 1] for a, b in pairwise(cuts) if a < b]
    said = {"token": token, "done": done, "writers": sorted(unfinished.writers), "committed": unfinished.committed}
    peers.say("opened", json.dumps(said))


def join_unfinished(peers: Alone, output: Path) -> Unfinished:
    """What process 0 has opened, seen from another process, with the states of this process's writers.

    Locks what shows that this process lives. Raises `output-not-shared`, and what `ckptc.run.journal` raises.
    """
    said = json.loads(peers.hear("opened")[0])
    directory = output / UNFINISHED
    if said["committed"]:
        return Unfinished(output, None, committed=True)
    try:
        if not _seen(lambda: (directory / "token").read_text() == said["token"], peers):
            raise fail(
                "output-not-shared",
                f"process {peers.process} does not see in {output} what process 0 has written there",
                help="--output must be one directory on a file system that all machines share",
            )
        unfinished = Unfinished(output, flock(directory / f"process.{peers.process}", output))
        unfinished.done = {n for low, high in said["done"] for n in range(low, high)}
        read_writers(unfinished, [k for k in said["writers"] if k % peers.processes == peers.process])
    except OSError as error:
        raise output_error(output, error) from None
    return unfinished


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


def gather(peers: Alone, unfinished: Unfinished, mine: Written) -> list[Written]:
    """Says that this process's work is durable, and, in process 0, waits for that of all and until it is seen here."""
    items = unfinished.checkpoint / "items"
    peers.say(
        "written", json.dumps({**asdict(mine), "writers": [k for k in mine.writers if _index(items, k).exists()]})
    )
    if peers.process:
        return [mine]
    parts = [Written(**json.loads(text)) for _, text in sorted(peers.hear("written", peers.processes).items())]
    numbers = [k for part in parts for k in part.writers]
    expected = [path for k in numbers for path in (_index(items, k), unfinished.directory / f"journal.{k}")]
    _seen(lambda: all(map(os.path.exists, expected)), peers)  # if not, `finish` says what is missing
    return parts


def _index(items: Path, writer: int) -> Path:
    """There, unless the writer has written nothing."""
    return items / f"ocdbt.process_{writer}" / "manifest.ocdbt"


def _seen(condition: Callable[[], bool], peers: Alone) -> bool:
    """Waits until a condition on shared files holds, within SHOWN."""
    end, pause = time.monotonic() + SHOWN, 0.01
    while True:
        try:
            if condition():
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > end:
            return False
        peers.check()
        time.sleep(pause)
        pause = min(1.0, pause * 2)
