"""What `ckptc.load` is to give back: the tree, and each array's shape, dtype and sharding.

`like` is any pytree whose leaves have a shape and a dtype: `jax.ShapeDtypeStruct`s, arrays, an abstract `nnx.State`, a
Linen `FrozenDict` with or without boxes for metadata. A leaf's path is its keys, one after the other, without the attribute
in which a `Variable` or a box keeps its value, and without the leading `params` of collections: so are the paths of a
plan's arrays compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, did_you_mean, fail
from ckptc.plan.model import Array, Plan

COLLECTION = "params"
SHOWN = 20  # leaves of one sort that are named

Path = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """One leaf of `like`."""

    path: Path
    value: Any  # that has a shape and a dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> str:
        return str(self.value.dtype)

    @property
    def sharding(self) -> Any:
        """A `jax.sharding.Sharding`; None where it says none."""
        return getattr(self.value, "sharding", None)


@dataclass(frozen=True)
class Like:
    """A tree to be filled."""

    leaves: tuple[Leaf, ...]
    fill: Callable[[Sequence[Any]], Any]  # the tree with these leaves, in their order

    @staticmethod
    def of(tree: Any) -> Like:
        """Raises InputError `tree-mismatch` for leaves that are no arrays."""
        import jax

        nnx = sys.modules.get("flax.nnx")
        if nnx is not None and isinstance(tree, nnx.Module):
            graph, params, rest = nnx.split(tree, nnx.Param, ...)
            inner = Like.of(params)
            return Like(inner.leaves, lambda leaves: nnx.merge(graph, inner.fill(leaves), rest))
        found, structure = jax.tree_util.tree_flatten_with_path(tree)
        leaves = tuple(Leaf(_path(keys), value) for keys, value in found)
        wrong = [x for x in leaves if not (hasattr(x.value, "shape") and hasattr(x.value, "dtype"))]
        if wrong:
            name, what = "/".join(wrong[0].path), type(wrong[0].value).__name__
            help = "give arrays or jax.ShapeDtypeStruct; of a state, its parameters alone"
            raise fail("tree-mismatch", f"the leaf `{name}` of `like` is no array but {what}", help=help)
        return Like(leaves, lambda values: jax.tree_util.tree_unflatten(structure, list(values)))


def _path(keys: Iterable[Any]) -> Path:
    from jax.tree_util import FlattenedIndexKey, GetAttrKey

    keys = list(keys)
    # Where a Variable of nnx, or a box of Linen, keeps its array.
    if keys and (isinstance(keys[-1], FlattenedIndexKey) or keys[-1] == GetAttrKey("value")):
        keys.pop()
    return tuple(str(next(getattr(k, name) for name in ("key", "name", "idx") if hasattr(k, name))) for k in keys)


def bare(path: Path) -> Path:
    """A path without leading collections."""
    at = next((n for n, part in enumerate(path) if part != COLLECTION), len(path))
    return path[at:]


def selected(plan: Plan, select: Sequence[str] | None) -> list[int]:
    """Positions of the outputs whose paths match one of the patterns (as `fnmatch` has them), with or without leading
    collections. Raises InputError `tree-mismatch` for a pattern that none matches."""
    if select is None:
        return list(range(len(plan.arrays)))
    names = [(a.name, "/".join(bare(a.path))) for a in plan.arrays]
    hits = {p: [n for n, both in enumerate(names) if any(fnmatchcase(x, p) for x in both)] for p in select}
    problems = [
        Diagnostic(
            "tree-mismatch",
            f"`select` has `{pattern}`, which no array's path matches",
            None,
            (f"such as: {names[0][1]}",) if names else (),
            did_you_mean(pattern, [short for _, short in names]),
        )
        for pattern, found in hits.items()
        if not found
    ]
    if problems:
        raise InputError(problems)
    return sorted({n for found in hits.values() for n in found})


def matched(like: Like, plan: Plan, chosen: Sequence[int], every: bool) -> dict[int, int]:
    """Which output each leaf is: its position, by the leaf's. `every`: whether each leaf must be one of them.

    Raises InputError with all that does not match: `tree-mismatch`, and `leaf-mismatch` for another shape.
    """
    arrays = {bare(plan.arrays[n].path): n for n in chosen}
    leaves: dict[Path, int] = {bare(leaf.path): n for n, leaf in enumerate(like.leaves)}
    problems = _named(
        "`like` has no place for `{}`, which the model has",
        [p for p in arrays if p not in leaves],
        "`select` loads some of the arrays; a tree of another layout may want `scan`",
        leaves,
    )
    if every:
        problems += _named(
            "`like` has `{}`, which the model does not have",
            [p for p in leaves if p not in arrays],
            "give the tree of the parameters alone, in the layout that the plan has",
            arrays,
        )
    pairs = {leaves[path]: n for path, n in arrays.items() if path in leaves}
    for at, number in sorted(pairs.items()):
        leaf, array = like.leaves[at], plan.arrays[number]
        if leaf.shape != array.shape:
            problems.append(unlike(array, f"the shape {list(leaf.shape)}", f"{list(array.shape)}"))
    if problems:
        raise InputError(problems)
    return pairs


def _named(message: str, paths: Sequence[Path], help: str, others: Mapping[Path, int]) -> list[Diagnostic]:
    out = []
    known = ["/".join(p) for p in others]
    for path in paths[:SHOWN]:
        name = "/".join(path)
        near = did_you_mean(name, known) if len(known) <= 2000 else None
        out.append(Diagnostic("tree-mismatch", message.format(name), None, (), near or help))
    if len(paths) > SHOWN:
        out.append(Diagnostic("tree-mismatch", message.format(f"{len(paths) - SHOWN} more"), None, (), help))
    return out


def unlike(array: Array, wanted: str, found: str, help: str | None = None) -> Diagnostic:
    """`leaf-mismatch`."""
    name = "/".join(bare(array.path))
    notes = (f"expected: {wanted}", f"found:    {found}")
    return Diagnostic("leaf-mismatch", f"`{name}` is another array than `like` has", None, notes, help)
