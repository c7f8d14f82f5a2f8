"""A repository of the Hugging Face Hub as a source: at one commit, nothing of it kept on this machine but its headers.

The commit is asked for once. Headers come in one answer where the Hub has it ready, else with one range a shard, several
at a time, and are kept by commit below `$XDG_CACHE_HOME/ckptc/hub` (else `~/.cache`): compiling again needs no network.
config.json, the index and the tokenizer go through the Hub's own cache. Weights are read where they are: from that cache
if they are in it, else in ranges from the Hub, straight into the workers' buffers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptc.diagnostics import InputError, fail
from ckptc.ir.source import SourceFile
from ckptc.storage.source.base import Start
from ckptc.storage.source.files import FIRST_READ, HEADER_THREADS, MAX_HEADER, refuse, shown
from ckptc.storage.source.hub_client import (
    COMMIT,
    SCHEME,
    Client,
    Commit,
    HubFile,
    constants,
    header_bytes,
    library,
    parse_name,
    refusals,
)
from ckptc.storage.source.hub_ranges import HubRanges
from ckptc.storage.source.ranges import RangeReader
from ckptc.storage.source.remembered import cache_home

INDEX = "model.safetensors.index.json"
WHOLE = "sha256:"  # begins what tells a file from others, where it is the digest of all of it


def is_repository(name: str | Path) -> bool:
    """Whether a source's name is a repository's: it says so, or has the form of one and no such directory is there."""
    if isinstance(name, Path):
        return False
    return name.startswith(SCHEME) or (parse_name(name) is not None and not os.path.lexists(name))


class Repository:
    """A repository at one commit."""

    def __init__(self, name: str, on_wait: Callable[[str], None] | None = None) -> None:
        found = parse_name(name)
        if found is None:
            raise fail(
                "hub-name", f"{shown(name)} is not the name of a repository", help="write it hf://ORG/NAME or hf://ORG/NAME@REVISION"
            )  # fmt: skip
        self.name, self.client = found, Client()
        self.note = ""  # what a user should know of how the commit was found
        self._on_wait = on_wait
        self._heads: dict[str, bytes] = {}
        self.addresses: dict[str, str] = {}  # of files, which expire

    def __str__(self) -> str:
        return f"{SCHEME}{self.name.repo}@{self.commit.sha}"

    @property
    def local(self) -> None:
        return None

    @cached_property
    def commit(self) -> Commit:
        """The commit that the revision is; the last one that was seen, where the Hub cannot be reached."""
        if self.name.revision and COMMIT.fullmatch(self.name.revision) and (kept := self._kept(self.name.revision)):
            return kept
        try:
            commit = self.client.commit(self.name)
        except InputError as error:
            kept = self._kept(self._last_seen())
            if kept is None or error.diagnostics[0].code not in ("hub-offline", "hub-unreachable"):
                raise
            self.note = f"the Hub cannot be reached: reads commit {kept.sha}, the last that was seen here"
            return kept
        self._keep(
            "commits", commit.sha, json.dumps([commit.sha, {n: list(f) for n, f in commit.files.items()}]).encode()
        )
        self._keep("revisions", self.name.revision or "", commit.sha.encode())
        return commit

    def names(self) -> list[str]:
        return sorted(name for name in self.commit.files if "/" not in name)

    def read(self, name: str, most: int) -> Iterator[bytes] | None:
        file = self.commit.files.get(name)
        if file is None:
            return None
        if file.size > most:
            help = f"look at it on the Hub; it is in {self}"
            message = f"{shown(name)} is too large to be what its name says"
            raise refuse("too-large", message, f"at most {most} bytes", f"{file.size} bytes", help)
        return iter([self.client.small_file(self.commit, name)])

    def starts(self, names: Sequence[str]) -> Iterator[tuple[str, Start | InputError]]:
        kept = self._read("heads", self.commit.sha)
        if kept is not None:
            self._heads = _unpacked(kept)
        if any(name not in self._heads for name in names):
            self._fetch_heads(names)
            self._keep("heads", self.commit.sha, _packed(self._heads))
        for name in names:
            if name not in self._heads:
                yield name, _missing(name, self)
            else:
                yield name, (self.commit.files[name].size, self._heads[name][:FIRST_READ])

    def header(self, name: str, head: bytes) -> Iterator[bytes]:
        return iter([self._heads[name]])

    def _fetch_heads(self, names: Sequence[str]) -> None:
        wanted = [name for name in names if name in self.commit.files]
        if len(wanted) > 1 and (headers := self.client.all_headers(self.commit, INDEX)) is not None:
            for name in wanted:
                found = header_bytes(headers.get(name, {}), self.commit.files[name].size)
                if found is not None and len(found[1]) <= (length := found[0] - 8):
                    self._heads[name] = length.to_bytes(8, "little") + found[1].ljust(length)
        with (
            HubRanges(self.client, self.commit, self._on_wait, self.addresses) as ranges,
            ThreadPoolExecutor(HEADER_THREADS) as threads,
        ):

            def fetch(name: str) -> None:
                size = self.commit.files[name].size
                head = bytearray(min(size, FIRST_READ))
                ranges.read_into(name, 0, memoryview(head))
                length = min(size, 8 + int.from_bytes(head[:8], "little"))
                if len(head) < length <= 8 + MAX_HEADER:
                    rest = bytearray(length - len(head))
                    ranges.read_into(name, len(head), memoryview(rest))
                    head += rest
                self._heads[name] = bytes(head[:length])

            list(threads.map(fetch, [name for name in wanted if name not in self._heads]))

    def identified(self, file: SourceFile) -> SourceFile:
        """The file by the digest that the commit lists, which is of all of it, header and weights."""
        known = self.commit.files[file.name]
        digest = WHOLE + (known.sha256 or hashlib.sha256(f"{known.blob} {known.size}".encode()).hexdigest())
        return replace(file, header_digest=digest, content=digest)

    def ranges(self, files: Sequence[SourceFile], once: bool) -> _Ranges:
        return _Ranges(self, files, once)

    def check_unchanged(self, files: Sequence[SourceFile]) -> None:
        """A commit does not change; but this may be another one than the files are of."""
        lines = [f"{f.name}: not in it" for f in files if f.name not in self.commit.files]
        lines += [
            f"{f.name}: {f.content} expected, {now.content} found"
            for f in files
            if f.name in self.commit.files and (now := self.identified(f)).content != f.content
        ]
        if lines:
            raise fail(
                "source-changed", f"{self} does not hold the files that the plan was made from", notes=lines[:8],
                help="give the commit that the plan names, or compile it again",
            )  # fmt: skip

    def fetch(self, files: Sequence[str], on_file: Callable[[str], None]) -> None:
        """Downloads files into the Hub's cache of this machine, as its own client does: what is there is not fetched again."""
        for name in files:
            on_file(name)
            with refusals(self.name, name):
                library().hf_hub_download(self.name.repo, name, revision=self.commit.sha)

    # What is kept on this machine: a convenience, and only that.

    def _entry(self, kind: str, key: str) -> Path | None:
        home = cache_home()
        if home is None:
            return None
        endpoint = constants().ENDPOINT
        repo = hashlib.sha256(f"{endpoint} {self.name.repo}".encode()).hexdigest()
        return home / "hub" / repo / kind / hashlib.sha256(key.encode()).hexdigest()

    def _keep(self, kind: str, key: str, content: bytes) -> None:
        if (entry := self._entry(kind, key)) is None:
            return
        with suppress(OSError):
            entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=entry.parent, prefix=".new-")
            with open(descriptor, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, entry)

    def _read(self, kind: str, key: str) -> bytes | None:
        if (entry := self._entry(kind, key)) is None:
            return None
        with suppress(OSError):
            content = entry.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                return content[32:]
        return None

    def _last_seen(self) -> str:
        return (self._read("revisions", self.name.revision or "") or b"").decode()

    def _kept(self, sha: str) -> Commit | None:
        kept = self._read("commits", sha) if sha else None
        if kept is None:
            return None
        sha, files = json.loads(kept)
        return Commit(self.name, sha, {name: HubFile(*file) for name, file in files.items()})


