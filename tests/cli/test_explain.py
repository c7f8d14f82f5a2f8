"""The catalogue has every code that can be raised and no other, and `ckptc explain` reads it out."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import ckptc as package
from ckptc.cli.explain import WIDTH, catalogue

from .conftest import Command

SOURCE = Path(package.__file__).parent
CODE = re.compile(r"[a-z]+(-[a-z]+)+")
KINDS = ("header", "index", "config")  # of JSON files: `strict_json` makes codes of them


def raised() -> set[str]:
    """Every string of the source that is spelled as codes are, those that begin with `{kind}` for each kind."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr) and len(node.values) == 2:
                kind, rest = node.values
                if (
                    isinstance(kind, ast.FormattedValue)
                    and isinstance(rest, ast.Constant)
                    and ast.unparse(kind.value) == "kind"
                ):
                    found |= {k + str(rest.value) for k in KINDS}
    return found


def test_every_code_is_in_the_catalogue_and_every_entry_is_of_a_code() -> None:
    codes = raised()
    assert {"shape-mismatch", "header-json", "unsafe-path"} <= codes, "codes are string literals"
    assert sorted(codes - catalogue().keys()) == []
    assert sorted(catalogue().keys() - codes) == []


@pytest.mark.parametrize("code", catalogue())
def test_an_entry_is_a_cause_and_a_cure_in_sentences(code: str) -> None:
    entry = catalogue()[code]
    assert list(entry) == ["cause", "cure"]
    for text in entry.values():
        assert text.rstrip().endswith((".", "`")) and "\n" not in text.strip()


def test_a_code_is_explained_as_it_is_copied_from_an_error(ckptc: Command) -> None:
    plain = ckptc("explain", "shape-mismatch")
    assert plain.code == 0 and plain.err == ""
    assert plain.out.startswith("shape-mismatch\n  cause: ") and "\n  cure:  " in plain.out
    assert max(map(len, plain.out.splitlines())) <= WIDTH
    assert ckptc("explain", "error[shape-mismatch]:") == plain


def test_without_a_code_all_are_listed_with_their_causes(ckptc: Command) -> None:
    lines = ckptc("explain").out.splitlines()
    assert [line.split()[0] for line in lines] == list(catalogue())
    assert all(len(line.split()) > 3 for line in lines)


def test_json_has_the_same_words(ckptc: Command) -> None:
    assert json.loads(ckptc("explain", "--json").out) == catalogue()
    assert json.loads(ckptc("explain", "lfs-pointer", "--json").out) == {
        "code": "lfs-pointer",
        **catalogue()["lfs-pointer"],
    }


def test_an_unknown_code_is_refused_with_the_nearest(ckptc: Command) -> None:
    result = ckptc("explain", "unkown-dim")
    assert (result.code, result.out) == (1, "")
    assert "error[unknown-code]" in result.err and "did you mean `unknown-dim`?" in result.err
    assert "lists all of them" in ckptc("explain", "qqqq").err
