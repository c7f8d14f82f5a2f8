"""YAML with positions: values, spans, and everything that is not part of the dialect."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptc.diagnostics import Diagnostic, InputError, Span
from ckptc.spec import document
from ckptc.spec.document import MAX_BYTES, MAX_DEPTH, Path_, load, parse
from ckptc.spec.resources import mapping_files


def problem(text: str) -> Diagnostic:
    with pytest.raises(InputError) as caught:
        parse(text, "m.yaml")
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", None), ("# only a comment\n", None), ("---\n", None), ("--- a", "a"), ("a: 1\n...\n", {"a": 1}),
        ("a", "a"), ("[]", []), ("{}", {}),
        ("a:", {"a": None}), ("a: ~", {"a": None}), ("a: null", {"a": None}), ("a: NULL", {"a": None}),
        ("a: true", {"a": True}), ("a: False", {"a": False}), ("a: yes", {"a": "yes"}), ("a: on", {"a": "on"}),
        ("a: 'true'", {"a": "true"}),
        ("a: 1", {"a": 1}), ("a: -1", {"a": -1}), ("a: +5", {"a": 5}), ("a: 0", {"a": 0}), ("a: 1_000", {"a": 1000}),
        ("a: 0x1F", {"a": 31}),
        ("a: 0o17", {"a": 15}), ("a: 0b11", {"a": 3}), ("a: '1'", {"a": "1"}), (f"a: {10**18}", {"a": 10**18}),
        ("a: 1.5", {"a": 1.5}), ("a: .5", {"a": 0.5}), ("a: 5.", {"a": 5.0}), ("a: 1e5", {"a": 1e5}),
        ("a: 1e-6", {"a": 1e-6}), ("a: 1.2.3", {"a": "1.2.3"}),
        ("a: '{{ x }}'", {"a": "{{ x }}"}), ("a: x.{{ y }}.z", {"a": "x.{{ y }}.z"}), ("'{{ x }}': 1", {"{{ x }}": 1}),
        ("x.{{ y }}: 1", {"x.{{ y }}": 1}),
        ("1: x", {"1": "x"}), ("true: x", {"true": "x"}), ("a: 'it''s'", {"a": "it's"}), ('a: "x\\ty"', {"a": "x\ty"}),
        ("a: ''", {"a": ""}),
        ("a: x  # c\nb: 'y#z'", {"a": "x", "b": "y#z"}), ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("a: >\n  x\n  y\n", {"a": "x y\n"}), ("a: x\n  y", {"a": "x y"}),
        ("a: {b: [1, {c: 2}]}", {"a": {"b": [1, {"c": 2}]}}),
        ("- a\n- b: 1\n  c: 2\n-\n  - d", ["a", {"b": 1, "c": 2}, ["d"]]),
        ("a: é😀", {"a": "é😀"}), ("\ufeffa: 1", {"a": 1}), ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: '*x'\nb: '&y'\nc: '!z'", {"a": "*x", "b": "&y", "c": "!z"}),
        ("a: x!y", {"a": "x!y"}), ("a: x&y", {"a": "x&y"}), ("a: x*y", {"a": "x*y"}), ("'<<': 1", {"<<": 1}),
        ("? a\n: b", {"a": "b"}),
        ("a: (heads head_dim) embed -> embed heads head_dim", {"a": "(heads head_dim) embed -> embed heads head_dim"}),
    ],
)  # fmt: skip
def test_yaml_becomes_plain_values(text: str, data: object) -> None:
    found = parse(text, "m.yaml").data
    assert found == data
    assert repr(found) == repr(data), "1, 1.0 and True differ"


INVALID: list[tuple[str, str, Span | None]] = [
    # what the dialect leaves out
    ("a: &x 1", "anchors and aliases", Span("m.yaml", 1, 4, 4)),
    ("a: &x {b: 1}", "anchors and aliases", Span("m.yaml", 1, 4)),
    ("&k a: 1", "anchors and aliases", Span("m.yaml", 1, 1, 4)),
    ("a: &x 1\nb: *x", "anchors and aliases", Span("m.yaml", 1, 4, 4)),
    ("a: *x", "undefined alias", Span("m.yaml", 1, 4)),
    ("&a [*a]", "anchors and aliases", Span("m.yaml", 1, 1)),
    ("&a {b: *a}", "anchors and aliases", Span("m.yaml", 1, 1)),
    ("&a [&b [&c [x, x], *c], *b]", "anchors and aliases", Span("m.yaml", 1, 1)),
    ("<<: {a: 1}", "merge keys", Span("m.yaml", 1, 1, 2)),
    ("a:\n  <<: [{b: 1}]", "merge keys", Span("m.yaml", 2, 3, 2)),
    ("a: &x {b: 1}\nc:\n  <<: *x", "anchors and aliases", Span("m.yaml", 1, 4)),
    ("a: !foo 1", "tags", Span("m.yaml", 1, 4, 6)),
    ("a: !foo {b: 1}", "tags", Span("m.yaml", 1, 4)),
    ("a: !foo [b]", "tags", Span("m.yaml", 1, 4)),
    ("a:\n  - !foo\n    b: 1", "tags", Span("m.yaml", 2, 5)),
    ("!foo\na: 1", "tags", Span("m.yaml", 1, 1)),
    ("!foo a: 1", "tags", None),
    ("a: 1\n!foo b: 2", "tags", Span("m.yaml", 2, 1, 6)),
    ("{a: 1, !!str b: 2}", "tags", Span("m.yaml", 1, 8, 7)),
    ("a: ! 5", "tags", Span("m.yaml", 1, 4, 3)),
    ("a: !!str 5", "tags", Span("m.yaml", 1, 4, 7)),
    ("a: !!int '5'", "tags", Span("m.yaml", 1, 4, 9)),
    ("a: !!set {b, c}", "tags", Span("m.yaml", 1, 4)),
    ("a: !!omap [b: 1]", "tags", Span("m.yaml", 1, 4)),
    ("a: !!binary aGk=", "tags", Span("m.yaml", 1, 4, 13)),
    ("a: !!python/object/apply:os.system [id]", "tags", Span("m.yaml", 1, 4)),
    ("a: !<tag:yaml.org,2002:str> 5", "tags", None),
    ("%TAG ! tag:x,2000:\n---\na: !y 1", "tags", Span("m.yaml", 3, 4, 4)),
    ("a: 1\n---\nb: 2", "another document", Span("m.yaml", 2, 1)),
    ("--- a\n--- b", "another document", Span("m.yaml", 2, 1)),
    ("? [a, b]\n: 1", "keys must be plain text", Span("m.yaml", 1, 3)),
    ("{{ x }}: 1", "keys must be plain text", Span("m.yaml", 1, 1)),
    ("a: {{ x }}", "keys must be plain text", Span("m.yaml", 1, 5)),
    ("a: 2024-01-01", "is a timestamp to YAML", Span("m.yaml", 1, 4, 10)),
    ("a: =", "is a value to YAML", Span("m.yaml", 1, 4)),
    # numbers that are none, or too large
    ("a: .nan", "`.nan` is not a value", Span("m.yaml", 1, 4, 4)),
    ("a: .inf", "`.inf` is not a value", Span("m.yaml", 1, 4, 4)),
    ("a: [1, -.INF]", "`-.INF` is not a value", Span("m.yaml", 1, 8, 5)),
    ("a: 1e999", "`1e999` is not a value", Span("m.yaml", 1, 4, 5)),
    ("a: 010", "`010` is not a value", Span("m.yaml", 1, 4, 3)),
    ("a: 0x_", "is not a value", Span("m.yaml", 1, 4, 3)),
    (f"a: {10**18 + 1}", "is not a value", Span("m.yaml", 1, 4, 19)),
    ("a: " + "9" * 5000, "is not a value", Span("m.yaml", 1, 4, 5000)),
    ("%YAML 1.1\n---\na: yes", "`yes` is not a value", Span("m.yaml", 3, 4, 3)),
    ("%YAML 1.1\n---\na: 1:30", "`1:30` is not a value", Span("m.yaml", 3, 4, 4)),
    # not YAML
    ("a:\n\tb: 1", "cannot start any token", Span("m.yaml", 2, 1)),
    ("\ta: 1", "cannot start any token", Span("m.yaml", 1, 1)),
    ("a: 'x", "end of stream", Span("m.yaml", 1, 6)),
    ("a: [1, 2", "expected ',' or ']'", Span("m.yaml", 1, 9)),
    ("a: b: c", "mapping values are not allowed", Span("m.yaml", 1, 5)),
    ("- a\nb: c", "expected <block end>", Span("m.yaml", 2, 1)),
    ("a: @x", "cannot start any token", Span("m.yaml", 1, 4)),
    ("a: `x`", "cannot start any token", Span("m.yaml", 1, 4)),
    ("a: %x", "cannot start any token", Span("m.yaml", 1, 4)),
    ("...", "expected the node content", Span("m.yaml", 1, 1)),
    ("a: \x00", "unacceptable character", None),
    ("a: \x07", "unacceptable character", None),
    ("a: \ud800", "unacceptable character", None),
    # nested deeply
    ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested too deeply", Span("m.yaml", 1, MAX_DEPTH + 2)),
    ("[" * 5000, "nested too deeply", None),
    ("{a: " * 3000, "nested too deeply", None),
    ("- " * 3000 + "x", "nested too deeply", None),
    ("? " * 3000, "nested too deeply", None),
    ("[" * 3000 + "]" * 3000, "nested too deeply", None),
]


@pytest.mark.parametrize(("text", "message", "span"), INVALID, ids=[text[:30] for text, _, _ in INVALID])
def test_what_is_not_in_the_dialect_is_refused_at_its_place(text: str, message: str, span: Span | None) -> None:
    diagnostic = problem(text)
    assert diagnostic.code == "invalid-yaml"
    assert message in diagnostic.message
    assert span is None or diagnostic.span == span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("a: 1\nb: 2\na: 3", Span("m.yaml", 3, 1, 1)),
        ("a: {bb: 1, bb: 2}", Span("m.yaml", 1, 12, 2)),
        ("a: {b: 1, 'b': 2}", Span("m.yaml", 1, 11, 3)),
        ("1: x\n'1': y", Span("m.yaml", 2, 1, 3)),
        ("x:\n  - a: 1\n    a: 2", Span("m.yaml", 3, 5, 1)),
    ],
)
def test_a_duplicate_key_is_refused_where_it_stands_again(text: str, span: Span) -> None:
    diagnostic = problem(text)
    assert (diagnostic.code, diagnostic.span) == ("duplicate-key", span)


def test_as_deep_as_allowed_parses() -> None:
    assert parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "m").data != []


@pytest.mark.parametrize("text",
    ["[" + "1," * 10_000 + "]", "-\n" * 10_000, "".join(f"k{n}: v\n" for n in range(5_000)),
                                  "'" * 200_000, "#" * 200_000, "!" * 200_000, "&" * 200_000,
                                  "a: '" + "\\" * 200_000])  # fmt: skip
def test_large_input_is_read_or_refused_in_time(text: str) -> None:
    assert len(text) <= MAX_BYTES
    started = time.process_time()
    with suppress(InputError):
        parse(text, "m")
    assert time.process_time() - started < 10


TEXT = """\
family: gemma
dims: {layers: 12, 'embed': "text.size"}
tensors:
  - from: "{{ text }}.weight"   # where
    as: '(heads head_dim) embed'
    ops: [{scale: 2}, {cast: bfloat16}]
  - plain text
