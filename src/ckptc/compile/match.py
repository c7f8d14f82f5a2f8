"""match: the arrays of a checkpoint, under whatever names training gave them, are those that the rules make.

A rule's array is `params/params/decoder/layers/mlp/wo/kernel`. Training may have saved it there; without the first
`params`; as an NNX tree, `model/decoder/layers/mlp/wo/kernel/value`; and a list of layers by positions, `layers/3/…`
for `layers_3/…`. What stands before the path within its collection is called the root here; all arrays of a collection
have one root. Where two roots that the target knows have the same array, that of the first is taken, and the other is
held against it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptc.diagnostics import Diagnostic, nearest
from ckptc.ir.graph import Graph, Target
from ckptc.ir.saved import SavedArray

LEAF = "value"  # what NNX calls the array of a variable
RANDOM = re.compile(
    r"rngs?|dropout.*|.*_rng|count|key|step", re.IGNORECASE
)  # parts of the paths of what is no parameter
SHOWN = 8  # names that one error lists

Path = tuple[str, ...]


@dataclass(frozen=True)
class Matched:
    """Which saved array each target of the graph is, and which are none."""

    arrays: dict[Path, SavedArray]  # by the target's path
    missing: list[Target]
    others: list[SavedArray]  # that no rule makes
    passed: list[SavedArray]  # that are no parameters: counters, states of random numbers
    twins: list[tuple[Target, SavedArray]]  # arrays of other roots that hold a target again

    def pairs(self, graph: Graph) -> list[tuple[Target, SavedArray]]:
        """Every target with its array, and after it, under its array's name, each twin."""
        again: defaultdict[Path, list[tuple[Target, SavedArray]]] = defaultdict(list)
        for target, array in self.twins:
            again[target.path].append((replace(target, path=array.path, rule=array.name), array))
        found = ((t, self.arrays[t.path]) for t in graph.targets if t.path in self.arrays)
        return [pair for target, array in found for pair in ((target, array), *again[target.path])]


def match(graph: Graph, saved: Sequence[SavedArray], places: Sequence[Path] = ()) -> Matched:
    """The targets' arrays, by names alone. `places` are roots, of which the first that has an array counts."""
    wanted: defaultdict[Path, list[Target]] = defaultdict(list)
    for target in graph.targets:
        wanted[target.path[2:]].append(target)
    found: defaultdict[Path, dict[Path, SavedArray]] = defaultdict(dict)  # target's path -> root -> array
    roots: Counter[Path] = Counter()
    rest = []
    for array in saved:
        path = normal(array.path)
        at = next((k for k in range(len(path)) if path[k:] in wanted), None)
        if at is None:
            rest.append(array)
            continue
        root, candidates = path[:at], wanted[path[at:]]
        own = [t for t in candidates if root[-1:] == (t.path[1],)] or candidates[:1]
        found[own[0].path][root] = array
        roots[root] += 1
    arrays, missing, twins = dict[Path, SavedArray](), list[Target](), list[tuple[Target, SavedArray]]()
    ranks = {place: -rank for rank, place in enumerate(places)}
    for target in graph.targets:
        by_root = found.get(target.path)
        if not by_root:
            missing.append(target)
            continue
        best = max(
            by_root,
            key=lambda root: (
                root in ranks,
                ranks.get(root, 0),
                root[:1] in (("params",), ("model",)),
                roots[root],
                root,
            ),
        )
        arrays[target.path] = by_root.pop(best)
        twins += ((target, array) for root, array in by_root.items() if root in ranks)
        rest += (array for root, array in by_root.items() if root not in ranks)
    passed = [a for a in rest if any(RANDOM.fullmatch(part) for part in a.path)]
    return Matched(arrays, missing, [a for a in rest if a not in passed], passed, twins)


def normal(path: Path) -> Path:
    """A saved path as a rule would write it: without NNX's leaf, positions in lists as part of the name before them."""
    parts: list[str] = []
    for part in path[:-1] if path[-1] == LEAF and len(path) > 1 else path:
        if part.isdigit() and parts:
            parts[-1] += f"_{part}"
        else:
            parts.append(part)
    return tuple(parts)


def problems(graph: Graph, matched: Matched, multimodal: bool | None) -> list[Diagnostic]:
    """`missing-array`, `array-mismatch`, `unknown-array`: one for each rule and kind of problem.

    `multimodal`: whether the towers are exported too; None where the family has none.
    """
    out = _missing(matched) + _mismatches(graph, matched)
    if matched.others:
        others = matched.others
        notes = [f"`{a.name}` {a.dtype}{list(a.shape)}" for a in others[:SHOWN]]
        notes += [f"and {len(others) - SHOWN} more"] if len(others) > SHOWN else []
        count = "an array" if len(others) == 1 else f"{len(others)} arrays"
        help = "is --model the model that was trained?"
        if multimodal is False and any("vision" in a.name or "audio" in a.name for a in others):
            help = "these are towers: use --multimodal"
        out.append(Diagnostic("unknown-array", f"no rule makes {count} of the checkpoint", None, tuple(notes), help))
    return out


def _missing(matched: Matched) -> list[Diagnostic]:
    by_rule: defaultdict[str, list[Target]] = defaultdict(list)
    for target in matched.missing:
        by_rule[target.rule].append(target)
    names = ["/".join(normal(a.path)) for a in matched.others]
    out = []
    for rule, targets in by_rule.items():
        name = "/".join(targets[0].path)
        best = nearest(name, names)
        more = f" (nor {len(targets) - 1} others)" if len(targets) > 1 else ""
        help = (
            f"the nearest name is `{best}`" if best else "is this a checkpoint of another model, or of another layout?"
        )
        out.append(
            Diagnostic(
                "missing-array",
                f"the checkpoint has no array `{name}`{more}",
                targets[0].span,
                (f"rule: {rule}",),
                help,
            )
        )
    return out


def _mismatches(graph: Graph, matched: Matched) -> list[Diagnostic]:
    by_rule: defaultdict[str, list[tuple[Target, SavedArray]]] = defaultdict(list)
    for target, array in matched.pairs(graph):
        if array.shape != target.type.shape:
            by_rule[target.rule].append((target, array))
    out = []
    for rule, wrong in by_rule.items():
        target, array = wrong[0]
        more = f" ({len(wrong)} arrays)" if len(wrong) > 1 else ""
        axes = ", ".join(str(a) for a in target.type.axes)
        out.append(
            Diagnostic(
                "array-mismatch",
                f"`{array.name}` has another shape than the rule makes{more}",
                target.span,
                (f"expected: [{axes}]", f"found:    {list(array.shape)}", f"rule: {rule}"),
                "check --model, and the dims: `--config-from DIR` reads the config the model has, `--set` gives one",
            )
        )
    return out
