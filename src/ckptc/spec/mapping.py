"""A mapping as typed records. Strings that are templates or expressions stay as written; `where` leads back to the YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ckptc.diagnostics import InputError, fail, nearest
from ckptc.spec.document import Document, Path_, load
from ckptc.spec.halves.lower import lower
from ckptc.spec.resources import mapping_files
from ckptc.spec.schema import check

Value = str | int | float | bool
LoopOver = Value | list[Value] | dict[str, Value]
LAYOUTS = ("scanned", "unscanned")
TARGET = "maxtext"
TARGETS = ("maxtext",)


@dataclass(frozen=True)
class OpSpec:
    """One op of a rule: its word, its argument as written, and its place."""

    name: str
    argument: Any
    where: Path_


@dataclass(frozen=True)
class Origin:
    """One source of a rule: a name template, the pattern of its axes, and the ops applied to it alone."""

    name: str | None  # None: `fill`
    pattern: str | None
    ops: tuple[OpSpec, ...]
    where: Path_


@dataclass(frozen=True)
class Rule:
    target: str
    origins: tuple[Origin, ...]  # one, or several to be joined by the first of `ops`
    ops: tuple[OpSpec, ...]
    fill: float | None
    dtype: str | None
    loop: Mapping[str, LoopOver]
    stack: Mapping[str, Value]
    when: Value | None
    collection: str
    axes: str | None
    axis: int | None  # of the layers, where it is not the layout's
    extra: bool  # whether the target itself need not have the array
    partial: str | None  # why part of the source is not converted
    where: Path_


@dataclass(frozen=True)
class Place:
    """Where the layers of a block go: separate arrays for each value of `loop`, one axis for each variable of `stack`."""

    at: str
    loop: Mapping[str, LoopOver]
    stack: Mapping[str, Value]
    axis: tuple[int, ...]
    let: Mapping[str, Value]
    when: Value | None
    where: Path_


@dataclass(frozen=True)
class Block:
    name: str
    source: str
    places: Mapping[str, tuple[Place, ...]]  # by layout
    when: Value | None
    rules: tuple[Rule, ...]
    where: Path_


@dataclass(frozen=True, eq=False)
class Model:
    """A named model. What it has of its own is kept, and merged with what its `like` has when it is asked for."""

    name: str
    repo: str
    where: Path_
    like: Model | None = field(repr=False)
    own: Mapping[str, Any] = field(repr=False)  # `config` and `set`, as written
    base: Mapping[str, Any] = field(repr=False)  # the config of all models of the family

    @property
    def config(self) -> Mapping[str, Any]:
        """The shipped numbers, as the model's config.json has them."""
        return _config_of(self)

    @property
    def set(self) -> Mapping[str, Value]:
        """Dims that have another value for this model."""
        out: dict[str, Value] = {}
        for own in self._owns():
            out |= own.get("set", {})
        return out

    def _owns(self) -> list[Mapping[str, Any]]:
        """What the models have of their own from which this one is made, the first first."""
        out: list[Mapping[str, Any]] = []
        model: Model | None = self
        while model is not None:
            out.append(model.own)
            model = model.like
        return out[::-1]


@lru_cache(maxsize=64)
def _config_of(model: Model) -> Mapping[str, Any]:
    out: dict[str, Any] = {}
    for config in (model.base, *(own.get("config", {}) for own in model._owns())):
        _merge(out, config)
    return out


@dataclass(frozen=True)
class Ignore:
    source: str
    reason: str
    loop: Mapping[str, LoopOver]
    when: Value | None
    where: Path_


@dataclass(frozen=True)
class Unsupported:
    layout: str
    reason: str
    when: Value | None
    where: Path_


@dataclass(frozen=True)
class Family:
    family: str
    title: str
    target: str
    block: str | None  # of the target, that explicit rules fill
    dims: Mapping[str, Value]
    models: Mapping[str, Model]
    multimodal: bool
    unsupported: tuple[Unsupported, ...]
    sources: Mapping[str, Mapping[str, Value]]
    rules: tuple[Rule, ...]
    blocks: tuple[Block, ...]
    ignore: tuple[Ignore, ...]
    document: Document


def load_mapping(path: Path, name: str | None = None, target: str = TARGET) -> Family:
    """Read, check against the schema, and type a family's file, as `target` runs it: halves become explicit rules, and
    a mapping of explicit rules stays as it is. Raises InputError with every problem found.
    """
    document = load(path, name)
    if not isinstance(document.data, dict) or not {"runs_as", "hub", "parts"} & document.data.keys():
        check(document)
        return _mapping(document)
    check(document, "family")
    lowered = lower(document, target, path.parent)
    check(lowered)
    return _mapping(lowered)


@cache
def load_shipped(path: Path, target: str = TARGET) -> Family:
    """One of the families that come with ckptc."""
    return load_mapping(path, f"mappings/{path.name}", target)


@cache
def shipped() -> tuple[Family, ...]:
    """The families that come with ckptc, by name."""
    return tuple(sorted((load_shipped(p) for p in mapping_files()), key=lambda m: m.family))


