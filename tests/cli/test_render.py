"""Diagnostics and numbers as text: carets under the right characters, nothing a terminal would obey."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptc.cli.render import LINE_MOST, TEXT_MOST, count, diagnostic, diagnostics, size, table
from ckptc.diagnostics import Diagnostic, Span
from ckptc.spec.resources import mapping_files


def shown(text: str, line: int, column: int, length: int, tmp_path: Path) -> tuple[str, str]:
    """The source line and the line of carets under it, without the margin."""
    file = tmp_path / "m.yaml"
    file.write_bytes(text.encode())
    lines = diagnostic(Diagnostic("a-code", "m", Span(str(file), line, column, length))).splitlines()
    assert len(lines) == 5
    margin = len(f"{line} | ")
    return lines[3][margin:], lines[4][margin:]


def test_every_field_is_shown(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("a: 1\n" * 9 + "key: value\n", "utf-8")
    found = Diagnostic(
        "a-code", "what is wrong", Span(str(tmp_path / "m.yaml"), 10, 6, 5), ("expected: 1", "found: 2"), "do this"
    )
    assert diagnostic(found) == (
        "error[a-code]: what is wrong\n"
        f"  --> {tmp_path}/m.yaml:10:6\n"
        "   |\n"
        "10 | key: value\n"
        "   |      ^^^^^\n"
        "   = expected: 1\n"
        "   = found: 2\n"
        "   = help: do this"
    )


def test_without_a_place_there_is_no_excerpt() -> None:
    assert diagnostic(Diagnostic("a-code", "m", None, ("n",), "h")) == "error[a-code]: m\n  = n\n  = help: h"


def test_a_file_that_is_gone_leaves_the_place() -> None:
    assert (
        diagnostic(Diagnostic("a-code", "m", Span("no/such.yaml", 3, 1))) == "error[a-code]: m\n --> no/such.yaml:3:1"
    )


def test_shipped_mappings_are_found_by_their_short_name() -> None:
    file = mapping_files()[0]
    first = file.read_text("utf-8").splitlines()[0]
    assert f"1 | {first}" in diagnostic(Diagnostic("a-code", "m", Span(f"mappings/{file.name}", 1, 1)))


def test_all_are_shown_and_counted() -> None:
    one, two = Diagnostic("a-code", "first"), Diagnostic("b-code", "second")
    assert diagnostics([one]) == "error[a-code]: first\n\n1 error"
    assert diagnostics([one, two]) == "error[a-code]: first\n\nerror[b-code]: second\n\n2 errors"


def test_colour_changes_nothing_but_colour(tmp_path: Path) -> None:
    import re

    (tmp_path / "m.yaml").write_text("key: value\n", "utf-8")
    found = [Diagnostic("a-code", "m", Span(str(tmp_path / "m.yaml"), 1, 6, 5), ("n",), "h")]
    painted = diagnostics(found, color=True)
    assert "\x1b[1;31m^^^^^\x1b[0m" in painted
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == diagnostics(found)


@pytest.mark.parametrize(
    ("text", "line", "column", "length", "expected"),
    [
        ("key: value", 1, 1, 3, ("key: value", "^^^")),
        ("key: value", 1, 6, 5, ("key: value", "     ^^^^^")),
        ("key: value", 1, 11, 1, ("key: value", "          ^")),  # the end of the line
        ("key: value", 1, 9, 50, ("key: value", "        ^^")),  # never past it
        ("a:\n\tb: 1", 2, 2, 1, (" b: 1", " ^")),  # a tab is one column
        ("語: x", 1, 4, 1, ("語: x", "    ^")),  # a wide character is two
        ("語: x", 1, 1, 1, ("語: x", "^^")),
        ("e\u0301: x", 1, 5, 1, ("e\u0301: x", "   ^")),  # a combining one is none
        ("a: 1\r\nkey: value\r\n", 2, 6, 5, ("key: value", "     ^^^^^")),
        ("\ufeffkey: value", 1, 6, 5, ("key: value", "     ^^^^^")),  # a byte order mark is not a character
        ("# \x0c \u2028 \x85\nkey: value", 2, 6, 5, ("key: value", "     ^^^^^")),  # line breaks to Python alone
        ("# \x1b[31m\u200b", 1, 1, 1, ("#  [31m", "^")),
    ],
)
def test_carets_are_under_the_span(
    text: str, line: int, column: int, length: int, expected: tuple[str, str], tmp_path: Path
) -> None:
    assert shown(text, line, column, length, tmp_path) == expected


@pytest.mark.parametrize("start", [0, 1, 80, LINE_MOST - 4, LINE_MOST - 3, 500, 995])
def test_long_lines_are_cut_around_the_span(start: int, tmp_path: Path) -> None:
    text = "".join(f"{n:05}" for n in range(200))
    text = text[:start] + "MARK!" + text[start + 5 :]
    line, carets = shown(text, 1, start + 1, 5, tmp_path)
    assert len(line) <= LINE_MOST + 2
    assert line[carets.index("^") : len(carets)] == "MARK!"
    assert line.startswith("…") == (start + 5 > LINE_MOST)
    assert line.endswith("…") == (start < 990)


def test_a_span_longer_than_what_is_shown_is_underlined_as_far(tmp_path: Path) -> None:
    line, carets = shown("k: " + "x" * 5000, 1, 4, 5000, tmp_path)
    assert line[carets.index("^") : len(carets)] == "x" * carets.count("^")
    assert carets.count("^") > 50


def test_names_from_files_cannot_speak_to_the_terminal() -> None:
    found = Diagnostic("a-code", "no `a\x1b[2Jb\nc`", Span("x\x1b[2J", 1, 1), ("n\x9b\r",), "h\u202e")
    assert diagnostic(found) == (
        "error[a-code]: no `a\\x1b[2Jb\\nc`\n --> x\\x1b[2J:1:1\n  = n\\x9b\\r\n  = help: h\\u202e"
    )


def test_names_of_any_length_are_cut() -> None:
    assert len(diagnostic(Diagnostic("a-code", "x" * 10**6))) < TEXT_MOST + 20


@pytest.mark.parametrize(
    ("bytes_", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (99_960, "100 kB"),
        (123_456, "123 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (16_060_522_496, "16.1 GB"),
        (1_342_000_000_000, "1.34 TB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_have_three_digits(bytes_: int, expected: str) -> None:
    assert size(bytes_) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (999_499, "999k"),
        (999_999, "1M"),
        (8_030_261_248, "8.03B"),
        (671_026_419_200, "671B"),
        (999_999_999_999, "1T"),
        (1_600_000_000_000, "1.6T"),
        (5 * 10**15, "5000T"),
    ],
)
def test_counts_have_three_digits(number: int, expected: str) -> None:
    assert count(number) == expected


def test_tables_align_and_leave_no_spaces_at_the_end() -> None:
    assert table([("A", "B"), ("long", "x"), ("y", "")]) == "A     B\nlong  x\ny"
