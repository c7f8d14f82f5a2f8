"""Finding an Orbax checkpoint: whatever part of its place is given, the directory of the arrays is found.

    [RUN_DIR/][checkpoints/][step/][items | default | …/]     _METADATA, and the arrays

Any of these may be given: `OUT`, `OUT/0`, `OUT/0/items`; the directory of a training run, its `checkpoints`, one step.
A step's name ends in its number, as Orbax writes it: `7`, `step_00000007`. Of several steps the last complete one is
taken, and `Step.said` says so. Orbax gives a checkpoint its name when it is complete, and writes `_METADATA` before
that: a directory without it is not complete, or was not copied whole.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ckptc.diagnostics import InputError, fail
from ckptc.storage.source.files import NOT_UTF8, is_text

METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
STEP_METADATA = "_CHECKPOINT_METADATA"
MAX_JSON = 16 << 20  # bytes of a metadata file: some 500 are of an array; parsed, a hostile one takes 30 times as many
CHECKPOINTS = "checkpoints"  # below a run's directory, where MaxText saves steps
# Names that savers use, the likeliest first.
ITEMS = ("items", "default", "pytree", "model_params", "state", "params")
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not committed
SHOWN = 8  # names that one text lists

_STEP = re.compile(r"(?:.*[_-])?([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Step:
    """One complete checkpoint."""

    items: Path  # the directory of the arrays
    said: str = ""  # which step it is, where there were several to choose from

    @property
    def directory(self) -> Path:
        """The directory that has the step's own metadata; the items', where they were saved by themselves."""
        parent = self.items.parent
        return parent if (parent / STEP_METADATA).is_file() else self.items


def find_step(given: Path) -> Step:
    """The checkpoint in `given`, above it or below it. Raises `missing-directory`, `no-checkpoint`,
    `unfinished-checkpoint`, `which-item`.
    """
    require_directory(given, _HELP)
    if not is_text(os.path.abspath(given)):  # TensorStore takes paths as JSON
        raise fail("no-checkpoint", f"{given} cannot be read: its path is not UTF-8", help=NOT_UTF8)
    unfinished = next((p for p in (given, *given.parents) if UNFINISHED in p.name), None)
    if unfinished is not None:
        raise _unfinished(unfinished, "Orbax has not given it its name", "give another step")
    for directory in (given, given / CHECKPOINTS):
        if directory.is_dir() and (found_step := _own(directory) or _last(directory)):
            return found_step
    tmp = [p.name for p in sorted(given.iterdir()) if UNFINISHED in p.name]
    notes = (f"unfinished: {', '.join(tmp[:SHOWN])}",) if tmp else ()
    raise fail("no-checkpoint", f"{given} holds no finished Orbax checkpoint", notes=notes, help=_HELP)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a step, or the items of one: of ckptc's or Orbax's, complete or not."""
    if not directory.is_dir():
        return False
    if (directory / STEP_METADATA).is_file():
        return True
    return any(_holds_arrays(p) for p in (directory, *directory.iterdir()) if p.is_dir())


def require_directory(given: Path, help: str) -> None:
    """Raises `missing-directory`."""
    if not given.is_dir():
        found = "found: a file" if given.exists() else "found: nothing"
        raise fail("missing-directory", f"{given} is not a directory", notes=(found,), help=help)


_HELP = "give the --output of a run that has ended, a step, or its `items`"


def _own(directory: Path) -> Step | None:
    """The checkpoint of a directory that is the items, or a step. Raises `which-item`, `unfinished-checkpoint`."""
    items = _items(directory)
    if items is None:
        return None
    if not (items / METADATA).is_file():
        help = "copy the checkpoint again, whole, or give another step"
        raise _unfinished(items, f"it has no `{METADATA}`, which says what is stored", help)
    return Step(items)


def _items(directory: Path) -> Path | None:
    if _holds_arrays(directory):
        return directory
    inside = [
        p
        for p in sorted(directory.iterdir())
        if p.is_dir() and UNFINISHED not in p.name and number(p) is None and _holds_arrays(p)
    ]
    named = [directory / name for name in ITEMS if directory / name in inside]
    if named:
        return named[0]
    if len(inside) > 1:
        names = ", ".join(p.name for p in inside[:SHOWN])
        raise fail(
            "which-item", f"{directory} holds several items: {names}", help="give the one that holds the parameters"
        )
    return inside[0] if inside else None


def _holds_arrays(directory: Path) -> bool:
    return (directory / METADATA).is_file() or (directory / MANIFEST).is_file()


def number(directory: Path) -> int | None:
    """The step that a directory is named for, finished or not."""
    match = _STEP.fullmatch(directory.name.partition(UNFINISHED)[0])
    return int(match[1]) if match else None


def _last(directory: Path) -> Step | None:
    """The last complete one of the steps in a directory. Raises what is wrong with the last, where none is complete."""
    numbered = [(n, p) for p in directory.iterdir() if p.is_dir() and (n := number(p)) is not None]
    steps = [p for _, p in sorted(numbered)]
    passed: list[Path] = []
    wrong: InputError | None = None
    for step in reversed(steps):
        try:
            found = None if UNFINISHED in step.name else _own(step)
        except InputError as error:
            if error.diagnostics[0].code == "which-item":
                raise
            wrong = wrong or error
            found = None
        if found is not None:
            return Step(found.items, _said(step, len(steps), passed))
        passed.append(step)
    if wrong is not None:
        raise wrong
    return None


def _said(taken: Path, steps: int, passed: list[Path]) -> str:
    if steps == 1:
        return ""
    if not passed:
        return f"{taken.name}, the last of {steps} steps"
    return f"{taken.name}, the last complete one of {steps} steps; not complete: {', '.join(p.name for p in passed[:SHOWN])}"


def _unfinished(what: Path, why: str, help: str) -> InputError:
    return fail("unfinished-checkpoint", f"{what} was not finished: {why}", help=help)
