"""expand: rules, layouts and loops become typed target arrays.

Before: `mlp/wi_0/kernel: { from: mlp.gate_proj.weight, as: mlp embed -> embed mlp }` in a block of 26 scanned layers.
After: one target `params/params/decoder/layers/mlp/wi_0/kernel`, float types on every node:
leaf [layer=26, mlp, embed] of 26 names -> rearrange -> cast -> move `layer` to axis 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptc.compile.options import Options
from ckptc.compile.quantised import Quantised
from ckptc.compile.scope import Names, Scope
from ckptc.compile.sources import source
from ckptc.compile.vocabulary import build_op
from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.graph import Apply, Fill, Graph, Ignored, Node, Target, leaves
from ckptc.ops import Cast, Op, OpError, Rearrange, Stack, TensorType
from ckptc.ops.rearrange import SizedGroup, fused
from ckptc.ops.types import Axis, is_float
from ckptc.spec.document import Path_
from ckptc.spec.mapping import Family, OpSpec, Origin, Place, Rule

TARGETS_MOST = 10_000  # arrays of one checkpoint
ELEMENTS_MOST = 1 << 40  # of an array: the largest of published models has 2^37

StoredDtype = Callable[[str], str]  # the dtype of a source tensor by name


@dataclass
class _Expansion:
    mapping: Family
    scope: Scope
    options: Options
    stored: StoredDtype
    quantised: Quantised
    targets: list[Target] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)


@dataclass(frozen=True)
class _Here:
    """Where a rule is being expanded: its place in the target, and the grid of layers it is stacked over."""

    at: str
    grid: tuple[Axis, ...]
    points: list[Names]  # one for each point of the grid
    prefixes: list[str]  # of source names, one for each point
    axis: tuple[int, ...]
    block: str
    resized: tuple[str, ...] = ()  # dims to which the place's `let` gives another value


def expand(
    mapping: Family,
    options: Options,
    dims: Mapping[str, Any],
    names: Names,
    stored: StoredDtype,
    quantised: Quantised | None = None,
) -> Graph:
    """The graph of one model in one layout. `names` are the dims, `config`, and the source variant's values; `stored` says
    a tensor's dtype, and `quantised` which weights are stored as codes.

    Raises InputError with the problems of every rule.
    """
    work = _Expansion(mapping, Scope(mapping.document, dims), options, stored, quantised or Quantised())
    top = _Here("", (), [names], [""], (), "")
    for rule in mapping.rules:
        _guarded(work, lambda rule=rule: _expand_rule(work, rule, top))  # type: ignore[misc]
    for block in mapping.blocks:
        if not work.scope.holds(block.when, names, block.where):
            continue
        for place in block.places[options.layout]:
            found: list[_Here] = []
            _guarded(
                work,
                lambda block=block, place=place, found=found: found.extend(  # type: ignore[misc]
                    _places(work, block.name, block.source, place, names, block.where)
                ),
            )
            for here in found:
                for rule in block.rules:
                    _guarded(work, lambda rule=rule, here=here: _expand_rule(work, rule, here))  # type: ignore[misc]
    ignored = []
    for entry in mapping.ignore:
        where = (*entry.where, "source")
        patterns = tuple(
            work.scope.text(entry.source, looped, where)
            for looped in work.scope.loops(entry.loop, names, entry.where)
            if work.scope.holds(entry.when, looped, entry.where)
        )
        if patterns:
            shown = patterns[0] if len(patterns) == 1 else entry.source
            ignored.append(Ignored(patterns, shown, entry.reason, work.scope.span(where)))
    if work.problems:
        raise InputError(dict.fromkeys(work.problems))
    return Graph(tuple(sorted(work.targets, key=lambda t: t.path)), tuple(ignored))


def _guarded(work: _Expansion, step: Callable[[], None]) -> None:
    try:
        step()
    except InputError as error:
        work.problems += error.diagnostics


def _places(work: _Expansion, block: str, source: str, place: Place, names: Names, where: Path_) -> list[_Here]:
    scope, out = work.scope, []
    for looped in scope.loops(place.loop, names, place.where):
        if not scope.holds(place.when, looped, place.where):
            continue
        grid, points = scope.stack(place.stack, looped, place.where)
        if any(a.size == 0 for a in grid):
            continue
        if len(place.axis) != len(grid):
            raise scope.error(
                (*place.where, "axis"),
                f"{len(place.axis)} positions for {len(grid)} stacking axes",
                "invalid-value",
            )
        for name, expression in place.let.items():
            for point in points:
                point[name] = scope.value(expression, point, (*place.where, "let", name))
        resized = tuple(n for n in place.let if n in scope.dims)
        for name in resized:
            if len({p[name] for p in points}) > 1:
                where_let = (*place.where, "let", name)
                raise scope.error(where_let, f"dim `{name}` differs among the stacked layers", "invalid-value")
        prefixes = [scope.text(source, p, (*where, "source")) + "." for p in points]
        out.append(
            _Here(
                scope.text(place.at, looped, (*place.where, "at")) + "/",
                grid,
                points,
                prefixes,
                place.axis,
                block,
                resized,
            )
        )
    return out


def _expand_rule(work: _Expansion, rule: Rule, here: _Here) -> None:
    scope = work.scope
    # Loop variables of a rule mean separate arrays, so they may not differ along the grid: the first point stands for all.
    for looped in scope.loops(rule.loop, here.points[0], rule.where):
        added = {v: looped[v] for v in rule.loop}
        points = [{**p, **added} for p in here.points]
        wanted = {scope.holds(rule.when, p, rule.where) for p in points} if rule.when is not None else {True}
        if len(wanted) > 1:
            raise scope.error((*rule.where, "when"), "true for some of the stacked layers and false for others")
        if wanted == {False}:
            continue
        target = scope.text(rule.target, points[0], rule.where)
        if target.startswith("/") or "//" in target:
            raise scope.error(rule.where, f"`{target}` is not a path", "invalid-template")
        path = ("params", rule.collection, *(here.at + target).split("/"))
        chain = _Chain(work, rule, here, points)
        node = chain.build()
        if node.type.size > ELEMENTS_MOST or len(work.targets) >= TARGETS_MOST:
            what = (
                f"{node.type} is larger than an array can be"
                if node.type.size > ELEMENTS_MOST
                else "more arrays than a model has"
            )
            raise scope.error(rule.where, what, "too-large", help="check the sizes in config.json, and --set")
        axes = tuple(None if a == "_" else a for a in rule.axes.split()) if rule.axes else ()
        if axes and len(axes) != len(node.type.axes):
            what = f"{len(axes)} logical axes for an array of {len(node.type.axes)} axes: {node.type}"
            raise scope.error((*rule.where, "axes"), what, "op-mismatch")
        label = f"{here.block}: {rule.target}" if here.block else rule.target
        work.targets.append(
            Target(path, node, label, scope.document.key_span(rule.where), axes, rule.partial, tuple(chain.steps))
        )


class _Chain:
    """The nodes of one target array."""

    def __init__(self, work: _Expansion, rule: Rule, here: _Here, points: list[Names]) -> None:
        self.work, self.rule, self.here, self.points = work, rule, here, points
        self.names = points[0]
        self.scope = work.scope.resized({n: points[0][n] for n in here.resized})
        self.batch = len(here.grid)
        self.steps: list[str] = []

    def build(self) -> Node:
        rule = self.rule
        nodes = tuple(self._origin(o) for o in rule.origins)
        stored = nodes[0].type.dtype
        for spec in rule.ops:
            nodes = (self._apply(spec, nodes),)
        if len(nodes) > 1:
            raise self.scope.error(
                (*rule.where, "from"),
                "the parts are not joined",
                "unjoined-parts",
                help="let `ops` begin with `concat` or `stack`",
            )
        node = nodes[0]
        chosen = self.work.options.dtype
        keep = not is_float(node.type.dtype) or chosen.startswith(
            "float8"
        )  # nothing becomes float8: what is stored so stays so
        dtype = rule.dtype or ("source" if keep else chosen)
        dtype = stored if dtype == "source" else dtype
        if dtype != node.type.dtype:
            where = (*rule.where, "dtype") if rule.dtype else rule.where
            node = self._op(Cast(dtype), (node,), where)
            self.steps.append(f"cast {dtype}")
        return self._place_grid(node)

    def _origin(self, origin: Origin) -> Node:
        if origin.name is None:
            return self._fill(origin)
        pattern_text = origin.pattern
        if pattern_text is None:
            raise self.scope.error(origin.where, "`as` is missing: it names the source's axes", "missing-key")
        where = (*origin.where, "as")
        pattern = self.scope.pattern(pattern_text, where)
        inner, tensors = self._tensors(origin)
        known = {a.name: a.size for a in inner}
        left = self.scope.groups(pattern.left, known, pattern_text, where)
        clash = [n for n in pattern.names() if n in {a.name for a in self.here.grid}]
        if clash:
            raise self.scope.error(
                where,
                f"`{clash[0]}` is a stacking variable of the layout, not an axis of this tensor",
                "invalid-pattern",
            )
        node = self._source(tensors, (*self.here.grid, *inner), _bare(left, "float32"), (*origin.where, "from"))
        if pattern.right is None and inner:
            missing = " ".join(a.name for a in inner)
            raise self.scope.error(
                where,
                f"stacking axis `{missing}` has no place",
                "invalid-pattern",
                help=f"say where it goes: `{pattern_text} -> {missing} {pattern_text}`",
            )
        if pattern.right is not None:
            lead: tuple[SizedGroup, ...] = tuple((a,) for a in self.here.grid)
            stacked: tuple[SizedGroup, ...] = tuple((a,) for a in inner)
            right = self.scope.groups(pattern.right, known, pattern_text, where)
            try:
                op = Rearrange((*lead, *stacked, *left), (*lead, *right))
            except OpError as error:
                raise self.scope.error(where, str(error), "invalid-pattern") from None
            node = self._op(op, (node,), where)
            self.steps.append(" ".join(pattern_text.split()))
        for spec in origin.ops:
            node = self._apply(spec, (node,))
        return node

    def _source(self, names: tuple[str, ...], grid: tuple[Axis, ...], each: TensorType, where: Path_) -> Node:
        quantised, stored = self.work.quantised, self.work.stored
        try:
            node = source(names, grid, each, quantised, stored, self.scope.span(where))
        except OpError as error:
            raise self.scope.error(where, str(error), "op-mismatch", notes=(f"expected: {each}",)) from None
        self.steps += dict.fromkeys(leaf.decoded.code.describe() for leaf in leaves(node) if leaf.decoded)
        return node

    def _tensors(self, origin: Origin) -> tuple[tuple[Axis, ...], tuple[str, ...]]:
        """The rule's own stacking axes, and the names over the whole grid, row-major: layers first, then the rule's axes."""
        assert origin.name is not None
        where = (*origin.where, "from")
        inner, names = (), []  # type: tuple[Axis, ...], list[str]
        for point, prefix in zip(self.points, self.here.prefixes, strict=True):
            inner, inner_points = self.scope.stack(self.rule.stack, point, self.rule.where)
            names += [prefix + self.scope.text(origin.name, p, where) for p in inner_points]
        if any(a.size == 0 for a in inner):
            raise self.scope.error((*self.rule.where, "stack"), "stacks no tensors at all", "invalid-value")
        return inner, tuple(names)

    def _fill(self, origin: Origin) -> Node:
        if self.rule.fill is None:
            raise self.scope.error(
                origin.where,
                "`from` is missing: it names the source tensor",
                "missing-key",
                help="or `fill` with a value",
            )
        text, where = origin.pattern or "", (*origin.where, "as")
        groups = self.scope.groups(self.scope.pattern(text, where).left, {}, text, where) if text else ()
        type_ = _bare(groups, "float32")
        return Fill(self.rule.fill, type_.with_axes((*self.here.grid, *type_.axes)), self.scope.span(origin.where))

    def _apply(self, spec: OpSpec, nodes: tuple[Node, ...]) -> Node:
        try:
            op = build_op(spec, nodes[0].type, self.batch, self.scope, self.names)
        except OpError as error:
            raise self._op_error(error, nodes, spec.where) from None
        step = " ".join(spec.argument.split()) if spec.name == "rearrange" else op.describe()
        self.steps.append(self.scope.with_reason(step, spec.where))
        node = self._op(op, nodes, spec.where)
        if isinstance(op, Stack) and self.batch:
            # A new axis leads; the layers lead it.
            new, *old = _single(node.type.axes)
            node = self._op(Rearrange((new, *old), (*old[: self.batch], new, *old[self.batch :])), (node,), spec.where)
        return node

    def _op(self, op: Op, nodes: tuple[Node, ...], where: Path_) -> Node:
        try:
            if op.arity is not None and len(nodes) != op.arity:
                raise OpError(
                    f"`{op.name}` takes one input, `from` has {len(nodes)} parts: join them with `concat` or `stack` first"
                )
            return Apply(op, nodes, op.infer([n.type for n in nodes]), self.scope.span(where))
        except OpError as error:
            raise self._op_error(error, nodes, where) from None

    def _op_error(self, error: OpError, nodes: tuple[Node, ...], where: Path_) -> InputError:
        return self.scope.error(where, str(error), "op-mismatch", notes=tuple(f"input: {n.type}" for n in nodes))

    def _place_grid(self, node: Node) -> Node:
        """Moves the layers' axes, which lead until here, to where the layout wants them in the finished array."""
        if not self.batch:
            return node
        axes = list(node.type.axes)
        rest, grid = axes[self.batch :], axes[: self.batch]
        first = self.rule.axis
        positions = self.here.axis if first is None else tuple(first + n for n in range(self.batch))
        for position, axis in sorted(zip(positions, grid, strict=True), key=lambda p: p[0]):
            if position > len(rest):
                raise self.scope.error(
                    self.rule.where,
                    f"axis {position} for the layers is past the end of {node.type}",
                    "op-mismatch",
                )
            rest.insert(position, axis)
        self.steps.append(
            f"stack {' x '.join(str(a.size) for a in grid)} layers at axis {', '.join(map(str, positions))}"
        )
        if axes == rest:
            return node
        return self._op(Rearrange(_single(axes), _single(rest)), (node,), self.rule.where)


def _bare(groups: Sequence[SizedGroup], dtype: str) -> TensorType:
    """The type of a source tensor: one axis for each group, fused where a group has several names."""
    return TensorType(tuple(fused(g) for g in groups), dtype)


def _single(axes: Sequence[Axis]) -> tuple[SizedGroup, ...]:
    """Each axis alone, as a pattern's side; an anonymous axis of size 1 is written `1`."""
    return tuple((a,) if a.name else () for a in axes)
