"""Diagnostics for programs: JSON as it is documented, and commands that GitHub understands and no name can break out of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ckptc.cli.formats import FORMATS, formatted
from ckptc.cli.main import parser
from ckptc.diagnostics import Diagnostic, Span

from .conftest import Command

FULL = Diagnostic(
    "shape-mismatch", "`a` has another shape", Span("m.yaml", 8, 3, 5), ("expected: [1]", "found: [2]"), "use --set"
)
BARE = Diagnostic("no-output", "nothing is named")


def test_json_is_one_array_with_every_field() -> None:
    found = json.loads(formatted([FULL, BARE], "json"))
    assert found[0] == {
        "code": "shape-mismatch",
        "message": "`a` has another shape",
        "file": "m.yaml",
        "line": 8,
        "column": 3,
        "length": 5,
        "notes": ["expected: [1]", "found: [2]"],
        "help": "use --set",
        "related": [],
    }
    assert found[1].keys() == found[0].keys()
    assert {k: v for k, v in found[1].items() if v} == {"code": "no-output", "message": "nothing is named"}


def test_github_has_a_line_for_each_with_its_place() -> None:
    first, second = formatted([FULL, BARE], "github").split("\n")
    assert first == (
        "::error file=m.yaml,line=8,col=3,title=shape-mismatch::"
        "`a` has another shape%0Aexpected: [1]%0Afound: [2]%0Ahelp: use --set"
    )
    assert second == "::error title=no-output::nothing is named"


@pytest.mark.parametrize("name", ["a\n::set-output name=x::y", "100%,a:b\r", "\ud800", "%0A::warning::"])
def test_no_name_ends_a_github_command_and_begins_another(name: str) -> None:
    text = formatted([Diagnostic("missing-file", name, Span(name, 1, 1), (name,), name)], "github")
    assert len(re.split(r"[\r\n]", text)) == 1
    properties, _, _ = text.removeprefix("::error ").partition("::")
    assert len(properties.split(",")) == 4, "a comma in a name is not a property's end"
    text.encode("utf-8")
    back = text
    for escaped, character in (("%2C", ","), ("%3A", ":"), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        back = back.replace(escaped, character)
    assert back.count(name if name.isprintable() or "\n" in name or "\r" in name else "\\ud800") == 4


def test_text_is_the_default_and_each_command_has_all_of_them() -> None:
    commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert len(commands) >= 8
    for name, command in commands.items():  # type: ignore[union-attr]
        (option,) = (a for a in command._actions if a.dest == "format")
        assert (tuple(option.choices), option.default) == (FORMATS, "text"), name


def test_a_command_prints_them_on_stderr_and_exits_alike(ckptc: Command, mapping: str) -> None:
    text = Path(mapping).read_text("utf-8").replace("embed mlp -> mlp embed", "embed mlp -> mlp embd")
    Path(mapping).write_text(text, "utf-8")
    argv = ("compile", "--mapping", mapping, "--model", "tiny")
    results = {form: ckptc(*argv, "--format", form) for form in FORMATS}
    assert {(r.code, r.out) for r in results.values()} == {(1, "")}
    (record,) = json.loads(results["json"].err)
    line = text[: text.index("embd")].count("\n") + 1
    assert (record["file"], record["line"]) == ("mapping.yaml", line)
    assert results["github"].err.startswith(
        f"::error file=mapping.yaml,line={line},col={record['column']},title={record['code']}::"
    )
    assert f"mapping.yaml:{line}:{record['column']}" in results["text"].err
    assert results["text"] == ckptc(*argv)
