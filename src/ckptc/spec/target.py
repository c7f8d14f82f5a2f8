"""A target tree as typed records: logical axes of its arrays, and the rules that map them to axes of a device mesh.

These are facts of the target and not of model families: `mappings/targets/<name>.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import Any

from ckptc.spec.document import load
from ckptc.spec.resources import target_file
from ckptc.spec.schema import check

Axes = tuple[str | None, ...]  # a name for each axis; None for one that has none
Rules = tuple[tuple[str, tuple[str, ...]], ...]  # logical axis, the mesh axes that shard it together; tried in order

ANY_PARTS = "**"


@dataclass(frozen=True)
class Pattern:
    """Parts of a path, as `fnmatch` takes them; `**` stands for any number of parts."""

    parts: tuple[str, ...]

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The higher, the more specific: without `**`, of more parts, of more letters."""
        plain = [p for p in self.parts if p != ANY_PARTS]
        return ANY_PARTS not in self.parts, len(plain), sum(len(p.replace("*", "")) for p in plain)

    def begins(self, path: tuple[str, ...]) -> bool:
        """Whether some beginning of the path matches; without `**`."""
        return len(path) >= len(self.parts) and all(map(_fits, self.parts, path))

    def ends(self, path: tuple[str, ...]) -> bool:
        """Whether some end of the path matches."""
        if ANY_PARTS in self.parts:
            return _matches((ANY_PARTS, *self.parts), path)
        return len(path) >= len(self.parts) and all(map(_fits, reversed(self.parts), reversed(path)))


def _fits(pattern: str, part: str) -> bool:
    return pattern == part or ("*" in pattern and fnmatchcase(part, pattern))


def _matches(parts: tuple[str, ...], path: tuple[str, ...]) -> bool:
    if not parts or not path:
        return all(p == ANY_PARTS for p in parts) and not path
    if parts[0] == ANY_PARTS:
        return _matches(parts[1:], path) or _matches(parts, path[1:])
    return _fits(parts[0], path[0]) and _matches(parts[1:], path[1:])


@dataclass(frozen=True)
class Stack:
    """Axes of stacked layers, which stand together in the finished array, the first of them at axis `at`."""

    under: Pattern
    axes: Axes
    at: int


@dataclass(frozen=True)
class Pipelined:
    """A list of layers, and where its layers lie under pipeline parallelism."""

    at: tuple[str, ...]  # without it
    inside: tuple[str, ...]  # those that are pipelined
    outside: tuple[str, ...]  # those that are not
    outside_first: bool  # whether these come before the others


@dataclass(frozen=True)
class TargetTree:
    """What is known of a target, most specific first where patterns compete."""

    name: str
    arrays: tuple[tuple[Pattern, tuple[Axes, ...]], ...]  # forms of different rank, without axes of stacks
    stacks: tuple[Stack, ...]
    places: tuple[tuple[str, ...], ...]  # beginnings of paths where a saved state may hold an array; the first counts
    besides: tuple[tuple[str, str], ...]  # first parts of the paths of what is no part of the model, and why
    pipelines: tuple[Pipelined, ...]
    mesh_axes: tuple[str, ...]
    rules: Rules

    @cached_property
    def names(self) -> frozenset[str]:
        """Every logical axis that an array has."""
        forms = [form for _, forms in self.arrays for form in forms] + [stack.axes for stack in self.stacks]
        return frozenset(name for form in forms for name in form if name)

    def axes(self, path: tuple[str, ...], rank: int) -> Axes:
        """The logical axes of the array at `path` (variable collection first) with `rank` axes; () if not known.

        `params/decoder/layers/mlp/wi_0/kernel` of rank 3 -> embed, layers, mlp.
        """
        stack = self.stack(path)
        layers = stack.axes if stack else ()
        own = self.own_axes(path, rank - len(layers))
        if own is None:
            return ()
        at = min(stack.at, len(own)) if stack else 0
        return (*own[:at], *layers, *own[at:])

    def stack(self, path: tuple[str, ...]) -> Stack | None:
        """What stacks the layers at this place, if they are stacked."""
        return next((s for s in self.stacks if s.under.begins(path)), None)

    def own_axes(self, path: tuple[str, ...], rank: int) -> Axes | None:
        """The logical axes of one layer's array, of `rank` axes; None if not known."""
        forms = next((forms for pattern, forms in self.arrays if pattern.ends(path)), ())
        return next((form for form in forms if len(form) == rank), None)


@cache
def target_tree(name: str) -> TargetTree:
    """The shipped facts of a target. Raises InputError where the file is not as its schema says."""
    document = load(target_file(name), f"mappings/targets/{name}.yaml")
    check(document, "target")
    data = document.data
    arrays = [
        (_pattern(text), tuple(map(_axes, forms if isinstance(forms, list) else [forms])))
        for text, forms in data["arrays"].items()
    ]
    stacks = [Stack(_pattern(text), _axes(s["axes"]), s["at"]) for text, s in data["stacks"].items()]
    return TargetTree(
        data["target"],
        tuple(sorted(arrays, key=lambda a: a[0].rank, reverse=True)),
        tuple(sorted(stacks, key=lambda s: s.under.rank, reverse=True)),
        tuple(map(_path, data["places"])),
        tuple(data["besides"].items()),
        tuple(
            Pipelined(_path(at), _path(p["inside"]), _path(p["outside"]), p["outside_first"])
            for at, p in data["pipelines"].items()
        ),
        tuple(data["mesh_axes"]),
        typed_rules(data["logical_axis_rules"]),
    )


def typed_rules(data: list[list[Any]]) -> Rules:
    """Pairs as YAML has them: `[exp, expert]`, `[vocab, [tensor, autoregressive]]`, `[kv, null]`."""
    return tuple((logical, (mesh,) if isinstance(mesh, str) else tuple(mesh or ())) for logical, mesh in data)


def _path(text: str) -> tuple[str, ...]:
    return tuple(text.split("/"))


def _pattern(text: str) -> Pattern:
    return Pattern(tuple(text.split("/")))


def _axes(text: str) -> Axes:
    return tuple(None if name == "_" else name for name in text.split())
