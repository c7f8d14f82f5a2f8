"""A checkpoint in an object store: TensorStore's key-value stores are the transport, an object is written whole or not at all.

Objects cannot grow, so a writer gathers chunks in memory, and sends an object when it has enough; the next one fills
while that one is under way, and no more than one is. TensorStore copies what it is given: a writer holds twice
`object_bytes`, or twice the largest chunk, which is an object by itself.

An object store has no rename. As Orbax does there, a checkpoint is written where it stays, and what says that it is
finished is written last: `items/commit_success.txt`, `_CHECKPOINT_METADATA`, then `commit_success.txt` of the step, without
which Orbax takes it for unfinished (orbax-checkpoint 0.12.8, `CommitFileTemporaryPath`). So an older checkpoint of the
same name loses these first.

TensorStore, which starts threads, is loaded by the first request, and for each process anew: workers are forked before.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from io import BytesIO
from typing import Any

from ckptc.diagnostics import InputError, fail
from ckptc.storage.sink.directory import Data, words
from ckptc.storage.sink.file import BulkFile

RETRIES = 6  # of a request that failed in passing; with growing pauses, half a minute
PATIENCE = 300  # seconds that one request may take, retries included; the first of a run has
PATIENCE_AT_FIRST = 60
AT_ONCE = 256  # requests begun before the first of them is waited for
MARKER = "commit_success.txt"
_METADATA = "_CHECKPOINT_METADATA"


class ObjectStore:
    """Objects whose names follow a prefix, and as a `Place`, a checkpoint of theirs.

    `spec`: TensorStore's specification of a key-value store, its `path` empty or ending with a slash. `shown`: the URL
    of that, without the slash, for messages. `object_bytes`: what data objects should have.

    Every method raises InputError `output-store`, with the store's own words, when the store refuses or is silent.
    """

    def __init__(self, spec: dict[str, Any], shown: str, object_bytes: int) -> None:
        self._spec, self.shown, self.object_bytes = spec, shown, object_bytes
        self._opened: tuple[int, Any] | None = None  # by which process, and what
        self._listed: tuple[str, set[str]] | None = None

    def below(self, name: str) -> ObjectStore:
        """The objects whose names begin with this one, which ends with a slash."""
        return ObjectStore(self.spec(name), f"{self.shown}/{name[:-1]}", self.object_bytes)

    def spec(self, below: str) -> dict[str, Any]:
        retries = {"max_retries": RETRIES, "initial_delay": "500ms", "max_delay": "16s"}
        context = {"gcs_request_retries": retries} if self._spec["driver"] == "gcs" else {}
        return {**self._spec, "path": self._spec["path"] + below, "context": context}

    def result(self, future: Any, below: str) -> Any:
        return self._result(future, f"read {self.shown}/{below}")

    def probe(self) -> None:
        """Proves that objects can be written here, and deleted: the bucket is there, and open to this user."""
        name = f".ckptc-probe-{secrets.token_hex(8)}"
        self._result(self._begin(name, b"ckptc"), f"write to {self.shown}", PATIENCE_AT_FIRST)
        self._result(self._begin(name, None), f"delete from {self.shown}", PATIENCE_AT_FIRST)

    def write(self, name: str, *parts: bytes) -> None:
        self.finish(name, self.start(name, b"".join(parts)))

    def start(self, name: str, value: bytes) -> Any:
        """Begins to write an object, of a copy of `value`; `finish` waits for the future that this returns."""
        return self._begin(name, value)

    def finish(self, name: str, future: Any) -> None:
        self._result(future, f"write {self.shown}/{name}")

    def read(self, name: str) -> bytes | None:
        """An object's content; None when there is none."""
        return next(self.read_all([name]))

    def read_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """The content of each object, as `read`."""
        for some in _batches(names):
            for name, future in [(name, self._kv().read(self._spec["path"] + name)) for name in some]:
                result = self._result(future, f"read {self.shown}/{name}")
                yield None if result.state == "missing" else bytes(result.value)

    def names(self, below: str) -> list[str]:
        import tensorstore as ts

        # By whole names, so that a store that does not know ranges, and lists all it has, is understood, too.
        path, first = self._spec["path"], self._spec["path"] + below
        end = first[:-1] + chr(ord(first[-1]) + 1) if first else ""
        found = self._result(self._kv().list(ts.KvStore.KeyRange(first, end)), f"list {self.shown}/{below}")
        names = (name.decode() for name in found)
        return sorted(name[len(path) :] for name in names if name.startswith(first))

    def holds(self, name: str, size: int) -> bool:
        """An object that is there is whole."""
        below = name[: name.rindex("/") + 1]
        if self._listed is None or self._listed[0] != below:
            self._listed = below, set(self.names(below))
        return name in self._listed[1]

    def delete(self, names: Sequence[str]) -> None:
        """Deletes objects, in no order."""
        for some in _batches(names):
            for name, future in [(name, self._begin(name, None)) for name in some]:
                self._result(future, f"delete {self.shown}/{name}")

    def data(self, below: str, files: Sequence[str], end: int) -> Data:
        return ObjectData(self, f"{below}d/", files)

    def reserved(self, name: str, size: int) -> BulkFile:
        raise NotImplementedError("an object is written once, whole: nothing writes pieces into it")

    def supersede(self, kept: Collection[str]) -> None:
        """First what makes an older checkpoint a finished one, then all else that is not `kept`."""
        there = self.names("")
        markers = [name for name in there if name.rpartition("/")[2] in (MARKER, _METADATA)]
        for name in sorted(markers, key=lambda name: (name.count("/"), name.endswith(_METADATA))):
            self.delete([name])
        self.delete([name for name in there if name not in kept and name not in markers])

    def _kv(self) -> Any:
        """All of the store: names there begin with the path."""
        if self._opened is None or self._opened[0] != os.getpid():
            import tensorstore as ts

            spec = {**self.spec(""), "path": ""}
            try:
                future = ts.KvStore.open(spec)
            except ValueError as error:  # a bucket's name that cannot be one
                raise refused(f"open {self.shown}", words(error)) from None
            self._opened = os.getpid(), self._result(future, f"open {self.shown}")
        return self._opened[1]

    def _begin(self, name: str, value: bytes | None) -> Any:
        return self._kv().write(self._spec["path"] + name, value)

    def _result(self, future: Any, doing: str, patience: float = PATIENCE) -> Any:
        try:
            return future.result(timeout=patience)
        except TimeoutError:
            said = f"no answer within {patience:.0f} seconds"
        except Exception as error:  # TensorStore has no common class: ValueError, OSError, and its own
            said = words(error)
        raise refused(doing, said)


