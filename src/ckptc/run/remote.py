"""An output in an object store, and what an unfinished run has done there.

    <url>/0/…                              the checkpoint, where it stays; finished by its last object (`ckptc.storage.sink.bucket`)
    <url>/.ckptc-unfinished/
        plan                               JSON: the one plan that all of this belongs to, when it was begun, whether there
                                           was an older checkpoint then, and which run is the latest
        journal.K/<run>.<number>           JSON: data objects that writer K has written, and the units in them

There is no lock in an object store. A run that opens an output writes its name into `plan`, and commits only if it is
there still: of two runs at a time, the one that began later goes on, with what the other had done by then, and the other
fails at its end. Objects have random names, so neither writes over the other's.

A run that is opened while another writes its last objects may come too late for that one's last look at `plan`. So no run
deletes anything of a checkpoint before its own commit: the other's is whole then, and makes way for the later one's in
order, its markers first. What is left is that the later one does all its work, up to its commit, between the other's last
look and its last marker, three small objects further: that marker would speak of a checkpoint that is being replaced,
until the replacement has its own. A conditional write could not prevent it, as the next run could not tell whether who
has claimed `plan` with one is alive.

A journal's object is written after the data objects it speaks of, so what it says can be trusted. What none speaks of,
and an older checkpoint, is deleted by the commit; what another run sends after that, and never notes, stays.

TensorStore keeps threads once it is used, and workers are forked: what a run does before them, it does in a child.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ckptc.diagnostics import InputError, fail
from ckptc.plan.model import Plan
from ckptc.run.coordinator import Alone
from ckptc.run.journal import UNFINISHED, output_error
from ckptc.run.output import STEP, Finish, Journal, Unfinished, exists, largest_chunk
from ckptc.run.sources import Sighting, other_plan
from ckptc.storage.checkpoint.orbax_writer import Entry, ItemsWriter, WriterState, indexed_bytes
from ckptc.storage.forked_call import forked_call
from ckptc.storage.formats import checksum
from ckptc.storage.sink.bucket import MARKER, ObjectData, ObjectStore

OBJECT_BYTES = 64 << 20  # of a data object at most, and of
OBJECTS_OF_BUDGET = 16  # times as much memory, so that two of them and a unit's buffers leave room for other workers
_STATE = f"{UNFINISHED}/"
_PLAN = f"{_STATE}plan"
_SOURCE = f"{_STATE}source"
_JOURNALS = f"{_STATE}journal."
_JOURNAL = re.compile(re.escape(_JOURNALS) + r"([0-9]{1,6})/([0-9a-f]+)[.][0-9]+")
_URL = re.compile(r"gs://([^/]+)((?:/[^/]+)*)/?")


class RemoteOutput:
    """What a URL names: `gs://bucket/path`."""

    def __init__(self, url: str, plan: Plan) -> None:
        match = _URL.fullmatch(url)
        if match is None:
            why = ": Orbax restores nothing from s3://" if url.startswith("s3://") else ""
            raise fail(
                "unsupported-url", f"{url} is not an output that can be written to{why}",
                help="give a directory, or gs://BUCKET/PATH",
            )  # fmt: skip
        path = match[2].removeprefix("/")
        spec = {"driver": "gcs", "bucket": match[1], "path": f"{path}/" if path else ""}
        self._url, self._plan = url.rstrip("/"), plan
        budget = plan.choices.memory
        self._store = ObjectStore(spec, self._url, max(1, min(OBJECT_BYTES, budget // OBJECTS_OF_BUDGET)))

    def __str__(self) -> str:
        return self._url

    @property
    def step(self) -> str:
        return f"{self._url}/{STEP}"

    def check(self) -> None:
        if self._plan.totals.linked_bytes:
            help = "compile the plan again without `--link`"
            raise fail("unsupported-url", f"{self} cannot hold links to the source's files", help=help)

    def check_free(self, replace: bool, source: Sighting) -> None: ...

    def check_target(self, replace: bool, source: Sighting) -> None: ...

    def open(self, plan_digest: str, restart: bool, replace: bool, started: int, source: Sighting) -> Unfinished:
        opened = forked_call(lambda: _open(self._store, plan_digest, restart, replace, started, source))
        return RemoteUnfinished(
            self._store, plan_digest, opened["run"], opened["started"], set(opened["done"]), _states(opened["writers"]),
            opened["committed"],
        )  # fmt: skip

    def join(self, peers: Alone, said: dict[str, Any], mine: list[int]) -> Unfinished:
        done = {n for low, high in said["done"] for n in range(low, high)}

        def look() -> dict[str, Any]:
            plan = _read_plan(self._store)
            if plan is None or plan.run != said["token"]:
                raise fail(
                    "output-not-shared",
                    f"process {peers.process} does not see in {self} what process 0 has written there",
                    help="--output must be one URL, of one store, for all processes",
                )
            found = _Found(plan.digest, within=done)
            found.take(self._store, (f"{_JOURNALS}{k}/" for k in mine))
            return {"digest": plan.digest, "writers": found.told()}

        if said["committed"]:
            return RemoteUnfinished(self._store, "", said["token"], 0, committed=True)
        seen = forked_call(look)
        return RemoteUnfinished(self._store, seen["digest"], said["token"], 0, done, _states(seen["writers"]))

    def check_room(self, needed: int) -> None: ...

    def held(self) -> int:
        return 2 * max(self._store.object_bytes, largest_chunk(self._plan))

    def stored_bytes(self) -> int | None:
        with suppress(InputError):
            return indexed_bytes(self._store.below(f"{STEP}/"))
        return None

    def error(self, error: OSError) -> Exception:
        return output_error(self._url, error)


@dataclass
class RemoteUnfinished:
    """The unfinished run of an output, as this process has opened or joined it."""

    store: ObjectStore
    digest: str  # of the plan
    run: str
    started: int  # when the first run of the plan began here, nanoseconds since the Unix epoch
    done: set[int] = field(default_factory=set)
    writers: dict[int, WriterState] = field(default_factory=dict)
    committed: bool = False

    @property
    def place(self) -> ObjectStore:
        return self.store.below(f"{STEP}/")

    def journal(self, number: int, writer: ItemsWriter) -> Journal:
        return _Journal(self, number, writer)

    def sums(self) -> dict[int, int]:
        found = _Found(self.digest, self.done, self.run)
        found.take(self.store, [_JOURNALS])
        return dict(found.sums)

    def show(self) -> str:
        return self.run  # in the plan

    def wrote(self, numbers: Sequence[int]) -> list[int]:
        return [k for k in numbers if k in self.writers or self.store.names(f"{_JOURNALS}{k}/{self.run}.")]

    def shows(self, numbers: Sequence[int], journals: Sequence[int]) -> bool:
        return True  # what has been written is seen by all at once

    def complete(self, finish: Finish, before_commit: Callable[[Path], None] | None, check: Callable[[], None]) -> None:
        """Has `finish` write what makes a checkpoint of the chunks, as long as no other run has been opened."""

        def check_all() -> None:
            check()
            if not self._is_latest():
                help = "let that one end; it has what this one had done until then"
                raise fail("output-busy", f"another run has begun to write to {self.store.shown}", help=help)

        assert before_commit is None, "there is nothing to look at before it is committed"
        check_all()
        finish(check_all)

    def _is_latest(self) -> bool:
        plan = _read_plan(self.store)
        return plan is not None and plan.run == self.run

    def forget(self) -> None:
        if not self._is_latest():
            return  # it is another's by now
        self.store.delete([name for name in self.store.names(_STATE) if name != _PLAN])
        self.store.delete([_PLAN])  # last: until then, the next run knows that it has only to tidy up

    def release(self) -> None: ...


@dataclass(frozen=True)
class _Plan:
    """What the object `plan` says."""

    digest: str
    started: int  # nanoseconds since the Unix epoch
    older: bool  # whether there was something at the output before
    run: str  # of the runs of this plan, the latest one


def _read_plan(store: ObjectStore) -> _Plan | None:
    text = store.read(_PLAN)
    with suppress(ValueError, TypeError):
        return _Plan(**json.loads(text)) if text is not None else None
    return None


def _open(
    store: ObjectStore, digest: str, restart: bool, replace: bool, started: int, source: Sighting
) -> dict[str, Any]:
    """What `RemoteOutput.open` does apart from the process that will fork workers, as JSON."""
    store.probe()
    there, plan, kept = set(store.names(f"{STEP}/")), _read_plan(store), Sighting.kept(store.read(_SOURCE))
    if plan is not None and plan.digest != digest and not restart:
        raise other_plan(store.shown, digest, plan.digest, source, kept)
    finished = f"{STEP}/{MARKER}" in there
    if plan is None:
        older = bool(there)
    elif finished and _begun(store) == plan.started:
        if not restart:
            return {"run": plan.run, "started": plan.started, "done": [], "writers": {}, "committed": True}
        older = True
    else:
        older = plan.older
    if older and not replace:
        raise exists(f"{store.shown}/{STEP}")
    found = _Found(digest, there=there)
    goes_on = plan is not None and not restart and kept is not None
    if plan is not None and kept is not None and goes_on:
        source.check_same(kept, store.shown)
        started = plan.started
    else:
        store.write(_SOURCE, json.dumps(source.record()).encode())
    run = secrets.token_hex(8)
    store.write(_PLAN, json.dumps(asdict(_Plan(digest, started, older, run))).encode())
    journals = store.names(_JOURNALS)
    if goes_on:
        found.take(store, [_JOURNALS])
    store.delete([name for name in journals if name not in found.taken])
    return {"run": run, "started": started, "done": sorted(found.units), "writers": found.told(), "committed": False}


def _begun(store: ObjectStore) -> int | None:
    """When the conversion began that the checkpoint there is of."""
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(store.read(f"{STEP}/_CHECKPOINT_METADATA") or b"")["init_timestamp_nsecs"])
    return None


class _Found:
    """What the journals of a plan say, as far as it counts: units that are not noted twice, in objects that are there.

    `there`: names of all objects of the checkpoint, when they are to be compared. `within`: units that are known to be
    done; others count only if `run` has noted them. So the notes of a run that others have overtaken do not count.
    """

    def __init__(
        self, digest: str, within: set[int] | None = None, run: str | None = None, there: set[str] | None = None
    ) -> None:
        self._digest, self._within, self._run, self._there = digest, within, run, there
        self.units: set[int] = set()
        self.sums: defaultdict[int, int] = defaultdict(int)  # of arrays, as positions in the plan
        self.taken: set[str] = set()  # journals' names
        self._files: defaultdict[int, dict[str, int]] = defaultdict(dict)  # of each writer, in order
        self._entries: defaultdict[int, list[Entry]] = defaultdict(list)

    def take(self, store: ObjectStore, prefixes: Iterable[str]) -> None:
        """Reads the journals of these names."""
        for prefix in prefixes:
            names = store.names(prefix)
            for name, text in zip(names, store.read_all(names), strict=True):
                match = _JOURNAL.fullmatch(name)
                if match and text is not None:
                    with suppress(ValueError, TypeError, KeyError, IndexError):
                        self._take(name, int(match[1]), match[2], json.loads(text))

    def _take(self, name: str, writer: int, run: str, record: dict[str, Any]) -> None:
        units, sums = set(map(int, record["units"])), [(int(a), int(s)) for a, s in record["sums"]]
        files = [str(file) for file in record["files"]]
        chunks = [(str(key), int(offset), int(n), files[f]) for key, offset, n, f in record["chunks"]]
        known = self._within is None or units <= self._within or run == self._run
        whole = self._there is None or all(_object(writer, file) in self._there for file in files)
        if record["plan"] != self._digest or units & self.units or not known or not whole:
            return
        self.taken.add(name)
        self.units |= units
        numbers = self._files[writer]
        for file in files:
            numbers.setdefault(file, len(numbers))
        self._entries[writer] += [Entry(key, offset, n, numbers[file]) for key, offset, n, file in chunks]
        for array, value in sums:
            self.sums[array] = checksum.add(self.sums[array], value)

    def told(self) -> dict[int, Any]:
        """The writers' states, as JSON."""
        return {writer: [list(files), self._entries[writer]] for writer, files in self._files.items()}


