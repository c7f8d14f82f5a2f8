"""Before weights are read: does the run have the memory, the disk and the source it needs?

Each check raises an `InputError` that says what is needed and what there is. Write permission is proved by writing: the
lock and the journal are the first files of a run (`ckptc.run.journal`).

Hashing the source (`check_sha256`) reads all of it once more, a few files at a time, and is done only when asked for.
The sums come from a file in the format of `sha256sum` (GNU coreutils manual, "md5sum invocation" and "cksum output
modes"), or from what the Hub's client left (`ckptc.storage.source.sha256`).
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckptc.diagnostics import Diagnostic, InputError, Span, fail
from ckptc.ir.source import SourceFile
from ckptc.plan.model import Plan
from ckptc.regular import open_file
from ckptc.storage.source.base import Source, as_source
from ckptc.storage.source.files import resolve, shown
from ckptc.storage.source.sha256 import hub_sha256, sha256_of

AUTO = "auto"
MAX_SUMS = 64 << 20  # bytes of a file of sums
_MIB = 1 << 20
_THREADS = 4  # files hashed at once; hashlib works outside of Python's lock


def check_memory(plan: Plan, held: int = 0) -> None:
    """`small-memory`, when the plan's largest unit of work does not fit in the budget that it was made with, nor with the
    bytes that are `held` beside it."""
    budget, peak = plan.choices.memory, plan.totals.peak_memory_bytes + held
    if peak > max(budget, _MIB):
        enough = -(-peak // _MIB)
        raise fail(
            "small-memory",
            "the largest unit of work needs more memory than the plan's budget",
            notes=(f"expected: at most {budget} bytes", f"found: {peak} bytes"),
            help=f"compile it again with `--memory {enough}MiB`; it cannot be cut smaller",
        )


def check_room(output: Path, needed: int) -> None:
    """`disk-full`, when the file system of `output` (or of where it will be) has less than `needed` bytes left for
    this user. A file system that reports no size is taken at its word later, when it is full."""
    place = output.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        status = os.statvfs(place)
    except OSError:
        return
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and free < needed:
        raise fail(
            "disk-full",
            f"the disk of {output} has too little room",
            notes=(f"expected: {needed} bytes free, for what is still to be written", f"found: {free} bytes"),
            help="make room, or choose another --output; nothing that is done already is lost",
        )


def check_source(plan: Plan, source: Source | Path, files: Sequence[SourceFile]) -> None:
    """Every file is there, can be read, and has the size and header it had when the plan was made; every tensor lies
    within its file.

    Raises what the source's `check_unchanged` raises, or `invalid-plan`.
    """
    for tensor in plan.tensors:
        size = files[tensor.file].size if 0 <= tensor.file < len(files) else -1
        if not 0 <= tensor.begin <= tensor.end <= size:
            raise fail(
                "invalid-plan",
                f"the plan reads {shown(tensor.name)} where its files have no bytes",
                notes=(f"expected: within {size} bytes", f"found: bytes {tensor.begin} to {tensor.end}"),
                help="compile it again",
            )
    as_source(source).check_unchanged(files)


def check_sha256(sums: str, source: Source | Path, files: Sequence[SourceFile]) -> None:
    """Hashes the source's files and compares with `sums`: a file of `sha256sum`, or `auto`.

    Raises InputError: `unreadable-sums`, `invalid-sums`, `unknown-sum` (a file has none), `source-damaged` (a file has
    another), and what reading may raise.
    """
    directory = as_source(source).local
    if directory is None:
        help = (
            "leave it out: what comes from the Hub is bound to its commit, what comes from a bucket to its generation"
        )
        raise fail(
            "unused-option", f"--check-source hashes files of this machine, and {source} is elsewhere", help=help
        )
    if sums == AUTO:
        known: Mapping[str, str] = {
            f.name: noted for f in files if (noted := hub_sha256(directory, f.name)) is not None
        }
        help = "give a file of sums, as `sha256sum *.safetensors` writes it"
    else:
        known = read_sums(Path(sums))
        help = f"add the missing lines to {sums}"
    unknown = [f.name for f in files if f.name not in known]
    if unknown:
        more = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise fail("unknown-sum", f"the SHA-256 of {shown(unknown[0])}{more} is not known", help=help)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(lambda f: sha256_of(resolve(directory, f.name), f.name), files))
    problems = [
        Diagnostic(
            "source-damaged",
            f"{shown(file.name)} does not have the bytes it was published with",
            None,
            (f"expected: sha256 {known[file.name]}", f"found: sha256 {digest}"),
            "download the file again",
        )
        for file, digest in zip(files, found, strict=True)
        if digest != known[file.name]
    ]
    if problems:
        raise InputError(problems)


def read_sums(path: Path) -> Mapping[str, str]:
    """Name -> SHA-256 in hex, of a file that `sha256sum` wrote; `--tag` and `*` for binary are understood."""
    try:
        with open_file(path) as file:
            content = file.read(MAX_SUMS + 1)
        if len(content) > MAX_SUMS:
            raise fail("invalid-sums", f"{path} is too large to be a list of sums")
        text = content.decode("utf-8")
    except OSError as error:
        raise fail("unreadable-sums", f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise fail("invalid-sums", f"{path} is not text", help="`sha256sum *.safetensors` writes such a file") from None
    out: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#"):
            continue
        plain = re.fullmatch(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", line)
        tagged = re.fullmatch(r"(\\?)SHA256 \((.+)\) = ([0-9a-fA-F]{64})", line)
        if plain is None and tagged is None:
            raise fail(
                "invalid-sums",
                "this is not a line of `sha256sum`",
                span=Span(str(path), number, 1, len(line)),
                help="a line is 64 hex digits, two spaces and the file's name",
            )
        escaped, digest, name = plain.groups() if plain else (tagged[1], tagged[3], tagged[2])  # type: ignore[index]
        if escaped:
            name = re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), name)
        name = posixpath.normpath(name)
        if out.setdefault(name, digest.lower()) != digest.lower():
            span = Span(str(path), number, 1, len(line))
            raise fail("invalid-sums", f"{shown(name)} stands twice, with different sums", span=span)
    return out
