"""Diagnostics in the form that a person or a program reads: `--format text`, `json` or `github`.

    text      the place in the file, the line, a caret: `ckptc.cli.render`
    json      one array of objects: code, message, file, line, column, length, notes, help; null where there is no place
    github    a workflow command for each, which GitHub shows at the line of a change
              (https://docs.github.com/actions, "Workflow commands", `::error file=…,line=…::…`)

All of them go to stderr; what a command prints on stdout is its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ckptc.diagnostics import Diagnostic

FORMATS = ("text", "json", "github")


def add_format(parser: argparse.ArgumentParser) -> None:
    """The option, for each command."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="of errors, on stderr: for people (default), an array of JSON, or GitHub's workflow commands",
    )


def formatted(found: Sequence[Diagnostic], form: str, color: bool = False) -> str:
    """All of them, in one of FORMATS."""
    if form == "json":
        return json.dumps([record(d) for d in found], indent=1)
    if form == "github":
        return "\n".join(map(_github, found))
    from ckptc.cli.render import diagnostics

    return diagnostics(found, color)


def record(d: Diagnostic) -> dict[str, Any]:
    """A diagnostic as JSON values."""
    return {
        "code": d.code,
        "message": d.message,
        "file": d.span.file if d.span else None,
        "line": d.span.line if d.span else None,
        "column": d.span.column if d.span else None,
        "length": d.span.length if d.span else None,
        "notes": list(d.notes),
        "help": d.help,
        "related": [
            {"what": what, "file": s.file, "line": s.line, "column": s.column, "length": s.length}
            for what, s in (d.span.also if d.span else ())
        ],
    }


def _github(d: Diagnostic) -> str:
    place = {"file": d.span.file, "line": d.span.line, "col": d.span.column} if d.span else {}
    properties = ",".join(f"{name}={_escaped(str(value), ':,')}" for name, value in {**place, "title": d.code}.items())
    lines = [d.message, *d.notes, *([f"help: {d.help}"] if d.help else [])]
    return f"::error {properties}::{_escaped(chr(10).join(lines))}"


def _escaped(text: str, more: str = "") -> str:
    """As the runner's `escapeData` and `escapeProperty` do it; a name cannot end a command and begin another."""
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text.encode("utf-8", "backslashreplace").decode()
