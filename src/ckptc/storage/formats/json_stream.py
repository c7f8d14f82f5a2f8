"""JSON documents of which nothing is known: read a block and a value at a time, with nothing left to interpretation.

A header of a hundred megabytes of `[]` is a small file and gigabytes of Python lists. So a document is walked: the keys
of an object come one by one, each value is decoded by `json` alone, out of a window of the text that holds little more
than that value. What is too long for a value, or too many for a checkpoint, is refused when it is met, and what comes
after it is not read.

Stricter than `json`: no NaN and no Infinity (RFC 8259 has neither), no number that a float cannot hold, no key twice.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from ckptc.diagnostics import InputError, Span, fail
from ckptc.storage.source.files import BLOCK, listed, refuse, shown

MAX_VALUE = 4_000_000  # characters of one value; an entry of a header has some 100
MAX_MEMBERS = 400_000  # of one object; the largest published checkpoints have some 90,000 tensors

Groups = list[str]

_SHOWN_BEFORE = 40  # characters kept before the place that is read, to show them
_TAIL = 16  # characters: an error this near to the end of a window may come of the cut (`tru`, `\ud83`)
_SPACE = re.compile(r"[ \t\n\r]*")
_KEY = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:')  # of those without escapes: nearly all
_NEXT = re.compile(r"[ \t\n\r]*([,}])")
_CONSTANT = re.compile(r'"(?:[^"\\]++|\\.)*+"|(NaN|-?Infinity)')  # strings first: one may say NaN
_LFS_MAGIC = b"version https://git-lfs"


class _Infinite(ValueError):
    """A number that a float cannot hold."""


def refuse_lfs_pointer(name: str, data: bytes) -> None:
    """Raise `lfs-pointer` when `data` is what git leaves in place of a large file it did not download.

    Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, lines `version`, `oid`, `size`.
    """
    if not data.startswith(_LFS_MAGIC):
        return
    stated = re.search(rb"^size (\d{1,20})$", data[:1024], re.MULTILINE)
    raise refuse(
        "lfs-pointer",
        f"{shown(name)} is a Git LFS pointer, not the file itself",
        f"{stated[1].decode()} bytes" if stated else "the file's content",
        "the short text that stands for it until it is downloaded",
        "fetch the content with `git lfs pull`, or download the checkpoint with `hf download`",
    )


class JsonReader:
    """One document, from blocks of its bytes.

    `kind` ("header", "index", "config") begins the codes of what is raised: `<kind>-json` for anything RFC 8259 does
    not allow, for bytes that are not UTF-8, and for what does not fit (nesting, numbers); `<kind>-duplicate-key`;
    `<kind>-not-object`. More than `MAX_VALUE` and `MAX_MEMBERS` are `header-too-large`, or `<kind>-json`. With
    `span_file` diagnostics carry the place in that text file.
    """

    def __init__(self, blocks: Iterable[bytes], name: str, kind: str, span_file: str | None = None) -> None:
        self._blocks = iter(blocks)
        self._name, self._kind, self._span_file = name, kind, span_file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0  # decoded, or held back by the decoder
        self._text, self._at = "", 0  # the window, and the place in it that is read
        self._before = 0  # characters before the window
        self._lines, self._column = 0, 0  # line breaks before the window, and characters since the last of them
        self._ended = False
        self._repeated: dict[str, None] = {}
        self._scan = json.JSONDecoder(
            object_pairs_hook=self._unique, parse_constant=self._constant, parse_float=self._finite
        ).raw_decode

    # -- what callers use --

    def opens(self) -> bool:
        """Whether the next value is an object."""
        return self._next() == "{"

    def members(self, most: int = MAX_MEMBERS) -> Iterator[str]:
        """The keys of the object that is next. The caller reads each one's value before it asks for the next key."""
        return (key for key, _ in self.entries(None, most))

    def entries(self, usual: re.Pattern[str] | None, most: int = MAX_MEMBERS) -> Iterator[tuple[str, Groups | None]]:
        """The members of the object that is next: of each the key, and the groups of `usual` after the first.

        `usual` describes a member in its most common spelling, with the comma behind it and the key as its first group.
        A member that does not fit has None, and the caller reads its value before it asks for the next.
        """
        if self._next() != "{":
            raise self._invalid("expecting value", self._at)
        self._at += 1
        seen: set[str] = set()
        if self._next() == "}":
            self._at += 1
            return
        while True:
            if usual is not None:  # one after the other, at the speed of `re`
                for match in iter(usual.scanner(self._text, self._at).match, None):  # type: ignore[attr-defined]
                    key, *rest = match.groups()
                    self._count(key, seen, most)
                    self._at = match.end()
                    yield key, rest
            match = _KEY.match(self._text, self._at)
            if match is not None:
                key, self._at = match[1], match.end()
            else:
                key = self._key()
            self._count(key, seen, most)
            yield key, None
            match = _NEXT.match(self._text, self._at)
            if match is not None:
                character, self._at = match[1], match.end()
            else:
                character = self._next()
                if character != "," and character != "}":
                    raise self._invalid("expecting ',' delimiter", self._at)
                self._at += 1
            if character == "}":
                return

    def value(self) -> Any:
        """The value that is next, whole: at most `MAX_VALUE` characters of text."""
        if not self._next():
            raise self._invalid("expecting value", self._at)
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _TAIL or error.msg.startswith("Unterminated string")
                if cut and self._widen():
                    continue
                raise self._invalid(error.msg[:1].lower() + error.msg[1:], error.pos) from None
            except RecursionError:
                raise self._invalid("lists or objects nested too deeply to be read") from None
            except ValueError as error:  # Python bounds the digits of an integer
                if self._widen():  # which could be a float's first digits
                    continue
                reason = str(error) if isinstance(error, _Infinite) else "an integer of thousands of digits"
                raise self._invalid(reason) from None
            if end >= len(self._text) - 2 and type(value) in (int, float) and self._widen():
                continue  # its digits, or what begins as `.` or `e+`, may go on
            self._at = end
            return value

    def end(self) -> None:
        """Raise unless the document ends here, and gives no key twice."""
        if self._next():
            raise self._invalid("extra data", self._at)
        if self._repeated:
            raise refuse(
                f"{self._kind}-duplicate-key",
                f"{shown(self._name)} gives the same key twice in one JSON object",
                "each key once",
                f"{listed(list(self._repeated))} more than once",
                "keep one of them; which one is meant cannot be known from the file",
            )

    def object(self) -> None:
        """Raise unless the document is an object, which is then read by `members`."""
        if self._next() == "\ufeff":
            raise self._invalid("unexpected UTF-8 BOM (decode using utf-8-sig)", self._at)
        if not self.opens():
            value = self.value()
            self.end()
            raise refuse(
                f"{self._kind}-not-object",
                f"{shown(self._name)} holds JSON that is not an object",
                "an object, {…}",
                reprlib.repr(value),
                "replace it with the file the checkpoint was published with",
            )

    # -- the window --

    def _next(self) -> str:
        """The next character that is no white space, "" at the end; it is at `_at`."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _widen(self) -> bool:
        """Reads on behind a value that the window may have cut, as much again. False where there is no more."""
        if self._ended:
            return False
        held = len(self._text) - self._at
        if held > MAX_VALUE:
            raise self.too_large(f"at most {MAX_VALUE} characters in one value", "a longer one")
        grown = self._more()
        while grown and len(self._text) - self._at < min(2 * held, MAX_VALUE) and self._more():
            pass
        return grown

    def _more(self) -> bool:
        """Adds a block to the window, and drops what has been read. False at the end, where nothing changes."""
        added = ""
        while not added and not self._ended:
            block = next(self._blocks, None)
            self._ended = block is None
            added = self._decoded(block or b"")
        if not added:
            return False
        drop = max(0, self._at - _SHOWN_BEFORE)
        breaks = self._text.count("\n", 0, drop)
        self._column = drop - self._text.rfind("\n", 0, drop) - 1 if breaks else self._column + drop
        self._lines, self._before = self._lines + breaks, self._before + drop
        self._text, self._at = self._text[drop:] + added, self._at - drop
        return True

    def _decoded(self, block: bytes) -> str:
        held = len(self._decoder.getstate()[0])  # bytes of a character that the last block cut
        try:
            text = self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            at = self._bytes - held + error.start
            raise self._invalid(f"byte 0x{error.object[error.start]:02x} at offset {at}, which is not UTF-8") from None
        self._bytes += len(block)
        return text

    # -- what a value may not be --

    def _count(self, key: str, seen: set[str], most: int) -> None:
        if key in seen:
            self._repeated[key] = None
        elif len(seen) == most:
            raise self.too_large(f"at most {most} entries", "more than those in one object")
        seen.add(key)

    def _key(self) -> str:
        if self._next() != '"':
            raise self._invalid("expecting property name enclosed in double quotes", self._at)
        key: str = self.value()
        if self._next() != ":":
            raise self._invalid("expecting ':' delimiter", self._at)
        self._at += 1
        return key

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._repeated[key] = None
                seen.add(key)
        return made

    def _constant(self, word: str) -> NoReturn:
        at = next((m.start(1) for m in _CONSTANT.finditer(self._text, self._at) if m[1]), None)
        raise self._invalid(f"{word}, which is not a JSON number", at)

    def _finite(self, digits: str) -> float:
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            raise _Infinite(f"the number {digits[:40]}, too large for a float")
        return number

    def _invalid(self, reason: str, at: int | None = None) -> InputError:
        """`at`: the place in the window."""
        span, notes = None, ["expected: JSON as RFC 8259 defines it", f"found: {reason}"]
        if at is not None and self._span_file is not None:
            breaks, last = self._text.count("\n", 0, at), self._text.rfind("\n", 0, at)
            column = at - last if breaks else self._column + at + 1
            span = Span(self._span_file, self._lines + breaks + 1, column)
        elif at is not None:
            notes[1] += f" at character {self._before + at}: {self._text[max(0, at - 20) : at + 20]!r}"
        what = "the header of " if self._kind == "header" else ""
        help = "correct the file, or download it again from where the checkpoint was published"
        message = f"{what}{shown(self._name)} is not valid JSON"
        return fail(f"{self._kind}-json", message, span=span, notes=notes, help=help)

    def too_large(self, expected: str, found: str) -> InputError:
        """An error to raise: what was read is more than a checkpoint has."""
        header = self._kind == "header"
        code = "header-too-large" if header else f"{self._kind}-json"
        message = f"{'the header of ' if header else ''}{shown(self._name)} holds more than any checkpoint's does"
        return refuse(code, message, expected, found, "check what the file is, and where it comes from")


def blocks_of(data: bytes) -> Iterator[bytes]:
    """What is in memory already, as a reader takes it."""
    return (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))


def strict_json(blocks: Iterable[bytes], name: str, kind: str, span_file: str | None = None) -> dict[str, Any]:
    """The JSON object in `blocks`. Raises as `JsonReader`."""
    reader = JsonReader(blocks, name, kind, span_file)
    reader.object()
    out = {key: reader.value() for key in reader.members()}
    reader.end()
    return out
