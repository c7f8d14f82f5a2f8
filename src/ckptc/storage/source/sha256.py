"""The SHA-256 of files: what the Hub's client noted of them, and their own.

The Hub's client leaves a file of its cache as a link to `blobs/<sha256>`, and beside a download into a folder
`.cache/huggingface/download/<file>.metadata`, whose second line is the etag
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Only large files have a SHA-256 there; the others have a
Git hash, which is shorter.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from ckptc.storage.source.files import open_regular, resolve, unreadable

_READ = 4 << 20  # bytes hashed at once
_SHA256 = re.compile("[0-9a-f]{64}")


def hub_sha256(directory: Path, name: str) -> str | None:
    """What the Hub's client noted as the SHA-256 of a file, None where it did not, or noted a shorter hash."""
    path = resolve(directory, name)
    with suppress(OSError):
        target = Path(os.readlink(path))
        if target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
            return target.name
    note = directory / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    with suppress(OSError, ValueError, IndexError):
        etag = note.read_text("utf-8").splitlines()[1].strip().strip('"')
        if _SHA256.fullmatch(etag):
            return etag
    return None


def sha256_of(path: Path, name: str) -> str:
    """Of a file's content, in hex, read in pieces. Raises as `open_regular`."""
    descriptor, _ = open_regular(path, name)
    digest, buffer = hashlib.sha256(), bytearray(_READ)
    view, offset = memoryview(buffer), 0
    try:
        while count := os.preadv(descriptor, [buffer], offset):
            digest.update(view[:count])
            offset += count
    except OSError as error:
        raise unreadable(name, error) from None
    finally:
        os.close(descriptor)
    return digest.hexdigest()
