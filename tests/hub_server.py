"""A server on this machine that answers as the Hugging Face Hub does, and breaks as networks do.

    python tests/hub_server.py DIR [--repo ORG/NAME] [--latency SECONDS] [--broken SHARE]

Repositories are directories of files. A file of a large kind (`*.safetensors`) is redirected to a signed address that
expires, as the Hub's storage has them; small ones are answered at once. The real client library talks to it:
`HF_ENDPOINT` is `Hub.endpoint`. What it is asked for is kept (`Hub.requests`, `Hub.sent`), so that a test can count
requests and see that no byte was fetched twice.

The answers are those that the Hub's documentation and its client's source describe: `/api/models/R[/revision/REV]`,
`/api/models/R/tree/REV`, `/api/models/R/paths-info/REV`, `/api/models/R/safetensors-metadata/INDEX`, and
`/R/resolve/REV/FILE` with `X-Repo-Commit`, `ETag`, `X-Linked-Size`, `X-Linked-ETag`, and `X-Error-Code` on failure.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import re
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ".safetensors"  # files with this ending are stored as LFS objects
PIECE = 1 << 20  # bytes that are sent at once


@cache
def sha256_of(path: str, size: int, changed: int) -> str:
    """The digest of a file; `size` and `changed` (ns) make another key of a file that was changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Repo:
    """A repository: for each commit a directory of its files, and which commit each revision is now."""

    commits: dict[str, Path]
    revisions: dict[str, str]
    gated: bool = False
    private: bool = False
    digests: bool = True  # whether the Hub gives SHA-256 of LFS files (False: answers are quicker for sparse files)

    def files(self, commit: str) -> dict[str, Path]:
        root = self.commits[commit]
        return {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}


@dataclass
class Faults:
    """What goes wrong, and how often. A share is the probability for one answer."""

    latency: float = 0.0  # seconds before each answer
    broken: float = 0.0  # share of ranges whose connection breaks at some byte
    short: float = 0.0  # share of ranges that end early, with a length that says so
    busy: float = 0.0  # share of requests that are answered 429 with Retry-After
    failing: float = 0.0  # share of requests that are answered 503
    expired: float = 0.0  # share of requests to signed addresses that are refused as expired
    stalled: float = 0.0  # share of ranges that stop for `stall` seconds in the middle
    stall: float = 1.0
    no_ranges: bool = False  # answers every request for a range with the whole file
    no_commit: bool = False  # a mirror that leaves X-Repo-Commit out
    no_metadata: bool = False  # has no answer ready for all headers at once
    retry_after: float = 0.05  # seconds
    rate: float | None = None  # bytes a second and connection, at most
    seed: int = 0
    before: Callable[[str, str], int | None] | None = None  # (method, path) -> a status to answer with, or None


@dataclass
class Request:
    method: str
    path: str
    range: tuple[int, int] | None
    status: int
    token: str | None


