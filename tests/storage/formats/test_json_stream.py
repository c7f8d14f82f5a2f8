"""Documents read a value at a time are what `json` makes of them whole, wherever blocks end; too much is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptc.diagnostics import InputError, Span
from ckptc.storage.formats import json_stream
from ckptc.storage.formats.json_stream import JsonReader, strict_json

SIZES = st.integers(1, 9) | st.integers(10, 60)


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def refusal(data: bytes, size: int = 1 << 20, span_file: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        strict_json(cut(data, size), "f", "index", span_file)
    return caught.value


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(st.text(max_size=8), values, max_size=6)


@settings(max_examples=150, deadline=None)
@given(objects, SIZES, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_an_object_is_what_json_makes_of_it(value: Any, size: int, ascii: bool, indent: Any) -> None:
    data = json.dumps(value, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass")
    try:
        data.decode()
    except UnicodeDecodeError:
        return
    read = strict_json(cut(data, size), "f", "index")
    assert read == value and list(read) == list(value)


@settings(max_examples=300, deadline=None)
@given(objects, SIZES, st.data())
def test_what_json_refuses_is_refused_with_its_words_at_its_place(value: Any, size: int, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=data.draw(st.sampled_from([None, 1])))
    at = data.draw(st.integers(0, len(text) - 1))
    change = data.draw(st.sampled_from(["", *'{}[]",:0-.eE\\u \n\x01Nt']))
    text = text[:at] + change + text[at + data.draw(st.integers(0, 3)) :]
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return
    try:
        repeated = []
        found = json.loads(text, object_pairs_hook=lambda p: repeated.append(len(dict(p)) != len(p)) or dict(p))
    except json.JSONDecodeError as error:
        (problem,) = refusal(raw, size, "f").diagnostics
        assert problem.code == "index-json"
        assert problem.span == Span("f", error.lineno, error.colno)
        assert problem.notes[1] == f"found: {error.msg[:1].lower() + error.msg[1:]}"
        return
    if type(found) is not dict or any(repeated):
        (problem,) = refusal(raw, size).diagnostics
        assert problem.code in ("index-not-object", "index-duplicate-key", "index-json")
        return
    try:
        assert strict_json(cut(raw, size), "f", "index") == found
    except InputError as error:
        assert "Infinity" in str(error.diagnostics[0].notes) or "too large for a float" in str(error.diagnostics)


@pytest.mark.parametrize("size", range(1, 40))
def test_a_place_is_counted_from_the_start_whatever_is_held(size: int) -> None:
    text = '{"é": 1,\n "b": [2,\n 3],\n "c": nul}'
    (problem,) = refusal(text.encode(), size, "f").diagnostics
    assert problem.span == Span("f", 4, 7)
    (problem,) = refusal(text.encode(), size).diagnostics
    assert f"at character {text.index('nul')}" in problem.notes[1]
    (problem,) = refusal(b'{"a": 1, "b": "\xc3\xa9\xff"}', size).diagnostics
    assert "byte 0xff at offset 17" in problem.notes[1]


def test_a_key_given_twice_is_told_at_any_depth() -> None:
    (problem,) = refusal(b'{"a": {"x": 1, "x": 2}, "b": 1, "b": 2}').diagnostics
    assert problem.code == "index-duplicate-key"
    assert "`x`, `b` more than once" in problem.notes[1]


class Endless:
    """A document that never ends, and a count of the blocks that were taken of it."""

    def __init__(self, start: bytes, again: bytes) -> None:
        self.start, self.again, self.taken = start, again * (1 << 14), 0

    def __iter__(self) -> Iterator[bytes]:
        yield self.start
        while True:
            self.taken += 1
            assert self.taken < 1000, "it would have been read for ever"
            yield self.again


@pytest.mark.parametrize(
    ("start", "again"),
    [(b'{"a": [', b"[],"), (b'{"a": "', b"x"), (b"[", b"[],"), (b'{"a": 1', b"1"), (b'{"a": {', b'"": {},')],
)
def test_a_value_without_an_end_is_refused_by_its_length(start: bytes, again: bytes) -> None:
    document = Endless(start, again)
    with pytest.raises(InputError) as caught:
        strict_json(document, "f", "index")
    (problem,) = caught.value.diagnostics
    assert (
        problem.code == "index-json" and f"{json_stream.MAX_VALUE} characters" in problem.notes[0]
    ) or "digits" in str(problem)
    assert document.taken <= 2 * json_stream.MAX_VALUE / len(document.again) + 2


def test_members_without_an_end_are_refused_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def members() -> Iterator[bytes]:
        yield b"{"
        for number in range(10**9):
            yield b'"%d": [],' % number

    reader = JsonReader(members(), "f", "header")
    keys = []
    with pytest.raises(InputError) as caught:
        for key in reader.members(most=1000):
            keys.append(key)
            reader.value()
    assert len(keys) == 1000
    assert [d.code for d in caught.value.diagnostics] == ["header-too-large"]
    assert "at most 1000 entries" in caught.value.diagnostics[0].notes[0]


def test_what_is_wrong_early_is_told_before_the_rest_is_read() -> None:
    document = Endless(b'{"a": 1, "b": ]', b" " * 9)
    with pytest.raises(InputError) as caught:
        strict_json(document, "f", "index")
    assert "expecting value" in caught.value.diagnostics[0].notes[1]
    assert document.taken <= 1