deep:
    wide: |
      one
      two
    quoted: "a
      b"
    nothing:
end: é😀 x
"""

SPANS: list[tuple[Path_, tuple[int, int, int] | None, tuple[int, int, int]]] = [
    ((), None, (1, 1, 1)),
    (("family",), (1, 1, 6), (1, 9, 5)),
    (("dims",), (2, 1, 4), (2, 7, 1)),
    (("dims", "layers"), (2, 8, 6), (2, 16, 2)),
    (("dims", "embed"), (2, 20, 7), (2, 29, 11)),
    (("tensors",), (3, 1, 7), (4, 3, 1)),
    (("tensors", 0), None, (4, 5, 1)),
    (("tensors", 0, "from"), (4, 5, 4), (4, 11, 19)),
    (("tensors", 0, "as"), (5, 5, 2), (5, 9, 24)),
    (("tensors", 0, "ops"), (6, 5, 3), (6, 10, 1)),
    (("tensors", 0, "ops", 0), None, (6, 11, 1)),
    (("tensors", 0, "ops", 0, "scale"), (6, 12, 5), (6, 19, 1)),
    (("tensors", 0, "ops", 1), None, (6, 23, 1)),
    (("tensors", 0, "ops", 1, "cast"), (6, 24, 4), (6, 30, 8)),
    (("tensors", 1), None, (7, 5, 10)),
    (("deep",), (8, 1, 4), (9, 5, 1)),
    (("deep", "wide"), (9, 5, 4), (9, 11, 1)),
    (("deep", "quoted"), (12, 5, 6), (12, 13, 1)),
    (("deep", "nothing"), (14, 5, 7), (14, 5, 7)),
    (("end",), (15, 1, 3), (15, 6, 4)),
]


@pytest.mark.parametrize(("path", "key", "value"), SPANS, ids=str)
@pytest.mark.parametrize("variant", ["lf", "crlf", "bom"])
def test_keys_and_values_know_their_place(
    path: Path_, key: tuple[int, int, int] | None, value: tuple[int, int, int], variant: str
) -> None:
    text = {"lf": TEXT, "crlf": TEXT.replace("\n", "\r\n"), "bom": "\ufeff" + TEXT}[variant]
    document = parse(text, "m.yaml")
    assert document.span(path) == Span("m.yaml", *value)
    assert document.key_span(path) == Span("m.yaml", *(key or value))
    line = document.text.splitlines()[value[0] - 1]
    assert value[1] - 1 + value[2] <= len(line) + 1


def test_every_key_and_value_of_the_data_has_a_span() -> None:
    document = parse(TEXT, "m.yaml")

    def walk(data: object, path: Path_) -> None:
        assert path in document.values
        if isinstance(data, dict):
            for key, value in data.items():
                assert (*path, key) in document.keys
                walk(value, (*path, key))
        if isinstance(data, list):
            for i, item in enumerate(data):
                walk(item, (*path, i))

    walk(document.data, ())
    assert set(document.values) == {p for p, _, _ in SPANS}


def test_a_path_that_is_not_there_gives_what_encloses_it() -> None:
    document = parse(TEXT, "m.yaml")
    assert document.span(("dims", "missing", 3)) == document.span(("dims",))
    assert document.span(("missing",)) == Span("m.yaml", 1, 1, 1)
    assert document.key_span(("tensors", 1)) == document.span(("tensors", 1))
    assert parse("", "m").span(("x",)) == Span("m", 1, 1)


@pytest.mark.parametrize(
    ("line", "start", "length", "shown"),
    [
        ("k: vocab embed", 6, 5, "embed"),
        ("k: 'vocab embed'", 6, 5, "embed"),
        ('k: "vocab embed"', 0, 5, "vocab"),
        ("  k:   vocab embed  # c", 6, 5, "embed"),
        ("'k': {j: 'vocab embed'}", 6, 5, "embed"),
        ("{a: 1, k: [vocab embed]}", 6, 5, "embed"),
        ("k: é😀 embed", 3, 5, "embed"),
        ("k: vocab embed", 10, 1, "d"),
        ("k: vocab embed", 5, 0, " "),
        # beyond the text, or not the text as written: the whole value
        ("k: vocab embed", 10, 2, "vocab embed"),
        ("k: 'vocab embed'", 11, 1, "'vocab embed'"),
        ('k: "vocab\\tembed"', 6, 5, '"vocab\\tembed"'),
        ("k: 'it''s embed'", 5, 5, "'it''s embed'"),
        ("k: ''", 0, 1, "''"),
        ("k: 12", 0, 1, "1"),
    ],
)
def test_a_place_within_a_value(line: str, start: int, length: int, shown: str) -> None:
    document = parse("# before\n" + line, "m.yaml")
    path: Path_ = max(document.values, key=len)
    span = document.within(path, start, length)
    assert span.line == 2
    assert line[span.column - 1 : span.column - 1 + span.length] == shown


@pytest.mark.parametrize("value", ["|\n  one two\n", ">\n  one two\n", '"one\n  two"', "one\n  two", "'one\n  two'"])
def test_a_place_within_a_value_of_several_lines_is_the_value(value: str) -> None:
    document = parse(f"k: {value}", "m.yaml")
    assert document.within(("k",), 4, 3) == document.span(("k",))


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85"])
def test_lines_are_counted_as_yaml_counts_them(odd: str) -> None:
    document = parse(f"a: 'x{odd}y'\nb: one two", "m.yaml")
    assert document.within(("b",), 4, 3) == Span("m.yaml", 2, 8, 3)


def test_a_byte_order_mark_moves_nothing() -> None:
    document = parse("\ufeffb: one two", "m.yaml")
    assert document.within(("b",), 4, 3) == Span("m.yaml", 1, 8, 3)
    assert document.text[7:10] == "two"


def test_load_reads_a_file_and_calls_it_as_told(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("a: é", encoding="utf-8")
    assert load(path).data == {"a": "é"}
    assert load(path).span(("a",)).file == str(path)
    assert load(path, "mappings/m.yaml").span(("a",)).file == "mappings/m.yaml"


@pytest.mark.parametrize(
    ("raw", "code", "message"),
    [
        (b"a: \xff\xfe", "invalid-yaml", "is not UTF-8 text (byte 3)"),
        ("a: 1".encode("utf-16"), "invalid-yaml", "is not UTF-8 text (byte 0)"),
        (b"a: caf\xe9", "invalid-yaml", "is not UTF-8 text (byte 6)"),
        (b"#" * (MAX_BYTES + 1), "invalid-yaml", "is larger than a mapping can be"),
        (b"a: \x00", "invalid-yaml", "unacceptable character"),
    ],
)
def test_load_refuses_what_is_no_mapping(tmp_path: Path, raw: bytes, code: str, message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        load(path, "m.yaml")
    assert caught.value.diagnostics[0].code == code
    assert message in caught.value.diagnostics[0].message
    assert "m.yaml" in caught.value.diagnostics[0].message


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_load_says_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path / name)
    assert caught.value.diagnostics[0].code == "unreadable-mapping"


def test_load_reads_a_mapping_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    document = load(path)
    assert (document.data, document.span(("a",))) == ({"a": 1}, Span(str(path), 1, 4, 1))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(
    ["a", "b", ": ", ":", "- ", "\n", "  ", "{", "}", "[", "]", ", ", "'", '"', "|", ">", "&x ", "*x", "!t ", "? ", "#",
        "\\", "1", ".5", ".inf", "~",
     "<<", "---\n", "...\n", "%YAML 1.1\n", "\t", "\r\n", "=", "é", "\ufeff", "0x", "{{ x }}", "@", "2024-01-01"]
), max_size=14).map("".join))  # fmt: skip
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        document = parse(text, "m")
    except InputError as error:
        assert error.diagnostics[0].code in ("invalid-yaml", "duplicate-key")
        assert error.diagnostics[0].message
        return
    lines = document.text.split("\n")
    for span in (*document.keys.values(), *document.values.values()):
        assert 1 <= span.line <= len(lines) and span.column >= 1 and span.length >= 1


# -- two parsers ---------------------------------------------------------------------------------------------


def outcome(text: str, libyaml: bool) -> object:
    """What a text is with one of the two parsers: data and places, or what is wrong with it and where."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "LIBYAML", libyaml)
        try:
            found = parse(text, "m.yaml")
        except InputError as error:
            return error.diagnostics
    return found.data, found.keys, found.values


