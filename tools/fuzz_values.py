"""What the mutators share: an input, values that no one expects, and ways to put them into JSON."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Case:
    """Files of a directory, a command line that runs there (`{work}` is the directory), and what is wrong with them."""

    argv: list[str]
    files: dict[str, bytes | Path]  # by name; a Path is linked to
    lies: list[str] = field(default_factory=list)
    holes: dict[str, int] = field(default_factory=dict)  # files that are longer than their bytes
    links: dict[str, str] = field(default_factory=dict)

    def lay_out(self, work: Path) -> None:
        for name, content in self.files.items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                path.symlink_to(content)
            else:
                path.write_bytes(content)
                if name in self.holes:
                    with path.open("r+b") as file:
                        file.truncate(self.holes[name])
        for name, target in self.links.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).unlink(missing_ok=True)
            (work / name).symlink_to(target)


CLIMBING = (
    "../outside/precious.txt",
    "../../outside/new.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../b",
    "a//b",
    "/",
    "./x",
    "nul\0byte",
    "~/x",
    "..\\x",
    "file:///etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
)
STRINGS = (
    *CLIMBING,
    "x" * 5000,
    "\ud800",
    "\u202e\x1b[31m",
    "é" * 300,
    "NaN",
    "-1",
    "params",
    "float128",
    "bfloat16",
    "float8_e4m3fn",
    "int4",
    "object",
    "{{ 9**9 }}",
    "%s%n",
    "a\nb",
)
NUMBERS = (
    *range(-2, 4),
    7,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**18,
    10**30,
    10**4299,
    0.5,
    -0.0,
    1e308,
    1e-320,
)
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "",
    "x",
    float("nan"),
    float("inf"),
    -float("inf"),
)


def hostile(rng: random.Random) -> Any:
    """A value of any type."""
    return rng.choice((rng.choice(NUMBERS), rng.choice(STRINGS), rng.choice(ODD)))


def changed(rng: random.Random, value: Any) -> Any:
    """Another value in its place, often one of the same type."""
    if rng.random() < 0.25:
        return hostile(rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = (value + 1, value - 1, -value, value * 2, value // 2, value + rng.randrange(1, 10_000), value * 1000)
        return rng.choice((*near, rng.choice(NUMBERS)))
    if isinstance(value, float):
        return rng.choice((-value, value * 2, value + 1, float("nan"), float("inf"), 1e300))
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice((value[:cut], value + value, value[:cut] + "/" + value[cut:], rng.choice(STRINGS)))
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        kinds = (value[:at], value[:at] + value[at + 1 :], value + value[at : at + 1], value[::-1], [value], value * 50)
        return rng.choice(kinds)
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        less = {k: v for k, v in value.items() if k != key}
        return rng.choice((less, {**value, "surprise": 1}, {**less, key + "_": value[key]}, list(value.items())))
    return hostile(rng)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found += places(inner, (*path, key))
    return found


def get(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    get(value, path[:-1])[path[-1]] = new


def shake(rng: random.Random, body: Any) -> str:
    """Changes one value anywhere in a JSON value; what was done. Deep places are as likely as shallow ones."""
    path: tuple[Any, ...] = ()
    here = body
    while isinstance(here, dict | list) and here:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        path, here = (*path, key), here[key]
        if rng.random() < 0.12:
            break
    if not path:
        return "nothing to change"
    if rng.random() < 0.08:  # another value of the same tree
        new = get(body, rng.choice(places(body)))
        new = json.loads(json.dumps(new))
    else:
        new = changed(rng, here)
    put(body, path, new)
    return f"{'/'.join(map(str, path))} = {repr(new)[:60]}"


def dumps(value: Any) -> bytes:
    """JSON as Python says it, NaN and half surrogates included."""
    import sys

    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(4300)


def torn(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes with a piece missing, doubled, or changed."""
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 2, 8, 100, 5000)))
    how = rng.randrange(5)
    if how == 0:
        return data[:at], f"cut at byte {at}"
    if how == 1:
        return data[:at] + data[to:], f"bytes {at} to {to} left out"
    if how == 2:
        return data[:to] + data[at:], f"bytes {at} to {to} twice"
    if how == 3:
        noise = rng.randbytes(to - at)
        return data[:at] + noise + data[to:], f"noise in bytes {at} to {to}"
    word = rng.choice(
        (b"\0", b"\xff\xfe", b"NaN", b"[" * 50_000, b'{"a":' * 20_000, b"9" * 6000, b"1e999", b"\\ud800", b'"')
    )
    return data[:at] + word + data[at:], f"{word[:8]!r} at byte {at}"
