"""The catalogue has every code that can be raised and no other, and `ckptc explain` reads it out."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

import ckptc as package
from ckptc.cli.explain import WIDTH, catalogue

from .conftest import Command

SOURCE = Path(package.__file__).parent
CODE = re.compile(r"[a-z]+(-[a-z]+)+")
METHODS = {"compressed-tensors"}  # of quantisation, spelled as codes are
KINDS = ("header", "index", "config")  # of JSON files: `JsonReader` makes codes of them


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
                    and ast.unparse(kind.value) in ("kind", "self._kind")
                ):
                    found |= {k + str(rest.value) for k in KINDS}
    return found


def test_every_code_is_in_the_catalogue_and_every_entry_is_of_a_code() -> None:
    codes = raised() - METHODS
    assert {"shape-mismatch", "header-json", "unsafe-path"} <= codes, "codes are string literals"
    assert sorted(codes - catalogue().keys()) == []
    assert sorted(catalogue().keys() - codes) == []


def written() -> dict[str, dict[str, str]]:
    """The catalogue as its file has it, read by another library than ckptc's own reader."""
    read = yaml.safe_load((SOURCE / "cli" / "codes.yaml").read_text("utf-8"))
    return {code: {name: text.strip() for name, text in entry.items()} for code, entry in read.items()}


def words(text: str) -> str:
    return " ".join(text.split())


def test_every_entry_is_a_cause_and_a_cure_in_sentences() -> None:
    entries = written()
    assert len(entries) > 100
    for code, entry in entries.items():
        assert list(entry) == ["cause", "cure"], code
        for text in entry.values():
            assert len(text.split()) >= 3 and text.endswith((".", "`")) and "\n" not in text, code


@pytest.mark.parametrize("code", ["shape-mismatch", "disk-full", "header-too-large"])
def test_a_code_is_explained_in_the_words_of_its_entry(code: str, ckptc: Command) -> None:
    plain = ckptc("explain", code)
    entry = written()[code]
    assert (plain.code, plain.err) == (0, "")
    assert words(plain.out) == words(f"{code} cause: {entry['cause']} cure: {entry['cure']}")
    assert max(map(len, plain.out.splitlines())) <= WIDTH
    assert len(plain.out.splitlines()) > 2


@pytest.mark.parametrize("copied", ["error[{}]:", "error[{}]", "[{}]", "{}:"])
def test_a_code_may_be_given_as_it_is_copied_from_an_error(copied: str, ckptc: Command) -> None:
    assert ckptc("explain", copied.format("lfs-pointer")) == ckptc("explain", "lfs-pointer")
    assert ckptc("explain", "lfs-pointer").out.startswith("lfs-pointer\n")


def test_without_a_code_all_are_listed_with_the_beginnings_of_their_causes(ckptc: Command) -> None:
    lines = ckptc("explain").out.splitlines()
    assert len(lines) == len(written())
    for line, (code, entry) in zip(lines, written().items(), strict=True):
        name, cause = line.split(maxsplit=1)
        assert name == code
        assert words(entry["cause"]).startswith(cause.removesuffix("…").strip())
        assert len(cause) > 15 and len(line) <= WIDTH + 2


def test_json_has_the_same_words(ckptc: Command) -> None:
    read = json.loads(ckptc("explain", "--json").out)
    assert {code: {n: t.strip() for n, t in entry.items()} for code, entry in read.items()} == written()
    one = json.loads(ckptc("explain", "lfs-pointer", "--json").out)
    assert one.pop("code") == "lfs-pointer"
    assert {name: text.strip() for name, text in one.items()} == written()["lfs-pointer"]


def test_an_unknown_code_is_refused_with_the_nearest(ckptc: Command) -> None:
    result = ckptc("explain", "unkown-dim")
    assert (result.code, result.out) == (1, "")
    assert "error[unknown-code]" in result.err and "did you mean `unknown-dim`?" in result.err
    assert "lists all of them" in ckptc("explain", "qqqq").err
