"""Safetensors in a bucket of Google Cloud Storage as a source: `gs://bucket/path`, nothing of it kept on this machine.

TensorStore's key-value store is the transport, with its credentials and its retries. What tells an object from others is
its generation, a number that the store gives anew whenever the object is written, even with the same bytes
(https://cloud.google.com/storage/docs/metadata#generation-number). The plan records it, every file is compared before and
after a run, and so is every range whose answer states it.

TensorStore says no object's size, and answers no range that ends past one. So a file has the size that its header
says where its last byte is there and the one after it is not; of a file for which that does not hold, the size is searched.

It has threads, and a program that forks workers must not: all but ranges is asked for in a forked process
(`ckptc.storage.forked_call`). Ranges are read by the workers themselves, who open the store when they first need it.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ir.source import SourceFile
from ckptc.storage.forked_call import forked_call
from ckptc.storage.source.base import Start
from ckptc.storage.source.content import GENERATION
from ckptc.storage.source.files import FIRST_READ, MAX_HEADER, RECOMPILE, problem, refuse, shown

SCHEME = "gs://"
PIECE = 8 << 20  # bytes of one request, at most
IN_FLIGHT = 4  # pieces that one reader fetches at once
AT_ONCE = 64  # files looked into at once
RETRIES = 6  # of a request that failed in passing; with growing pauses, half a minute
PATIENCE = 300  # seconds that one request may take, retries included
_NAME = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])((?:/[^/]+)*)/?")
_LARGEST = 5 << 40  # bytes of an object, at most: https://cloud.google.com/storage/quotas#objects
_PAST_END = ("OUT_OF_RANGE", "FAILED_PRECONDITION")  # how the answer to a range begins that ends past the object
_Item = TypeVar("_Item")


class Objects:
    """The objects whose names begin with a path, as one process asks for them."""

    def __init__(self, url: str) -> None:
        """`url`: `gs://bucket/path`, without a slash at its end."""
        self.url = url
        bucket, slash, path = url.removeprefix(SCHEME).partition("/")
        self._bucket, self._path = bucket, path + slash
        self._opened: tuple[int, Any] | None = None  # by which process, and what

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> Any:
        """Begins to read an object, or a range of it. `result` waits for the future that this returns."""
        which = {} if end is None else {"byte_range": slice(begin, end)}
        return self._kv().read(self._path + name, **which)

    def generation(self, name: str) -> Any:
        """Begins to ask for an object's generation, which an empty range has, too."""
        return self.read(name, 0, 0)

    def result(self, future: Any, name: str) -> Any:
        """What was read. Raises InputError, and LookupError where the range ends past the object."""
        try:
            return future.result(timeout=PATIENCE)
        except TimeoutError:
            raise refused(self.url, name, f"no answer within {PATIENCE} seconds") from None
        except Exception as error:  # TensorStore has no common class: ValueError, OSError, and its own
            said = str(error)
            if said.startswith(_PAST_END):
                raise LookupError(said) from None
            raise refused(self.url, name, said) from None

    def names(self) -> list[str]:
        """The names of objects directly below the path, sorted."""
        import tensorstore as ts

        end = f"{self._path[:-1]}0" if self._path else ""  # what follows a slash
        found = self.result(self._kv().list(ts.KvStore.KeyRange(self._path, end)), "")
        inside = [name.decode("utf-8", "replace") for name in found]
        if not inside:  # TensorStore takes a refusal to list for an empty list; one to read it says
            self.result(self.generation("config.json"), "")
        below = [name[len(self._path) :] for name in inside if name.startswith(self._path)]
        return sorted(name for name in below if name and "/" not in name)

    def has(self, name: str, at: int) -> bool:
        """Whether an object has a byte there."""
        try:
            return bool(self.result(self.read(name, at, at + 1), name).value)
        except LookupError:
            return False

    def size(self, name: str) -> int:
        """An object's size in bytes, searched for."""
        low, high = 0, 1  # it has all bytes below `low`
        while high < _LARGEST and self.has(name, high - 1):
            low, high = high, 2 * high
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.has(name, middle - 1) else (low, middle)
        return low

    def _kv(self) -> Any:
        """The whole bucket."""
        if self._opened is None or self._opened[0] != os.getpid():
            import tensorstore as ts

            if "byte_range" not in (ts.KvStore.read.__doc__ or ""):
                help = "install tensorstore 0.1.82 or later"
                raise fail("bucket-library", "the installed TensorStore reads objects whole only", help=help)
            retries = {"max_retries": RETRIES, "initial_delay": "500ms", "max_delay": "16s"}
            spec = {"driver": "gcs", "bucket": self._bucket, "context": {"gcs_request_retries": retries}}
            try:
                opening = ts.KvStore.open(spec)
            except ValueError as error:  # a bucket's name that cannot be one
                raise refused(self.url, "", str(error)) from None
            self._opened = os.getpid(), self.result(opening, "")
        return self._opened[1]