@dataclass
class Hub:
    """The server. Use as a context manager; `add` repositories at any time."""

    repos: dict[str, Repo] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    tokens: dict[str, set[str]] = field(default_factory=lambda: {"hf_good": {"*"}, "hf_outsider": set()})
    lifetime: float = 3600.0  # seconds that a signed address is good for
    written: Path | None = None  # a directory for what clients write
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # bytes of each file, repo/file

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.random = random.Random(self.faults.seed)
        hub = self

        class Handler(_Handler):
            server_hub = hub

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:  # a client that went away
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Another host name, so that a client that carries its token there is seen to.
        self.storage = f"http://localhost:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        if self.written is not None:
            shutil.rmtree(self.written, ignore_errors=True)

    def add(self, name: str, directory: Path, **options: Any) -> str:
        """A repository whose `main` holds this directory. Returns the commit."""
        commit = hashlib.sha1(f"{name} {directory}".encode()).hexdigest()
        self.repos[name] = Repo({commit: directory}, {"main": commit}, **options)
        return commit

    def move(self, name: str, directory: Path) -> str:
        """A new commit of `main`. Returns it."""
        commit = hashlib.sha1(f"{name} {directory} {len(self.repos[name].commits)}".encode()).hexdigest()
        self.repos[name].commits[commit] = directory
        self.repos[name].revisions["main"] = commit
        return commit

    def room(self) -> Path:
        """Where what is written goes."""
        if self.written is None:
            self.written = Path(tempfile.mkdtemp(prefix="hub-"))
        return self.written

    def chance(self, share: float) -> bool:
        with self.lock:
            return share > 0 and self.random.random() < share

    def between(self, low: int, high: int) -> int:
        with self.lock:
            return self.random.randint(low, high)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a program that is to talk to this server, with an empty cache of its own."""
        out = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        out |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return out | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # a head and a small body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # What each address answers.

    def _answer(self) -> None:
        hub, faults = self.server_hub, self.server_hub.faults
        self.body = self._read_body()
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if faults.latency:
            time.sleep(faults.latency)
        if faults.before and (status := faults.before(self.command, path)):
            return self._text(status, "as asked for")
        if hub.chance(faults.busy):
            return self._text(429, "slow down", {"Retry-After": str(faults.retry_after)})
        if hub.chance(faults.failing):
            return self._text(503, "for a moment")
        if path.startswith("/upload/"):
            return self._uploaded(path.rpartition("/")[2])
        if path.startswith("/storage/"):
            return self._storage(path, parse_qs(url.query))
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree|paths-info|safetensors-metadata)/(.+))?", path
        ):
            return self._api(found[1], found[2], found[3])
        if self.command == "POST" and (path == "/api/validate-yaml"):
            return self._json({"errors": [], "warnings": []})
        if self.command == "POST" and (path == "/api/repos/create"):
            return self._create()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            return self._preupload() if found[2] == "preupload" else self._commit_files(found[1])
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch()
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3])
        return self._text(404, "no such page")

    def _read_body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _repo(self, name: str) -> Repo | None:
        """The repository, if this user may see it; else the answer is given."""
        hub, repo = self.server_hub, self.server_hub.repos.get(name)
        if self.token is not None and self.token not in hub.tokens:
            self._text(401, "", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        allowed = self.token is not None and (hub.tokens[self.token] & {"*", name})
        if repo is None or (repo.private and not allowed):
            status = 401 if self.token is None else 404
            self._text(status, "", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        return repo

    def _may_read(self, name: str, repo: Repo) -> bool:
        """Whether this user may read files of a gated repository; else the answer is given."""
        allowed = self.token is not None and (self.server_hub.tokens[self.token] & {"*", name})
        if not repo.gated or allowed:
            return True
        message = f"Access to model {name} is restricted."
        status = 401 if self.token is None else 403
        self._text(status, message, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        return False

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.revisions.get(revision) or (revision if revision in repo.commits else None)
        if commit is None:
            message = f"Invalid rev id: {revision}"
            self._text(404, "", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": message})
        return commit

    def _api(self, name: str, what: str | None, rest: str | None) -> None:
        if (repo := self._repo(name)) is None:
            return None
        if what == "safetensors-metadata":
            return self._all_headers(name, repo, str(rest))
        if (commit := self._commit(repo, rest or "main")) is None:
            return None
        files = repo.files(commit)
        if what in (None, "revision"):
            siblings = [{"rfilename": f} for f in files]
            if "blobs=true" in self.path.lower():
                siblings = [{"rfilename": f, **self._blob(repo, f, p)} for f, p in files.items()]
            gated = "manual" if repo.gated else False
            value = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "gated": gated}
            return self._json(value | {"private": repo.private, "disabled": False, "tags": [], "downloads": 0})
        if what == "paths-info":
            asked = json.loads(self.body)["paths"] if b"{" in self.body[:1] else parse_qs(self.body.decode())["paths"]
            files = {f: p for f, p in files.items() if f in asked}
        return self._json([self._entry(repo, f, p) for f, p in files.items()])

    def _entry(self, repo: Repo, name: str, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        out: dict[str, Any] = {
            "type": "file",
            "path": name,
            "size": size,
            "oid": hashlib.sha1(name.encode()).hexdigest(),
        }
        if name.endswith(LARGE):
            out["lfs"] = {"oid": self._digest(repo, path), "size": size, "pointerSize": 135}
        return out

    def _blob(self, repo: Repo, name: str, path: Path) -> dict[str, Any]:
        entry = self._entry(repo, name, path)
        out = {"size": entry["size"], "blobId": entry["oid"]}
        if "lfs" in entry:
            lfs = entry["lfs"]
            out["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        return out

    def _digest(self, repo: Repo, path: Path) -> str:
        state = path.stat()
        if not repo.digests:
            return hashlib.sha256(f"{path.name} {state.st_size}".encode()).hexdigest()
        return sha256_of(str(path), state.st_size, state.st_mtime_ns)

    def _all_headers(self, name: str, repo: Repo, index: str) -> None:
        files = repo.files(repo.revisions["main"])
        if self.server_hub.faults.no_metadata or index not in files:
            return self._text(404, "", {"X-Error-Code": "EntryNotFound"})
        if not self._may_read(name, repo):
            return None
        listed = json.loads(files[index].read_bytes())
        headers = {f: json.loads(_header(files[f])) for f in sorted(set(listed["weight_map"].values()))}
        return self._json({"index": {"metadata": listed.get("metadata", {})}, "headers": headers})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (repo := self._repo(name)) is None or (commit := self._commit(repo, revision)) is None:
            return None
        head = {} if self.server_hub.faults.no_commit else {"X-Repo-Commit": commit}
        if not self._may_read(name, repo):
            return None
        path = repo.files(commit).get(file)
        if path is None:
            return self._text(404, "", head | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if not file.endswith(LARGE):
            etag = hashlib.sha1(path.read_bytes()).hexdigest()
            return self._file(f"{name}/{file}", path, head | {"ETag": f'"{etag}"'})
        digest, until = self._digest(repo, path), time.time() + self.server_hub.lifetime
        head |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{digest}"', "ETag": f'"{digest}"'}
        head["Location"] = f"{self.server_hub.storage}/storage/{name}/{commit}/{file}?until={until}"
        return self._text(302, "", head)

    def _storage(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.server_hub
        if self.token is not None:  # the token of the Hub is no business of its storage
            return self._text(400, "Only one auth mechanism allowed")
        if time.time() > float(query["until"][0]) or hub.chance(hub.faults.expired):
            return self._text(403, "Request has expired")
        found = re.fullmatch(r"/storage/([^/]+/[^/]+)/([^/]+)/(.+)", path)
        assert found is not None
        file = hub.repos[found[1]].commits[found[2]] / found[3]
        return self._file(f"{found[1]}/{found[3]}", file, {"ETag": f'"{self._digest(hub.repos[found[1]], file)}"'})

    # What is written: to `Hub.written`, a directory a repository, a digest an object until it is committed.

    def _writer(self) -> bool:
        if self.token is not None and "*" in self.server_hub.tokens.get(self.token, set()):
            return True
        self._text(403, "", {"X-Error-Message": "You don't have the rights to create a model under this namespace"})
        return False

    def _create(self) -> None:
        if not self._writer():
            return None
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server_hub.repos:
            return self._text(409, json.dumps({"url": f"{self.server_hub.endpoint}/{name}"}))
        directory = self.server_hub.room() / name.replace("/", "--") / "0"
        directory.mkdir(parents=True)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server_hub.add(name, directory, private=private)
        return self._json({"url": f"{self.server_hub.endpoint}/{name}", "id": name})

    def _preupload(self) -> None:
        if not self._writer():
            return None
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        return self._json({"files": files})

    def _batch(self) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            known = (self.server_hub.room() / one["oid"]).exists()
            href = f"{self.server_hub.storage}/upload/{one['oid']}"
            objects.append(one | ({} if known else {"actions": {"upload": {"href": href}}}))
        body = json.dumps({"transfer": "basic", "objects": objects})
        self._text(200, body, {"Content-Type": "application/vnd.git-lfs+json"})

    def _uploaded(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._text(400, "another digest")
        (self.server_hub.room() / oid).write_bytes(self.body)
        return self._text(200, "")

    def _commit_files(self, name: str) -> None:
        hub = self.server_hub
        if not self._writer():
            return
        repo = hub.repos[name]
        before = repo.commits[repo.revisions["main"]]
        after = before.parent / str(len(repo.commits))
        shutil.copytree(before, after)
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                (after / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                shutil.copy(hub.room() / value["oid"], after / value["path"])
            elif key == "deletedFile":
                (after / value["path"]).unlink()
        commit = hub.move(name, after)
        self._json({"commitUrl": f"{hub.endpoint}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    # How it is sent.

    def _file(self, name: str, path: Path, head: dict[str, str]) -> None:
        size, asked = path.stat().st_size, None
        ranges = not self.server_hub.faults.no_ranges
        if ranges and (found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")):
            if found[1]:
                asked = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
            else:
                asked = max(0, size - int(found[2])), size
        if asked is not None and asked[0] >= size:
            return self._text(416, "", {"Content-Range": f"bytes */{size}"})
        low, high = asked or (0, size)
        if ranges:
            head["Accept-Ranges"] = "bytes"
        if asked is not None:
            head["Content-Range"] = f"bytes {low}-{high - 1}/{size}"
        hub, faults = self.server_hub, self.server_hub.faults
        end, cut = high, None
        if self.command == "GET" and high > low:
            if hub.chance(faults.short):
                end = hub.between(low, high - 1)
            elif hub.chance(faults.broken):
                cut = hub.between(low, high - 1)
        stall = hub.between(low, end) if hub.chance(faults.stalled) else None
        self._head(206 if asked else 200, head | {"Content-Length": str(end - low)}, asked)
        if self.command == "HEAD":
            return None
        self.wfile.flush()
        with open(path, "rb") as file:
            at, stop, started = low, end if cut is None else cut, time.monotonic()
            while at < stop:
                count = os.sendfile(self.connection.fileno(), file.fileno(), at, min(PIECE, stop - at))
                at += count
                with hub.lock:
                    hub.sent[name] += count
                if stall is not None and at >= stall:
                    time.sleep(faults.stall)
                    stall = None
                if faults.rate:
                    time.sleep(max(0.0, (at - low) / faults.rate - (time.monotonic() - started)))
        if cut is not None:
            self._break_off()
        return None

    def _break_off(self) -> None:
        """Ends the connection as a network does that fails: with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _json(self, value: object) -> None:
        self._text(200, json.dumps(value), {"Content-Type": "application/json"})

    def _text(self, status: int, text: str, head: dict[str, str] | None = None) -> None:
        body = text.encode()
        self._head(status, {**(head or {}), "Content-Length": str(len(body))}, None)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, head: dict[str, str], asked: tuple[int, int] | None) -> None:
        hub = self.server_hub
        with hub.lock:  # the library of 2.x asks for this once, for its user agent
            if not self.path.startswith("/api/agent-harnesses"):
                hub.requests.append(Request(self.command, urlsplit(self.path).path, asked, status, self.token))
        self.send_response(status)
        for key, value in head.items():
            self.send_header(key, value)
        self.end_headers()


def _header(path: Path) -> bytes:
    """The JSON of a safetensors file's header."""
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves directories as the Hub does, for benchmarks.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--repo", default="org/model")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--broken", type=float, default=0.0, help="share of ranges that break off")
    parser.add_argument("--no-digests", action="store_true", help="do not hash files (for sparse files)")
    args = parser.parse_args()
    with Hub(faults=Faults(latency=args.latency, broken=args.broken)) as hub:
        hub.add(args.repo, args.directory, digests=not args.no_digests)
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