class _Ranges:
    """Ranges of a repository's files: from the Hub's cache on this machine where they are there, else from the Hub."""

    def __init__(self, repository: Repository, files: Sequence[SourceFile], once: bool) -> None:
        self._names = [f.name for f in files]
        self._remote = HubRanges(repository.client, repository.commit, repository._on_wait, repository.addresses)
        self._local: dict[int, tuple[RangeReader, int]] = {}
        by_directory: dict[Path, list[int]] = {}
        for number, file in enumerate(files):
            path = repository.client.cached(repository.commit, file.name)
            if path is not None and os.path.getsize(path) == file.size:
                root = Path(path[: -len(file.name)]) if path.endswith(file.name) else Path(path).parent
                by_directory.setdefault(root, []).append(number)
        self._readers = []
        for root, numbers in by_directory.items():
            reader = RangeReader(root, [files[n] for n in numbers], once=once)
            self._readers.append(reader)
            self._local |= {n: (reader, k) for k, n in enumerate(numbers)}

    @property
    def bytes_read(self) -> int:
        return self._remote.bytes_read + sum(r.bytes_read for r in self._readers)

    @property
    def from_disk(self) -> bool:
        return any(r.from_disk for r in self._readers)

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        if file in self._local:
            reader, number = self._local[file]
            reader.read_into(number, offset, buffer)
        elif buffer.nbytes:
            with buffer.cast("B") as view:
                self._remote.read_into(self._names[file], offset, view)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._remote.close()
        for reader in self._readers:
            reader.close()


def _missing(name: str, repository: Repository) -> InputError:
    return refuse(
        "source-missing", f"{shown(name)} does not exist", f"a file in {repository}", "nothing", "give another revision"
    )  # fmt: skip


def _packed(heads: dict[str, bytes]) -> bytes:
    names = json.dumps([[name, len(head)] for name, head in heads.items()]).encode()
    return len(names).to_bytes(8, "little") + names + b"".join(heads.values())


def _unpacked(content: bytes) -> dict[str, bytes]:
    at = 8 + int.from_bytes(content[:8], "little")
    heads = {}
    for name, length in json.loads(content[8:at]):
        heads[name] = content[at : at + length]
        at += length
    return heads
