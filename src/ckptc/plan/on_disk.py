"""A plan's file: read and checked, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ckptc.diagnostics import fail
from ckptc.plan import json as plan_json
from ckptc.plan.check import check_plan
from ckptc.plan.model import Plan
from ckptc.regular import open_file

_PLAN_BEGINS = b'{\n "format":'


def read_plan(path: Path) -> tuple[Plan, bytes]:
    """A plan that can be run, and its text. Raises `unreadable-plan`, and what `loads` and `check_plan` raise."""
    try:
        with open_file(path) as file:
            text = file.read(plan_json.MAX_BYTES + 1)
    except OSError as error:
        raise fail(
            "unreadable-plan", f"cannot read {path}: {error.strerror}", help="`ckptc compile -o PLAN` writes plans"
        ) from None
    plan = plan_json.loads(text, str(path))
    check_plan(plan, str(path))
    return plan, text


def write_plan(path: Path, text: str, force: bool) -> None:
    """Whole or not at all; replaces an earlier plan, and nothing else unless told to."""
    try:
        _refuse_to_replace(path, force)
        final = Path(os.path.realpath(path))  # the plan that a link points at is replaced, not the link
        descriptor, temporary = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name[:50]}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, final)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        help = None if os.path.lexists(path.parent) else f"create the directory {path.parent} first"
        raise fail("unwritable-output", f"cannot write {path}: {error.strerror}", help=help) from None


def _refuse_to_replace(path: Path, force: bool) -> None:
    if not path.exists():
        return
    if not path.is_file():
        what = "a directory" if path.is_dir() else "not a regular file"
        help = "`-o` names the plan's own file; `--dump-plan` prints the plan"
        raise fail("output-exists", f"{path} is {what}", help=help)
    if not force:
        with path.open("rb") as file:
            if file.read(len(_PLAN_BEGINS)) != _PLAN_BEGINS:
                raise fail(
                    "output-exists", f"{path} exists and is not a plan", help="choose another name, or use --force"
                )