def _states(told: dict[str, Any]) -> dict[int, WriterState]:
    """What `_Found.told` has told."""
    return {
        int(k): WriterState(tuple(files), tuple(Entry(*e) for e in entries)) for k, (files, entries) in told.items()
    }


def _object(writer: int, file: str) -> str:
    return f"{STEP}/items/ocdbt.process_{writer}/d/{file}"


class _Journal:
    """One writer's journal. A unit waits in it until all objects that hold its chunks are whole. Not for several
    threads."""

    def __init__(self, unfinished: RemoteUnfinished, number: int, writer: ItemsWriter) -> None:
        assert isinstance(writer.data, ObjectData)
        self._store, self._digest, self._data = unfinished.store, unfinished.digest, writer.data
        self._name = f"{_JOURNALS}{number}/{unfinished.run}."
        self._waiting: deque[tuple[int, int, Sequence[Entry], int]] = deque()
        self._count = 0
        self._pending: tuple[str, Any] | None = None  # the object that is being written

    def add(self, unit: int, array: int, chunks: Sequence[Entry], total: int) -> None:
        self._waiting.append((unit, array, chunks, total))
        if self._pending is None or self._pending[1].done():
            self._note()

    def _note(self) -> None:
        """Begins to write down what is durable by now."""
        self._settle()
        whole, units, chunks = self._data.whole, list[int](), list[Entry]()
        sums: defaultdict[int, int] = defaultdict(int)
        while self._waiting and all(c.file < whole for c in self._waiting[0][2]):
            unit, array, some, total = self._waiting.popleft()
            units.append(unit)
            chunks += some
            sums[array] = checksum.add(sums[array], total)
        if units:
            files = sorted({c.file for c in chunks})
            numbers = {file: n for n, file in enumerate(files)}
            record = {
                "plan": self._digest,
                "units": units,
                "sums": list(sums.items()),
                "files": [self._data.files[file] for file in files],
                "chunks": [[c.key, c.offset, c.length, numbers[c.file]] for c in chunks],
            }
            name = f"{self._name}{self._count}"
            self._count += 1
            text = json.dumps(record, separators=(",", ":"))
            self._pending = name, self._store.start(name, text.encode())

    def _settle(self) -> None:
        if self._pending is not None:
            self._store.finish(*self._pending)
            self._pending = None

    def flush(self) -> None:
        """Makes everything added durable, and the journal of it."""
        self._data.sync()
        self._note()
        self._settle()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.flush()
        else:  # what is done is kept, if that is still possible; the error is what is said
            with suppress(OSError, RuntimeError, InputError):
                self.flush()
