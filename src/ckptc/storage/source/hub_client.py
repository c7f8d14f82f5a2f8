"""What is asked of the Hugging Face Hub: which commit a revision is, which files it has, their beginnings, small files.

All of it goes through `huggingface_hub` (1.33 or later, 2.x), so that its environment is honoured: `HF_TOKEN` and the
login, `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, proxies and certificates. The library is imported when the Hub is
first needed: importing it takes a while, and reads the environment.

    hf://org/repo@revision ─► Commit: its SHA-1, every file's size and SHA-256      one request
                                └► heads of all shards                              one request, or one range a shard

A range of a large file is at a signed address that the Hub redirects to and that expires (`ckptc.storage.source.hub_ranges`).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from ckptc.diagnostics import InputError, fail

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_REPO = re.compile(rf"({_NAME}/{_NAME})(?:@([^\s@]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
TIMEOUT = 30.0  # seconds without an answer, or a byte of one


class HubName(NamedTuple):
    """A repository, and a revision of it: a branch, a tag or a commit; None for the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def parse_name(text: str) -> HubName | None:
    """`hf://org/repo[@revision]`, or the same without the scheme; None for what has another form."""
    found = _REPO.fullmatch(text.removeprefix(SCHEME).rstrip("/"))
    return HubName(found[1], found[2]) if found else None


class HubFile(NamedTuple):
    size: int  # bytes
    sha256: str | None  # of the content, in hex; None for small files, which have a Git hash
    blob: str  # the Git hash


@dataclass(frozen=True)
class Commit:
    """A repository as it is at one commit."""

    name: HubName  # as asked for
    sha: str  # 40 hex digits
    files: Mapping[str, HubFile]
    newest: bool = False  # whether it was the default branch's when it was asked for


@dataclass
class Client:
    """Asks the Hub. Counts its requests, from any number of threads."""

    requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, number: int = 1) -> None:
        with self._lock:
            self.requests += number

    def commit(self, name: HubName) -> Commit:
        """The commit that a revision is now, with its files.

        Raises InputError: `hub-gated`, `hub-no-repository`, `hub-no-revision`, `hub-bad-token`, `hub-offline`,
        `hub-unreachable`, `hub-refused`.
        """
        with refusals(name):
            self.count()
            info = library().HfApi().model_info(
                name.repo, revision=name.revision, files_metadata=True, timeout=TIMEOUT
            )  # fmt: skip
        files = {}
        for one in info.siblings or ():
            lfs = getattr(one, "lfs", None)
            files[one.rfilename] = HubFile(int(one.size or 0), lfs.sha256 if lfs else None, str(one.blob_id or ""))
        if not info.sha or not COMMIT.fullmatch(info.sha):
            raise hidden_commit(name)
        return Commit(name, info.sha, files, name.revision in (None, "main"))

    def all_headers(self, commit: Commit, index: str) -> dict[str, dict[str, Any]] | None:
        """The header of every shard that `index` names, where the Hub has the answer ready: it has it for the newest
        commit alone, and does not say of which commit. So the newest commit is asked for again afterwards. None where
        there is no such answer.
        """
        if not commit.newest:
            return None
        endpoint = constants().ENDPOINT.rstrip("/")
        utils = import_module("huggingface_hub.utils")
        failures: tuple[type[Exception], ...] = (OSError, LookupError, ValueError, TypeError, *transport_errors())
        try:
            self.count()
            answer = utils.get_session().get(
                f"{endpoint}/api/models/{commit.name.repo}/safetensors-metadata/{index}",
                headers=utils.build_hf_headers(), timeout=TIMEOUT,
            )  # fmt: skip
            if answer.status_code != 200:
                return None
            headers = answer.json()["headers"]
        except failures:
            return None
        if self.commit(commit.name).sha != commit.sha or not isinstance(headers, dict):
            return None
        return headers

    def small_file(self, commit: Commit, name: str) -> bytes:
        """The content of a small file, through the Hub's own cache on this machine. Raises as `commit`, `hub-no-file`."""
        with refusals(commit.name, name):
            self.count(0 if self.cached(commit, name) else 1)
            path = library().hf_hub_download(commit.name.repo, name, revision=commit.sha)
        with open(path, "rb") as file:
            return file.read()

    def cached(self, commit: Commit, name: str) -> str | None:
        """The path of a file in the Hub's cache on this machine, if it is there whole."""
        found = library().try_to_load_from_cache(commit.name.repo, name, revision=commit.sha)
        return found if isinstance(found, str) else None


def library() -> Any:
    """`huggingface_hub`."""
    return import_module("huggingface_hub")


def constants() -> Any:
    """What the library read from its environment."""
    return import_module("huggingface_hub.constants")


