"""Where checkpoints lie on this machine, so that a plan need not say.

Plans are the same bytes on every machine, so they hold no directory, only the digest of the source they were
made from. Compiling remembers digest -> directory here; `ckptc run plan.json` asks for it when no source is
given.

One small file per digest under `$XDG_CACHE_HOME/ckptc/sources` (else `~/.cache`), holding the absolute path
in the file system's encoding (https://specifications.freedesktop.org/basedir-spec). It is a convenience and
only that: a cache that cannot be written or read is no error, and what is recalled must still be checked
against the plan.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ckptc.diagnostics import fail
from ckptc.regular import open_file

_MAX_PATH = 1 << 16  # bytes; a longer entry is not ours


def remember(digest: str, directory: Path) -> None:
    """Note that the source with this digest lies in `directory`; a later note replaces an earlier one."""
    entry = _entry(digest)
    if entry is None:
        return
    with suppress(OSError, ValueError):
        # Absolute but not resolved: the name the user gave outlives the place that a link points at today.
        path = os.fsencode(os.path.abspath(directory))
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=entry.parent, prefix=".new-")
        try:
            with open(descriptor, "wb") as file:
                file.write(path)
            os.replace(temporary, entry)  # readers see the old note or the new one, never half of one
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def recall(digest: str) -> Path | None:
    """The directory last remembered for this digest, None when there is no note or no such directory any
    more.
    """
    entry = _entry(digest)
    if entry is None:
        return None
    with suppress(OSError, ValueError):
        with open_file(entry) as file:
            path = file.read(_MAX_PATH + 1)
        directory = Path(os.fsdecode(path))
        if len(path) <= _MAX_PATH and directory.is_absolute() and directory.is_dir():
            return directory
    return None


def located(digest: str, what: str, option: str) -> Path:
    """As `recall`. Raises `unknown-source`: where `what` lies is not known, and `option` says it."""
    found = recall(digest)
    if found is None:
        help = f"say it with `{option} DIR`"
        raise fail("unknown-source", f"where {what} is not known on this machine", help=help)
    return found


def cache_home() -> Path | None:
    """Where ckptc keeps what it can do without; None when the machine has no place for caches."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the specification says to ignore a relative one
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            return None
    return cache / "ckptc"


def _entry(digest: str) -> Path | None:
    """The file for a digest."""
    cache = cache_home()
    if cache is None:
        return None
    # Hashed, because a digest read from a plan is input, and may hold anything but a file name.
    key = hashlib.sha256(digest.encode("utf-8", "backslashreplace")).hexdigest()
    return cache / "sources" / key