def refused(doing: str, said: str) -> InputError:
    """`output-store`, to raise: what could not be done, and the store's own words."""
    if said.startswith("NOT_FOUND"):
        help = "create the bucket, or correct its name"
    elif said.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
        help = (
            "log in with `gcloud auth application-default login`, or name a key file in GOOGLE_APPLICATION_CREDENTIALS; it "
            "takes the right to create, read, list and delete objects"
        )
    else:
        help = "check the URL, the network and the credentials"
    help += "; what is done is kept, and the same command goes on from there"
    return fail("output-store", f"cannot {doing}: {said}", help=help)


class ObjectData:
    """Data objects: one fills while the one before is written. Not for several threads at once."""

    eager = True  # always: an object that is written is durable

    def __init__(self, store: ObjectStore, below: str, files: Sequence[str]) -> None:
        self._store, self._below = store, below
        self.files = list(files)
        self._buffer, self._size = BytesIO(), 0
        self._flying: Any = None
        self._whole = len(files)  # files that are durable

    @property
    def whole(self) -> int:
        """How many of `files`, from the first, are durable."""
        if self._flying is not None and self._flying.done():
            self._settle()
        return self._whole

    def append(self, view: memoryview) -> tuple[int, int]:
        if self._size and self._size + view.nbytes > self._store.object_bytes:
            self._send()
        if not self._size:
            self.files.append(secrets.token_hex(16))
        offset = self._size
        self._buffer.write(view)
        self._size += view.nbytes
        if self._size >= self._store.object_bytes:
            self._send()
        return len(self.files) - 1, offset

    def sync(self) -> None:
        if self._size:
            self._send()
        self._settle()

    def close(self) -> bool:
        self.sync()
        return bool(self.files)

    def _send(self) -> None:
        self._settle()
        # `getvalue` shares the buffer's memory, which is freed as soon as TensorStore has its copy.
        buffer, self._buffer, self._size = self._buffer, BytesIO(), 0
        self._flying = self._store.start(self._below + self.files[-1], buffer.getvalue())

    def _settle(self) -> None:
        """Waits for the object that is being written."""
        if self._flying is not None:
            self._store.finish(self._below + self.files[self._whole], self._flying)
            self._flying = None
            self._whole += 1


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for begin in range(0, len(names), AT_ONCE):
        yield names[begin : begin + AT_ONCE]