def transport_errors() -> tuple[type[Exception], ...]:
    """What the library's HTTP client raises when a connection fails: httpx's errors, or httpx2's."""
    session = import_module("huggingface_hub.utils").get_session()
    client = import_module(type(session).__module__.partition(".")[0])
    return (client.TransportError,)


# -- refusals ------------------------------------------------------------------------------------------------


@contextmanager
def refusals(name: HubName, file: str | None = None) -> Iterator[None]:
    """What the library raises, as an InputError that says what to do."""
    errors = import_module("huggingface_hub.errors")
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        raise _gated(name) from None
    except errors.RepositoryNotFoundError:
        raise _no_repository(name) from None
    except errors.RevisionNotFoundError:
        raise fail(
            "hub-no-revision",
            f"{SCHEME}{name.repo} has no revision `{name.revision}`",
            help=f"its branches and tags are listed at {page(name)}/tree/main",
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _unreachable(name, error) from None
    except errors.EntryNotFoundError:
        raise fail("hub-no-file", f"{name} has no file `{file}`", help=f"its files: {page(name)}/tree/main") from None
    except errors.HfHubHTTPError as error:
        raise _refused(name, error) from None
    except (*transport_errors(), ConnectionError, TimeoutError, errors.RevisionResolutionError) as error:
        raise _unreachable(name, error) from None


def token() -> str | None:
    """The user's token: of HF_TOKEN, or of a login."""
    found = library().get_token()
    return str(found) if found else None


def page(name: HubName) -> str:
    return f"{constants().ENDPOINT.rstrip('/')}/{name.repo}"


def _gated(name: HubName) -> InputError:
    found = "a token without access to it" if token() else "no token"
    help = f"ask for access at {page(name)}"
    help += "" if token() else ", then log in with `hf auth login` or set HF_TOKEN"
    return fail(
        "hub-gated", f"{name} is gated: its files are given to those with access only", notes=(f"found: {found}",), help=help
    )  # fmt: skip


def _no_repository(name: HubName) -> InputError:
    found = "a token that sees no such repository" if token() else "no token"
    help = "check the name; a private repository is seen by those with access only"
    help += "" if token() else ": log in with `hf auth login` or set HF_TOKEN"
    return fail("hub-no-repository", f"the Hub has no {SCHEME}{name.repo}", notes=(f"found: {found}",), help=help)


def _refused(name: HubName, error: Any) -> InputError:
    status = getattr(error.response, "status_code", None)
    said = str(getattr(error, "server_message", "") or error.response.headers.get("X-Error-Message") or "")
    if status == 401:
        return fail(
            "hub-bad-token",
            f"the Hub does not accept the token for {name}",
            notes=(f"found: {said or 'status 401'}",),
            help="make a new one at https://huggingface.co/settings/tokens, and log in with `hf auth login` or set HF_TOKEN",
        )
    if status == 403:
        return _gated(name)
    busy = status == 429 or (status or 0) >= 500
    return fail(
        "hub-refused",
        f"the Hub does not answer for {name}",
        notes=(f"found: status {status}" + (f", {said}" if said else ""),),
        help="try it again later" if busy else f"look at {page(name)}",
    )


def hidden_commit(name: HubName) -> InputError:
    return fail(
        "hub-no-commit",
        f"{constants().ENDPOINT} does not say which commit of {name.repo} it serves",
        help="it is a mirror that leaves X-Repo-Commit out: unset HF_ENDPOINT, or download the files and give their directory",
    )


def _unreachable(name: HubName, error: Exception) -> InputError:
    offline = bool(constants().is_offline_mode())
    if offline:
        return fail(
            "hub-offline",
            f"HF_HUB_OFFLINE is set, and {name} is not in the cache of this machine",
            help="unset it, or fetch the files with `hf download` where there is a network",
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return fail(
        "hub-unreachable",
        f"the Hub cannot be reached for {name}",
        notes=(f"found: {reason[:200]}",),
        help="check the network and HF_ENDPOINT; what has been downloaded already can be given as a directory",
    )


def header_bytes(header: Mapping[str, Any], size: int) -> tuple[int, bytes] | None:
    """Where tensor data begins in a file of `size` bytes with this header, and the header's JSON.

    Data ends where the file does, so the length of the header as it was stored follows from the last offset. None where
    that cannot be: the header is another file's.
    """
    end = 0
    for key, value in header.items():
        if key != "__metadata__":
            end = max(end, int(value["data_offsets"][1]))
    begin = size - end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return (begin, text) if begin >= 8 and len(text) <= begin - 8 + _SLACK * len(header) else None


_SLACK = 64  # bytes a tensor's entry may take more when it is written anew