class Bucket:
    """The files below a path of a bucket. The store is asked for their names once, and for what they begin with."""

    def __init__(self, name: str) -> None:
        found = _NAME.fullmatch(name)
        if found is None:
            raise fail("bucket-name", f"{shown(name)} is not a place in a bucket", help="write it gs://BUCKET/PATH")
        self.url = f"{SCHEME}{found[1]}{found[2]}"
        self._objects = Objects(self.url)
        self._names: list[str] | None = None
        self._heads: dict[str, bytes] = {}
        self._generations: dict[str, str] = {}

    def __str__(self) -> str:
        return self.url

    @property
    def local(self) -> Path | None:
        return None

    def names(self) -> list[str]:
        """Raises `bucket-missing` where there is nothing, and what `refused` makes."""
        if self._names is None:
            self._names = forked_call(self._objects.names)
            if not self._names:
                help = "give the place that holds config.json and the safetensors files"
                raise fail("bucket-missing", f"there is nothing at {self}", notes=("found: no objects",), help=help)
        return self._names

    def read(self, name: str, most: int) -> Iterator[bytes] | None:
        if name not in self.names():
            return None

        def look() -> str | None:
            if self._objects.has(name, most):
                message = f"{shown(name)} is too large to be what its name says"
                raise refuse("too-large", message, f"at most {most} bytes", "more", f"look at it in {self}")
            found = self._objects.result(self._objects.read(name), name)
            return None if found.state == "missing" else b64encode(found.value).decode()

        content = forked_call(look)
        if content is None:
            raise InputError([_missing(self.url, name)])
        return iter([b64decode(content)])

    def starts(self, names: Sequence[str]) -> Iterator[tuple[str, Start | InputError]]:
        there = set(self.names())
        wanted = [name for name in names if name in there]
        found = dict(zip(wanted, forked_call(lambda: list(_heads(self._objects, wanted))), strict=True))
        for name in names:
            if found.get(name) is None:
                yield name, InputError([_missing(self.url, name)])
                continue
            size, generation, head = found[name]
            self._heads[name], self._generations[name] = b64decode(head), generation
            yield name, (size, self._heads[name][:FIRST_READ])

    def header(self, name: str, head: bytes) -> Iterator[bytes]:
        return iter([self._heads.pop(name)])

    def identified(self, file: SourceFile) -> SourceFile:
        """The file by its generation, as it was when its header was read."""
        return replace(file, content=self._generations[file.name])

    def ranges(self, files: Sequence[SourceFile], once: bool) -> BucketRanges:
        return BucketRanges(self.url, files)

    def check_unchanged(self, files: Sequence[SourceFile]) -> None:
        """Raises `source-missing` or `source-changed`, a diagnostic for each file."""
        names = [f.name for f in files]
        now = forked_call(lambda: list(_generations(self._objects, names)))
        problems = [p for f, g in zip(files, now, strict=True) if (p := _compared(self.url, f, g)) is not None]
        if problems:
            raise InputError(problems)


class BucketRanges:
    """Ranges of a bucket's objects, straight into the caller's buffers; of the generation that the plan records.

    A range is read in pieces, some of them at once; TensorStore has a copy of each until it is in the buffer.
    """

    from_disk = False

    def __init__(self, url: str, files: Sequence[SourceFile]) -> None:
        self._objects, self._files = Objects(url), tuple(files)
        self.bytes_read = 0

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Raises InputError: `source-missing`, `source-changed`, and what `refused` makes."""
        if not buffer.nbytes:  # which `cast` refuses
            return
        record = self._files[file]
        pending: deque[tuple[int, Any]] = deque()
        with buffer.cast("B") as view:
            for begin in range(0, len(view), PIECE):
                end = min(begin + PIECE, len(view))
                pending.append((begin, self._objects.read(record.name, offset + begin, offset + end)))
                if len(pending) >= IN_FLIGHT:
                    self._take(record, pending.popleft(), view)
            while pending:
                self._take(record, pending.popleft(), view)

    def _take(self, record: SourceFile, piece: tuple[int, Any], view: memoryview) -> None:
        begin, future = piece
        try:
            found = self._objects.result(future, record.name)
        except LookupError as error:
            raise InputError([_changed(record, f"it is shorter: {error}"[:200])]) from None
        stated = None if found.state == "missing" else generation_of(found.stamp.generation)
        if stated != "" and (wrong := _compared(self._objects.url, record, stated)):
            raise InputError([wrong])
        view[begin : begin + len(found.value)] = found.value
        self.bytes_read += len(found.value)

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def is_bucket(name: str | Path) -> bool:
    """Whether a source's name is a place in a bucket."""
    return isinstance(name, str) and name.startswith(SCHEME)


