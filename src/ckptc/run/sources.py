"""The source of a run as it was when the run began: what a later run that goes on is held against, and what it must
still be when the run ends.

The plan says of each file size, header and content (`ckptc.storage.source.content`), which no other weights share. A file may have
been edited where no sample lies, so inode and times of change are noted as well, in the unfinished run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptc.diagnostics import InputError, fail
from ckptc.ir.source import SourceFile
from ckptc.storage.source.base import Source, as_source
from ckptc.storage.source.content import Status, changed_since, first_of, statuses
from ckptc.storage.source.files import resolve

RESTART = "put its files back as they were, or use --restart, which makes all of it again"


@dataclass(frozen=True)
class Sighting:
    """The files of a source, and what the system said of them at some moment."""

    source: Source
    files: tuple[SourceFile, ...]
    statuses: dict[str, Status]

    @staticmethod
    def of(given: Source | Path, files: Sequence[SourceFile]) -> Sighting:
        """As they are now. What lies elsewhere is known by its name, which does not change."""
        source = as_source(given)
        found = statuses(source.local, [f.name for f in files]) if source.local is not None else {}
        return Sighting(source, tuple(files), found)

    def record(self) -> dict[str, Any]:
        """As JSON values, for an unfinished run to keep."""
        return {
            "directory": str(self.source),
            "files": {f.name: [f.size, f.header_digest, f.content] for f in self.files},
            "statuses": {name: list(status) for name, status in self.statuses.items()},
        }

    @staticmethod
    def kept(text: str | bytes | None) -> dict[str, Any] | None:
        """What `record` gave, from its JSON; None where that is not there, or damaged."""
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            kept: dict[str, Any] = json.loads(text or "")
            if (
                isinstance(kept["files"], dict)
                and kept["files"]
                and all(len(s) == len(Status._fields) for s in kept["statuses"].values())
            ):
                return kept
        return None

    def check_undisturbed(self) -> None:
        """Raises `source-changed` for files that are no longer what they were then."""
        if self.source.local is None:
            self.source.check_unchanged(self.files)
            return
        now = statuses(self.source.local, self.statuses)
        if lines := changed_since(self.statuses, now):
            help = "nothing is committed; run again with --restart when no program writes to the source"
            message = f"the source {self.source} changed while it was read"
            raise fail("source-changed", message, notes=first_of(lines), help=help)
        self.source.check_unchanged([f for f in self.files if now[f.name] != self.statuses[f.name]])

    def inside(self, directory: Path) -> Path | None:
        """A file of the source that lies in a directory, or whose links lead there; None where none does."""
        if self.source.local is None:
            return None
        real = Path(os.path.realpath(directory))
        for file in self.files:
            path = resolve(self.source.local, file.name)
            places = (Path(os.path.abspath(path)), Path(os.path.realpath(path.parent)) / path.name, *_links(path))
            if any(place.is_relative_to(end) for place in places for end in (real, Path(os.path.abspath(directory)))):
                return path
        return None

    def check_same(self, kept: Mapping[str, Any] | None, output: object) -> None:
        """Raises `source-changed` where an unfinished run has read other files than these. `kept`: its `record`."""
        if kept is None:
            return
        if not kept["statuses"] or not self.statuses:  # elsewhere, then or now: what its files hold is what counts
            lines = self.other_weights(kept)
            if lines:
                message = f"the source holds other weights than those that the unfinished run in {output} has read"
                raise fail("source-changed", message, notes=lines, help=RESTART)
            return
        then = {str(name): Status(*status) for name, status in kept["statuses"].items()}
        lines = changed_since(then, self.statuses)
        if not lines:
            return
        if kept["directory"] != str(self.source):
            lines.insert(0, f"read then from {kept['directory']}, now from {self.source}")
        message = f"the source may hold other weights than those that the unfinished run in {output} has read"
        raise fail("source-changed", message, notes=first_of(lines), help=RESTART)

    def other_weights(self, kept: Mapping[str, Any] | None) -> list[str]:
        """A line for each file in which the source differs from that of an unfinished run, whatever its plan."""
        files = kept["files"] if kept else {}
        mine = {f.name: [f.size, f.header_digest, f.content] for f in self.files}
        words = ("size", "header", "content")
        lines = []
        for name in sorted(files.keys() & mine.keys()):
            differ = [w for w, then, now in zip(words, files[name], mine[name], strict=True) if then != now]
            if differ:
                lines.append(f"{name} has another {differ[0]}: other weights")
        return first_of(lines)


def _links(path: Path, most: int = 40) -> Iterator[Path]:
    """Where each link leads that a path goes through by its last name, and the file itself."""
    for _ in range(most):
        try:
            target = os.readlink(path)
        except OSError:
            break
        path = Path(os.path.realpath(path.parent)) / target
        path = Path(os.path.realpath(path.parent)) / path.name
        yield path
    yield Path(os.path.realpath(path))


def other_plan(output: object, expected: str, found: str, source: Sighting | None, kept: Any) -> InputError:
    """`other-plan`, to raise: what is unfinished is of the plan with the digest `found`."""
    lines = source.other_weights(kept) if source else []
    return fail(
        "other-plan",
        f"an unfinished run of another plan is in {output}",
        notes=(f"expected: {expected}", f"found:    {found}", *lines),
        help="run that plan to go on with it, or use --restart to throw its work away",
    )