@pytest.mark.parametrize("file", mapping_files(), ids=lambda file: file.stem)
def test_a_shipped_mapping_is_the_same_with_both_parsers(file: Path) -> None:
    text = file.read_text("utf-8")
    found = outcome(text, True)
    assert isinstance(found[0], dict)  # type: ignore[index]
    assert found == outcome(text, False)


PIECES = (
    "\n", "  ", " ", "- ", ": ", "? ", ",", "[", "]", "{", "}", "&a ", "*a", "!x ", "'", '"', "|", ">", "#", " #", "%", "@", "`", "~", "null", "yes",
    "on", "0o7", "07", "0x1f", "1_000", "1e3", ".inf", "1:30", "2020-01-01", "\t", "|#", "\x85", "\u2028", "\ufeff", "é", "😀", "\x07", "\\x41", "\\ud800",
    "---", "...", "<<", "=", "a", "b: ", "key: {a: 1, b: [2, 3]}", "\r\n", "\r", "\x00", "{{ x }}", "\\/",
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_text_is_the_same_with_both_parsers(data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=14)))
    else:
        text = "family: f\ndims: { a: 1, b: x + 1 }\ntensors:\n  a/b: { from: 'x{{ i }}', as: c d -> d c }\n  c: [1, \"t\"]\n"
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(text)))
            text = text[:at] + data.draw(st.sampled_from(PIECES)) + text[at + data.draw(st.integers(0, 3)) :]
    assert outcome(text, True) == outcome(text, False)


@pytest.mark.parametrize(
    "deep", ["[" * 60_000, "- " * 60_000, "? " * 60_000, "{a: " * 30_000, "-\n" * 60_000, "a: [" * 9]
)
def test_what_is_nested_deeply_does_not_end_the_process(deep: str) -> None:
    assert outcome(deep, True) == outcome(deep, False)
