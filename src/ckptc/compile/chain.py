"""chain: the nodes of one target array, from the tensors of a rule to where its layers are stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckptc.compile.options import Options
from ckptc.compile.quantised import Quantised
from ckptc.compile.scope import Names, Scope
from ckptc.compile.sources import source
from ckptc.compile.stacking import SCAN_AXIS, scan_positions
from ckptc.compile.vocabulary import build_op
from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.graph import Apply, Fill, Node, Target, leaves
from ckptc.ops import Cast, Op, OpError, Rearrange, Stack, TensorType
from ckptc.ops.rearrange import SizedGroup, fused
from ckptc.ops.types import Axis, is_float
from ckptc.spec.document import Path_
from ckptc.spec.mapping import Family, OpSpec, Origin, Rule
from ckptc.spec.target import target_tree

PIPELINE_AXES = ("circular_repeats", "layers")  # MaxText's names of the axes that stack a pipeline's layers
StoredDtype = Callable[[str], str]  # the dtype of a source tensor by name


@dataclass
class Expansion:
    mapping: Family
    scope: Scope
    options: Options
    stored: StoredDtype
    quantised: Quantised
    targets: list[Target] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)


@dataclass(frozen=True)
class Here:
    """Where a rule is being expanded: its place in the target, and the grid of layers it is stacked over."""

    at: str
    grid: tuple[Axis, ...]
    points: list[Names]  # one for each point of the grid
    prefixes: list[str]  # of source names, one for each point
    axis: tuple[int, ...]
    block: str
    resized: tuple[str, ...] = ()  # dims to which the place's `let` gives another value
    lead: int = 0  # how many axes of the grid stay in front, where a pipeline has them


class Chain:
    """The nodes of one target array."""

    def __init__(self, work: Expansion, rule: Rule, here: Here, points: list[Names]) -> None:
        self.work, self.rule, self.here, self.points = work, rule, here, points
        self.names = points[0]
        self.scope = work.scope.resized({n: points[0][n] for n in here.resized})
        self.batch = len(here.grid)
        self.steps: list[str] = []
        self.positions: tuple[int, ...] = ()  # of the layers' axes in the finished array

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
        front, grid, rest = axes[: self.here.lead], axes[self.here.lead : self.batch], axes[self.batch :]
        first, chosen = self.rule.axis, self.work.options.scan_axis
        if first is not None or (chosen == SCAN_AXIS and not front):
            positions = self.here.axis if first is None else tuple(first + n for n in range(len(grid)))
            for position, axis in sorted(zip(positions, grid, strict=True), key=lambda p: p[0]):
                if position > len(rest):
                    raise self.scope.error(
                        self.rule.where,
                        f"axis {position} for the layers is past the end of {node.type}",
                        "op-mismatch",
                    )
                rest.insert(position, axis)
        else:
            for position, axis in zip(scan_positions(chosen, len(rest), len(grid)), reversed(grid), strict=True):
                rest.insert(position, axis)
        rest = [*front, *rest]
        self.positions = tuple(rest.index(a) for a in axes[: self.batch])
        self.steps.append(
            f"stack {' x '.join(str(a.size) for a in axes[: self.batch])} layers at axis "
            f"{', '.join(map(str, self.positions))}"
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


def restacked_axes(
    work: Expansion, here: Here, chain: Chain, node: Node, path: tuple[str, ...]
) -> tuple[str | None, ...]:
    """Logical axes of an array whose layers are stacked otherwise than the target's facts say; () if not known."""
    tree = target_tree(work.mapping.target)
    axes = tree.own_axes(path[1:], len(node.type.axes) - len(here.grid))
    if axes is None:
        return ()
    stack, inner = tree.stack(path[1:]), len(here.grid) - here.lead
    names = stack.axes if stack and len(stack.axes) == inner else (None,) * inner
    out = [*axes]
    lead = PIPELINE_AXES[-here.lead :] if here.lead else ()
    for position, name in sorted(zip(chain.positions, (*lead, *names), strict=True), key=lambda p: p[0]):
        out.insert(position, name)
    return tuple(out)