def find_model(name: str, mappings: tuple[Family, ...] | None = None, target: str = TARGET) -> tuple[Family, Model]:
    """The family, as `target` runs it, and the model called `name`. Raises InputError `unknown-model`, naming the nearest."""
    if mappings is None:
        # Only the files that mention the name are read: parsing all of them is most of a short command's time.
        named = [p for p in mapping_files() if f"{name}:" in p.read_text(encoding="utf-8")]
        for mapping in (load_shipped(p, target) for p in named):
            if name in mapping.models:
                return mapping, mapping.models[name]
    among = shipped() if mappings is None else mappings
    for mapping in among:
        if name in mapping.models:
            return mapping, mapping.models[name]
    known = [n for m in among for n in m.models]
    best = nearest(name, known)
    raise fail(
        "unknown-model",
        f"there is no model `{name}`",
        help=f"did you mean `{best}`?"
        if best
        else "`ckptc models` lists every named model; `--mapping FILE` uses a mapping of your own",
    )


def _mapping(document: Document) -> Family:
    data = document.data
    return Family(
        family=data["family"],
        title=data.get("title", ""),
        target=data["target"],
        block=data.get("block"),
        dims=data["dims"],
        models=_models(document),
        multimodal=data.get("multimodal", False),
        unsupported=tuple(
            Unsupported(u["layout"], u["reason"], u.get("when"), ("unsupported", n))
            for n, u in enumerate(data.get("unsupported", []))
        ),
        sources=data.get("sources", {"hub": {}}),
        rules=_rules(data.get("tensors", {}), ("tensors",)),
        blocks=tuple(_block(name, b, ("blocks", name)) for name, b in data.get("blocks", {}).items()),
        ignore=tuple(
            Ignore(i["source"], i["reason"], i.get("for", {}), i.get("when"), ("ignore", n))
            for n, i in enumerate(data.get("ignore", []))
        ),
        document=document,
    )


def _models(document: Document) -> dict[str, Model]:
    data, base = document.data["models"], document.data.get("config", {})
    made: dict[str, Model] = {}
    for name in data:
        where = document.span(("models", name, "like"))
        current, waiting = name, dict[str, None]()  # models that are made of what comes after them
        while current not in made:
            waiting[current] = None
            like = data[current].get("like")
            if like is None:
                break
            if like not in data:
                best = nearest(like, data)
                raise fail(
                    "unknown-model",
                    f"`like` names `{like}`, which is not a model of this family",
                    span=where,
                    help=best and f"did you mean `{best}`?",
                )
            if like in waiting:
                raise fail("unknown-model", f"`like` of `{name}` leads back to itself", span=where)
            current = like
        like_model = made.get(current)
        for one in reversed(waiting):
            made[one] = like_model = Model(one, data[one]["repo"], ("models", one), like_model, data[one], base)
    return {name: made[name] for name in data}


def _merge(into: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Adds `over`, section by section; sections are copied."""
    for key, value in over.items():
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value


def _rules(data: dict[str, Any], where: Path_) -> tuple[Rule, ...]:
    """The rules of a map of paths; a list holds several for one path, of which each has another `when`."""
    out = []
    for target, given in data.items():
        several = given if isinstance(given, list) else None
        out += [_rule(target, rule, (*where, target, n)) for n, rule in enumerate(several or ())]
        out += [_rule(target, given, (*where, target))] if several is None else []
    return tuple(out)


def _rule(target: str, rule: dict[str, Any], where: Path_) -> Rule:
    source = rule.get("from")
    ops = _ops(rule.get("ops", []), (*where, "ops"))
    if isinstance(source, list):
        origins = tuple(
            Origin(p["from"], p["as"], _ops(p.get("ops", []), (*where, "from", i, "ops")), (*where, "from", i))
            for i, p in enumerate(source)
        )
    else:
        origins = (Origin(source, rule.get("as"), (), where),)
    return Rule(
        target, origins, ops, rule.get("fill"), rule.get("dtype"), rule.get("for", {}), rule.get("stack", {}), rule.get("when"),
        rule.get("collection", "params"), rule.get("axes"), rule.get("axis"), rule.get("extra", False), rule.get("partial"), where,
    )  # fmt: skip


def _ops(data: list[dict[str, Any]], where: Path_) -> tuple[OpSpec, ...]:
    return tuple(OpSpec(name, arg, (*where, i, name)) for i, op in enumerate(data) for name, arg in op.items())


def _block(name: str, data: dict[str, Any], where: Path_) -> Block:
    always = _places(data.get("always", []), (*where, "always"))
    places = {layout: (*always, *_places(data.get(layout, []), (*where, layout))) for layout in LAYOUTS}
    return Block(name, data["source"], places, data.get("when"), _rules(data["tensors"], (*where, "tensors")), where)


def _places(data: list[dict[str, Any]], where: Path_) -> tuple[Place, ...]:
    out = []
    for i, p in enumerate(data):
        axis, stack = p.get("axis", 1), p.get("stack", {})
        axes = tuple(axis) if isinstance(axis, list) else tuple(axis + n for n in range(len(stack)))
        out.append(Place(p["at"], p.get("for", {}), stack, axes, p.get("let", {}), p.get("when"), (*where, i)))
    return tuple(out)


__all__ = [
    "Block",
    "Family",
    "Ignore",
    "InputError",
    "Model",
    "OpSpec",
    "Origin",
    "Place",
    "Rule",
    "find_model",
    "load_mapping",
    "shipped",
]
