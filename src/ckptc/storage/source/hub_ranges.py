"""Ranges of the Hub's files, straight into the caller's buffers: no file on this machine, each byte fetched once.

    file ─► /resolve: a signed address, kept until the storage refuses it ─► `Range` requests over pooled connections

A range is fetched in pieces over several connections at once. A piece whose connection breaks, whose answer is short or
that no byte comes of for a while goes on at the byte where it stopped. What a server asks for (429 with Retry-After, 5xx)
is waited for, and longer each time, up to `PATIENCE` tries without a byte. Every answer must say that it is the range
that was asked for, of a file of the size that the commit lists: never a wrong byte.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from ckptc.diagnostics import InputError, fail
from ckptc.storage.source.hub_client import (
    TIMEOUT,
    Client,
    Commit,
    constants,
    hidden_commit,
    library,
    page,
    refusals,
    transport_errors,
)

PIECE = 8 << 20  # bytes of one request, at most
CONNECTIONS = 4  # pieces fetched at once by one reader
PATIENCE = 8  # tries without a byte, before the Hub is said not to answer
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a second try, and before any other

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_AGAIN = (408, 429, 500, 502, 503, 504)


class HubRanges:
    """Ranges of a commit's files. Safe from several threads; a context manager that ends its threads."""

    def __init__(
        self,
        client: Client,
        commit: Commit,
        on_wait: Callable[[str], None] | None = None,
        addresses: dict[str, str] | None = None,
    ) -> None:
        """`addresses`: where files were found to be already; what is found out is added."""
        self._client, self._commit = client, commit
        self._on_wait = on_wait or (lambda _: None)
        self._addresses = {} if addresses is None else addresses
        self._lock = threading.Lock()  # guards `_addresses` and `bytes_read`
        self._threads = ThreadPoolExecutor(CONNECTIONS)
        self._closed = threading.Event()
        self.bytes_read = 0  # delivered into buffers

    def __enter__(self) -> HubRanges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fills `view` (writable bytes) from byte `offset` of the file on.

        Raises InputError: what `refusals` says, `source-changed` for a file of another size, `hub-no-ranges`,
        `hub-refused` or `hub-unreachable` after `PATIENCE` tries.
        """
        pieces = [(at, min(at + PIECE, len(view))) for at in range(0, len(view), PIECE)]
        if len(pieces) == 1:
            self._piece(name, offset, view)
            return
        made = [self._threads.submit(self._piece, name, offset + a, view[a:b]) for a, b in pieces]
        errors = [error for one in made if (error := one.exception()) is not None]  # all have ended: the buffer is free
        if errors:
            raise errors[0]

    def _piece(self, name: str, offset: int, view: memoryview) -> None:
        done = tries = 0
        while done < len(view):
            if self._closed.is_set():
                raise InterruptedError(f"the reader of {self._commit.name} is closed")
            address = self._address(name)
            count, found, wait = self._try(address, name, offset + done, view[done:])
            done += count
            with self._lock:
                self.bytes_read += count
            if done == len(view):
                return
            tries = 0 if count else tries + 1  # what came so far and broke off goes on at once
            if tries > PATIENCE:
                raise self._given_up(name, found)
            if tries or wait is not None:
                self._wait(max(1, tries), found, wait)

    def _try(self, address: str, name: str, offset: int, view: memoryview) -> tuple[int, str, float | None]:
        """One request: how many bytes came, what was found where they are not all, and how long the server asks to wait."""
        session, done = import_module("huggingface_hub.utils").get_session(), 0
        head = {"Range": f"bytes={offset}-{offset + len(view) - 1}", "Accept-Encoding": "identity"}
        if _origin(address) == _origin(constants().ENDPOINT):
            head |= import_module("huggingface_hub.utils").build_hf_headers()
        try:
            self._client.count()
            with session.stream("GET", address, headers=head, timeout=TIMEOUT, follow_redirects=False) as answer:
                if answer.status_code != 206:
                    return 0, *self._refused(answer, address, name)
                self._check(answer, name, offset, len(view))
                for part in answer.iter_raw():
                    if done + len(part) > len(view):
                        raise self._changed(name, "more bytes than were asked for")
                    view[done : done + len(part)] = part
                    done += len(part)
        except transport_errors() as error:
            return done, str(error) or type(error).__name__, None
        return done, "an answer that ends early", None

    def _refused(self, answer: Any, address: str, name: str) -> tuple[str, float | None]:
        """What an answer without the range says; raises where asking again is no use."""
        status = answer.status_code
        if status == 200:
            raise fail(
                "hub-no-ranges",
                f"{urlsplit(address).netloc} gives whole files only, not ranges of them",
                help=f"download {page(self._commit.name)} with `hf download` and give its directory",
            )
        if status in (301, 302, 303, 307, 308, 401, 403, 404, 410):
            self._forget(name, address)  # its time is over: the Hub gives another
            return f"status {status}", 0.0 if status != 404 else None
        if status not in _AGAIN:
            raise fail("hub-refused", f"{self._commit.name} does not give `{name}`", notes=(f"found: status {status}",))
        asked = answer.headers.get("Retry-After") or ""
        return f"status {status}", float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else None

    def _check(self, answer: Any, name: str, offset: int, length: int) -> None:
        size = self._commit.files[name].size
        found = _RANGE.fullmatch(answer.headers.get("Content-Range") or "")
        if found is None or int(found[1]) != offset or int(found[2]) >= offset + length or int(found[3]) != size:
            said = answer.headers.get("Content-Range") or "no Content-Range"
            raise self._changed(name, said, f"bytes {offset}-{offset + length - 1}/{size}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise self._changed(name, f"Content-Encoding {answer.headers['Content-Encoding']}", "plain bytes")

    def _changed(self, name: str, found: str, expected: str = "the range that was asked for") -> InputError:
        notes = (f"expected: {expected}", f"found: {found}")
        return fail(
            "source-changed", f"`{name}` is not the file that commit {self._commit.sha[:12]} of {self._commit.name} lists",
            notes=notes, help="compile the plan again",
        )  # fmt: skip

    def _address(self, name: str) -> str:
        """Where a file's bytes are: the Hub's own address or a signed one of its storage."""
        with self._lock:
            known = self._addresses.get(name)
        if known is not None:
            return known
        commit = self._commit
        for tries in range(1, PATIENCE + 2):
            try:
                with refusals(commit.name, name):
                    self._client.count()
                    url = library().hf_hub_url(commit.name.repo, name, revision=commit.sha)
                    found = library().get_hf_file_metadata(url, token=None, timeout=TIMEOUT)
                break
            except InputError as error:
                if tries > PATIENCE or error.diagnostics[0].code not in ("hub-refused", "hub-unreachable"):
                    raise
                self._wait(tries, error.diagnostics[0].message, None)
        if found.commit_hash is None:
            raise hidden_commit(commit.name)
        if found.commit_hash != commit.sha:
            raise self._changed(name, f"commit {found.commit_hash}", f"commit {commit.sha}")
        location = str(found.location)
        with self._lock:
            self._addresses[name] = location
        return location

    def _forget(self, name: str, address: str) -> None:
        with self._lock:
            if self._addresses.get(name) == address:
                del self._addresses[name]

    def _wait(self, tries: int, found: str, asked: float | None) -> None:
        seconds = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1)) if asked is None else min(asked, 600.0)
        if seconds:
            self._on_wait(f"the Hub: {found}, for {seconds:.0f} s")
            self._closed.wait(seconds)
            self._on_wait("")

    def _given_up(self, name: str, found: str) -> InputError:
        code = "hub-refused" if found.startswith("status") else "hub-unreachable"
        return fail(
            code, f"{self._commit.name} gives no more of `{name}`, after {PATIENCE} tries",
            notes=(f"found: {found}",), help="the same command goes on from where it stopped",
        )  # fmt: skip


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