def generation_of(stamp: bytes) -> str:
    """`SourceFile.content` from TensorStore's stamp of what was read: a byte of flags, and the number (u64, little-endian).
    Empty where the answer did not state it."""
    number = int.from_bytes(stamp[1:9], "little")
    return f"{GENERATION}{number}" if number else ""


def _heads(objects: Objects, names: Sequence[str]) -> Iterator[tuple[int, str, str] | None]:
    """Of each object its size, its generation, and its length field and header in base64; None where it is gone."""
    for some in _batches(names):
        lengths = [(name, objects.read(name, 0, 8), objects.generation(name)) for name in some]
        begun = []
        for name, first, stating in lengths:
            stamp = objects.result(stating, name)
            try:
                found = objects.result(first, name)
                length = int.from_bytes(found.value, "little") if found.value else 0
            except LookupError:  # it has fewer than 8 bytes
                found, length = objects.result(objects.read(name), name), 0
            rest = objects.read(name, 8, 8 + length) if 0 < length <= MAX_HEADER else None
            begun.append((name, stamp, found.value, rest))
        for name, stamp, head, rest in begun:
            if stamp.state == "missing":
                yield None
                continue
            stated = generation_of(stamp.stamp.generation)
            size = None
            if rest is not None:
                try:
                    found = objects.result(rest, name)
                    head += found.value
                    if generation_of(found.stamp.generation) not in ("", stated):
                        raise InputError(
                            [_changed(SourceFile(name, 0, "", stated), "it was written while it was read")]
                        )
                    size = _expected_size(objects, name, head)
                except LookupError:  # its header ends past its end
                    pass
            yield objects.size(name) if size is None else size, stated, b64encode(head).decode()


def _expected_size(objects: Objects, name: str, head: bytes) -> int | None:
    """Where the header says that its data ends, if the object ends there."""
    try:
        entries = json.loads(head[8:])
        size = len(head) + max(
            (int(e["data_offsets"][1]) for n, e in entries.items() if n != "__metadata__"), default=0
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None  # what is wrong with it is said by those who read it
    if not len(head) <= size < _LARGEST:
        return None
    return size if objects.has(name, size - 1) and not objects.has(name, size) else None


def _generations(objects: Objects, names: Sequence[str]) -> Iterator[str | None]:
    for some in _batches(names):
        for name, future in [(name, objects.generation(name)) for name in some]:
            found = objects.result(future, name)
            yield None if found.state == "missing" else generation_of(found.stamp.generation)


def _compared(url: str, file: SourceFile, now: str | None) -> Diagnostic | None:
    """What is wrong with a file that is `now` of this generation; None where it is gone."""
    if now is None:
        return _missing(url, file.name)
    return None if now == file.content else _changed(file, now)


def _changed(file: SourceFile, found: str) -> Diagnostic:
    message = f"{shown(file.name)} is not the file the plan was made from"
    return problem("source-changed", message, file.content or "no generation", found, RECOMPILE)


def _missing(url: str, name: str) -> Diagnostic:
    help = "put it back, or give the place that holds it"
    return problem("source-missing", f"{shown(name)} does not exist", f"an object in {url}", "nothing", help)


def refused(url: str, name: str, said: str) -> InputError:
    """To raise: the store refused, or is silent. `said`: TensorStore's words."""
    reason = re.split(r" \[(?:source locations|tensorstore_spec|http_response_\w+)=|\n", said, maxsplit=1)[0][:200]
    place, notes = f"{url}/{name}" if name else url, (f"found: {reason}",)
    login = "`gcloud auth application-default login`, or name a key file in GOOGLE_APPLICATION_CREDENTIALS"
    if said.startswith("NOT_FOUND"):
        return fail("bucket-missing", f"there is no {place}", notes=notes, help="check the names of bucket and path")
    if said.startswith("UNAUTHENTICATED") or "http_response_code='401'" in said:
        return fail(
            "bucket-no-credentials", f"{place} is not open to everyone", notes=notes, help=f"log in with {login}"
        )
    if said.startswith("PERMISSION_DENIED"):
        help = f"ask for the right to list and read its objects, or log in as another user: {login}"
        return fail("bucket-no-access", f"this user may not read {place}", notes=notes, help=help)
    help = "check the network and the name; the same command goes on from where it stopped"
    return fail("bucket-unreachable", f"{place} cannot be read", notes=notes, help=help)


def _batches(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    for begin in range(0, len(items), AT_ONCE):
        yield items[begin : begin + AT_ONCE]
