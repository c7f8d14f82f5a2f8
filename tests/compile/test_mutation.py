"""Mutation: a shipped mapping that is broken in any simple way is refused, or makes other arrays than it should.

Every mapping with a golden is broken in one place at a time: a rule dropped, two sources swapped, a dim larger, a name
misspelled, and so on (`mutants`). Each mutant is put before the mapping's judges, who know what is right:

- for each golden, MaxText's arrays, bit for bit; also for the same checkpoint with a larger vocabulary, and with a head
  of its own instead of one tied to the embedding, or the other way round;
- for a layout that has no golden, and for the text model alone, the arrays of the shipped mapping; `test_golden`
  compares the layouts;
- for a layout the target lacks, or lacks for that number of layers, that the compiler says so;
- for the model's shipped numbers, the paths and shapes of MaxText's full-size tree.

A mutant must be refused by the compiler (any `InputError`) or differ for one judge at least. What is not put to the
test is said by the rules in `neutral`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pytest
from ruamel.yaml import YAML

from ckptc.compile.compiler import compile_plan, layouts
from ckptc.compile.dims import evaluate_dims
from ckptc.compile.options import Options
from ckptc.compile.scope import Scope
from ckptc.diagnostics import InputError
from ckptc.ir.source import Checkpoint, SourceTensor
from ckptc.plan.model import Array as PlanArray
from ckptc.plan.model import Plan
from ckptc.spec import mapping as spec
from ckptc.spec.document import Document
from ckptc.spec.expressions import ExpressionError, render
from ckptc.spec.expressions import evaluate as expression
from ckptc.spec.schema import check
from golden import Arrays, checkpoint_of, differences, evaluate, expected_of, known_cases, options_of, source_tensors
from reference import GoldenCase, tree, trees

Where = tuple[str | int, ...]
FAMILIES = sorted({spec.find_model(case.model)[0].family for case in known_cases()})
HEAD = "params/params/decoder/logits_dense/kernel"
WIDER = 32  # rows by which a judge's vocabulary is larger than the golden's
VOCABULARY = (  # arrays with an axis for it, and which it is
    (r"params/token_embedder/embedding", 0),
    (r"params/decoder/logits_dense/kernel", 1),
    (r"params/.*/tid2eid", 0),
)


# -- mutants -------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    kind: str
    where: Where  # of what is broken, in the YAML
    edit: Callable[[Any], None]  # breaks the mapping's data

    @property
    def name(self) -> str:
        return f"{self.kind}: {' > '.join(map(str, self.where))}"


def get(data: Any, where: Where) -> Any:
    for key in where:
        data = data[key]
    return data


def drop(kind: str, where: Where) -> Mutant:
    def edit(data: Any) -> None:
        del get(data, where[:-1])[where[-1]]

    return Mutant(f"drop {kind}", where, edit)


def put(kind: str, where: Where, value: Any) -> Mutant:
    def edit(data: Any) -> None:
        get(data, where[:-1])[where[-1]] = value

    return Mutant(kind, where, edit)


def rename(kind: str, where: Where, key: str) -> Mutant:
    """Another key in the same place: the order of keys has a meaning in loops."""

    def edit(data: Any) -> None:
        at = get(data, where[:-1])
        items = [(key if k == where[-1] else k, v) for k, v in at.items()]
        at.clear()
        at.update(items)

    return Mutant(kind, where, edit)


def swap(kind: str, one: Where, other: Where) -> Mutant:
    def edit(data: Any) -> None:
        a, b = get(data, one), get(data, other)
        get(data, one[:-1])[one[-1]], get(data, other[:-1])[other[-1]] = b, a

    return Mutant(kind, (*one, "with", *other[-2:]), edit)


def mutants(data: Any) -> Iterator[Mutant]:
    """Every simple way to break a mapping, one at a time."""
    for mutant in attempts(data):
        broken = copy.deepcopy(data)
        mutant.edit(broken)
        if broken != data or mutant.kind == "misspell key":  # two rules of one source cannot swap it
            yield mutant


def attempts(data: Any) -> Iterator[Mutant]:
    yield from misspellings(data)
    for name, value in data["dims"].items():
        # By 2, since layers may come in pairs and one more would be left over.
        yield put("change dim", ("dims", name), f"({value}) + 2" if isinstance(value, str) else value + 2)
    yield from numbers(data)
    for where, rule in rules(data):
        yield drop("rule", where)
        yield from broken_rule(where, rule)
    yield from swaps(data)
    for where, place in places(data):
        yield drop("place", where)
        yield from (drop(key, (*where, key)) for key in ("for", "stack", "let", "axis") if key in place)
        yield from (put("change let", (*where, "let", n), larger(v)) for n, v in place.get("let", {}).items())
        yield from (
            put("change extent", (*where, "stack", n), f"({v})[1:]" if "range" in str(v) else f"({v}) - 1")
            for n, v in place.get("stack", {}).items()
        )
        if len(place.get("stack", {})) == 1:
            now = place.get("axis", 1)
            yield from (put("change axis", (*where, "axis"), axis) for axis in (0, 1, 2) if axis != now)
    for where, holder in conditions(data):
        yield drop("condition", (*where, "when"))
        yield put("negate condition", (*where, "when"), f"not ({holder['when']})")
    for part in ("ignore", "unsupported"):
        yield from (drop(part, (part, i)) for i in range(len(data.get(part, []))))


def numbers(data: Any) -> Iterator[Mutant]:
    """The numbers of config.json that a mapping ships, doubled."""

    def walk(where: Where) -> Iterator[Mutant]:
        for key, value in get(data, where).items():
            if isinstance(value, dict):
                yield from walk((*where, key))
            elif type(value) is int:
                yield put("change number", (*where, key), 2 * value)

    for where in [("config",), *(("models", name, "config") for name in data["models"])]:
        if where[-1] in get(data, where[:-1]):
            yield from walk(where)


def larger(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return f"({value}) + 1" if isinstance(value, str) else value + 1


def rules(data: Any) -> Iterator[tuple[Where, Any]]:
    groups: list[Where] = [("tensors",)] if "tensors" in data else []
    groups += [("blocks", name, "tensors") for name in data.get("blocks", {})]
    for group in groups:
        for target, rule in get(data, group).items():
            yield (*group, target), rule


def places(data: Any) -> Iterator[tuple[Where, Any]]:
    for block, body in data.get("blocks", {}).items():
        for layout in ("always", "scanned", "unscanned"):
            for i, place in enumerate(body.get(layout, [])):
                yield ("blocks", block, layout, i), place


def conditions(data: Any) -> Iterator[tuple[Where, Any]]:
    """Everything that has a `when`."""
    holders = [*rules(data), *places(data)]
    holders += [(("blocks", name), block) for name, block in data.get("blocks", {}).items()]
    holders += [((part, i), x) for part in ("ignore", "unsupported") for i, x in enumerate(data.get(part, []))]
    return ((where, holder) for where, holder in holders if "when" in holder)


def broken_rule(where: Where, rule: Any) -> Iterator[Mutant]:
    parts = [((*where, "from", i), p) for i, p in enumerate(rule["from"])] if isinstance(rule.get("from"), list) else []
    yield from (
        drop(key, (*where, key))
        for key in ("from", "as", "fill", "dtype", "stack", "for", "axis", "collection", "partial")
        if key in rule
    )
    if "axis" in rule:
        yield put("change axis", (*where, "axis"), rule["axis"] + 1)
    if "fill" in rule:
        yield put("change fill", (*where, "fill"), rule["fill"] + 1)
    yield from (put("change extent", (*where, "stack", n), f"({v}) - 1") for n, v in rule.get("stack", {}).items())
    for at, holder in [(where, rule), *parts]:
        if "as" in holder:
            yield from (put("swap axes", (*at, "as"), text) for text in swapped_axes(holder["as"]))
        for i, op in enumerate(holder.get("ops", [])):
            yield drop("op", (*at, "ops", i))
            yield from broken_op((*at, "ops", i), op)
    for i in range(len(parts)):
        yield drop("part", (*where, "from", i))
    if len(parts) > 1:
        yield swap("swap parts", parts[0][0], parts[1][0])


def broken_op(where: Where, op: Any) -> Iterator[Mutant]:
    ((name, argument),) = op.items()
    if name == "rearrange":
        yield from (put("swap axes", (*where, name), text) for text in swapped_axes(argument))
    elif name in ("scale", "add"):
        yield put("change op", (*where, name), larger(argument))
    elif name in ("pad", "resize", "slice", "split", "interleave"):
        for key, value in argument.items():
            if isinstance(value, list):
                yield from (put("change op", (*where, name, key, i), larger(v)) for i, v in enumerate(value))
            elif key != "axis":
                yield put("change op", (*where, name, key), larger(value))
    elif name == "cast":
        yield put("change op", (*where, name), "float16" if argument == "bfloat16" else "bfloat16")


def swapped_axes(pattern: str) -> Iterator[str]:
    """The pattern with two neighbours on its right side swapped, those inside parentheses too."""
    left, arrow, right = pattern.partition("->")
    right = right if arrow else left
    groups = re.findall(r"\([^)]*\)|\S+", right)
    for i in range(len(groups) - 1):
        yield f"{left} -> {' '.join([*groups[:i], groups[i + 1], groups[i], *groups[i + 2 :]])}"
    for i, group in enumerate(groups):
        names = group.strip("()").split()
        if len(names) > 1:
            turned = f"({' '.join([names[1], names[0], *names[2:]])})"
            yield f"{left} -> {' '.join([*groups[:i], turned, *groups[i + 1 :]])}"


def swaps(data: Any) -> Iterator[Mutant]:
    """Sources exchanged: between rules of one pattern in one block, and between the values of one loop."""
    plain = [(where, rule) for where, rule in rules(data) if isinstance(rule.get("from"), str) and "for" not in rule]
    for i, (one, a) in enumerate(plain):
        for other, b in plain[i + 1 :]:
            if one[:-1] == other[:-1] and a.get("as") == b.get("as"):
                yield swap("swap sources", (*one, "from"), (*other, "from"))
    for where, holder in [*rules(data), *places(data)]:
        for variable, over in holder.get("for", {}).items():
            if isinstance(over, dict):
                keys = list(over)
                for a, b in pairwise(keys):
                    yield swap("swap sources", (*where, "for", variable, a), (*where, "for", variable, b))


def misspellings(data: Any) -> Iterator[Mutant]:
    """Every key of the mapping, and every name in a value, with a letter too many."""
    yield from _misspelled_keys(data, ())
    names = [(*where, "at") for where, _ in places(data)]
    names += [("blocks", name, "source") for name in data.get("blocks", {})]
    names += [("sources", naming, n) for naming, values in data.get("sources", {}).items() for n in values]
    for where, rule in rules(data):
        if isinstance(rule.get("from"), str):
            names.append((*where, "from"))
        names += (
            [(*where, "from", i, "from") for i in range(len(rule["from"])) if isinstance(rule["from"], list)]
            if "from" in rule
            else []
        )
        names += [
            (*where, "for", v, k) for v, over in rule.get("for", {}).items() if isinstance(over, dict) for k in over
        ]
    yield from (put("misspell", where, f"{value}x") for where in names if isinstance(value := get(data, where), str))


def _misspelled_keys(data: Any, where: Where) -> Iterator[Mutant]:
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if isinstance(key, str):
            yield rename("misspell key", (*where, key), f"{key}x")
        yield from _misspelled_keys(value, (*where, key))


# -- judges --------------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Compiles a mutant under one set of options and says what is wrong with it, None where nothing is."""

    name: str
    model: str
    options: Options

    def objection(self, mapping: spec.Family) -> str | None:
        raise NotImplementedError

    def compile(self, mapping: spec.Family, checkpoint: Checkpoint | None) -> Plan:
        return compile_plan(mapping, spec.find_model(self.model, (mapping,))[1], self.options, checkpoint)


@dataclass
class ByArrays(Judge):
    """Knows every array of a tiny checkpoint."""

    hf: Path
    checkpoint: Checkpoint
    expected: Arrays
    right: Plan  # the shipped mapping's
    names: dict[str, Any]  # what its expressions see

    def __post_init__(self) -> None:
        self.recipes = {a.name: recipe(self.right, a) for a in self.right.arrays}

    def objection(self, mapping: spec.Family) -> str | None:
        plan = self.compile(mapping, self.checkpoint)
        made = {a.name: (a.dtype, a.shape) for a in plan.arrays}
        if made != {name: (a.dtype.name, a.shape) for name, a in self.expected.items()}:
            return "another tree, other dtypes or other shapes"
        # Arrays made as the shipped mapping makes them are known to be right.
        changed = [i for i, a in enumerate(plan.arrays) if recipe(plan, a) != self.recipes[a.name]]
        found = evaluate(plan, self.hf, changed)
        wrong = differences(found, {name: self.expected[name] for name in found})
        return wrong[0] if wrong else None


def recipe(plan: Plan, array: PlanArray) -> Any:
    """All that an array's values depend on."""

    def names(positions: tuple[int, ...]) -> list[str]:
        return [plan.tensors[p].name for p in positions]

    sources = [
        (
            s.stored,
            names(s.tensors),
            [names(column) for column in s.beside],
        )
        for s in array.sources
    ]
    return array.shape, array.dtype, sources, array.parts


@dataclass
class ByRefusal(Judge):
    """Knows that the target has no such layout."""

    checkpoint: Checkpoint

    def objection(self, mapping: spec.Family) -> str | None:
        try:
            self.compile(mapping, self.checkpoint)
        except InputError as error:
            return None if {d.code for d in error.diagnostics} == {"unsupported-layout"} else f"refused: {error}"
        return "compiled for a layout the target lacks"


@dataclass
class ByTree(Judge):
    """Knows the paths and shapes of the full-size model."""

    layout: str

    def objection(self, mapping: spec.Family) -> str | None:
        plan = self.compile(mapping, None)
        expected = {path: shape for path, (shape, _) in tree(self.model, self.layout).items()}
        return None if {a.name: a.shape for a in plan.arrays} == expected else "another tree"


@functools.cache
def judges(family: str) -> tuple[Judge, ...]:
    """The judges of a family, quick ones first."""
    cases = [case for case in known_cases() if spec.find_model(case.model)[0].family == family]
    found = [judge for case in cases for judge in of_golden(case)]
    for case in cases:
        found += of_other_layouts(case, [(j.hf, j.options) for j in found if isinstance(j, ByArrays)])
    found += [judge for case in {case.model: case for case in cases}.values() for judge in of_trees(case)]
    return tuple(found)


def of_golden(case: GoldenCase) -> Iterator[ByArrays]:
    expected, options = expected_of(case), options_of(case)
    yield by_arrays(case, case.id, options, expected)
    if names_of(case, options, checkpoint_of(case.hf))["vocab"] <= case.vocab:  # it is padded, not cut
        options = options_of(case, set={"padded_vocab": case.vocab + WIDER})
        expected = {name: widened(name, array) for name, array in expected.items()}
        yield by_arrays(case, f"{case.id}, wider", options, expected)
    yield from of_other_head(case, options, expected)


def of_other_layouts(case: GoldenCase, known: list[Any]) -> Iterator[Judge]:
    """For the layouts that have no golden, and for the text model of a golden with towers."""
    mapping, model = spec.find_model(case.model)
    for layout, multimodal in product(spec.LAYOUTS, {case.multimodal, False}):
        options, checkpoint = options_of(case, layout=layout, multimodal=multimodal), checkpoint_of(case.hf)
        name = f"{case.name}, {layout}{', multimodal' * multimodal}"
        if layout not in layouts(mapping, model):
            yield ByRefusal(name, case.model, options, checkpoint)
            continue
        if any(entry.layout == layout for entry in mapping.unsupported):
            odd = {**options.set, "layers": names_of(case, options, checkpoint)["layers"] + 1}
            yield ByRefusal(f"{name}, a layer more", case.model, replace(options, set=odd), checkpoint)
        if (case.hf, options) not in known:
            known.append((case.hf, options))
            yield by_arrays(case, name, options, None)


def of_trees(case: GoldenCase) -> Iterator[ByTree]:
    layout = layouts(*spec.find_model(case.model))[0]  # one shows the sizes; scanned, where there is that, is quicker
    dtype = next(c.dtype for c in known_cases() if c.model == case.model)  # an encoded upload has arrays of its own
    for multimodal in (False, True):
        full = {"scanned": "scan", "unscanned": "unscan"}[layout] + ".mm" * multimodal
        if full in trees()[case.model]:
            options = Options(layout=layout, dtype=dtype, multimodal=multimodal)
            yield ByTree(f"{case.model}, {full}", case.model, options, full)


def by_arrays(
    case: GoldenCase, name: str, options: Options, expected: Arrays | None, checkpoint: Checkpoint | None = None
) -> ByArrays:
    mapping, model = spec.find_model(case.model)
    checkpoint = with_ignored(case, options, checkpoint or checkpoint_of(case.hf))
    right = compile_plan(mapping, model, options, checkpoint)
    made = evaluate(right, case.hf)
    if expected is not None:
        assert differences(made, expected) == [], f"{name}: the shipped mapping itself is wrong"
    return ByArrays(name, case.model, options, case.hf, checkpoint, made, right, names_of(case, options, checkpoint))


def widened(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array for a larger vocabulary: zeros at the end of its axis."""
    axis = next((axis for pattern, axis in VOCABULARY if re.fullmatch(f"params/{pattern}", name)), None)
    return np.pad(array, [(0, WIDER if i == axis else 0) for i in range(array.ndim)])


def of_other_head(case: GoldenCase, options: Options, expected: Arrays) -> Iterator[ByArrays]:
    """The golden with an output head of its own where its head is tied to the embedding, and the other way round.

    Only for mappings that know both. The head of its own is a second name for the embedding's bytes.
    """
    mapping, _ = spec.find_model(case.model)
    top = {rule.target: rule for rule in mapping.rules}
    head, embedding = top.get("decoder/logits_dense/kernel"), top["token_embedder/embedding"]
    if head is None or "tie_word_embeddings" not in str(head.when):
        return
    source = checkpoint_of(case.hf)
    names = names_of(case, options, source)
    own = holds(head.when, names)
    tensors, expected = dict(source.tensors), dict(expected)
    if own:
        del expected[HEAD]
    else:
        name, embedded = (render(str(rule.origins[0].name), names) for rule in (head, embedding))
        tensors[name] = replace(tensors[embedded], name=name)
        rows = source_tensors(case.hf)[embedded]
        like = expected["params/params/token_embedder/embedding"]
        expected[HEAD] = np.pad(rows, [(0, len(like) - len(rows)), (0, 0)]).astype(like.dtype).T
    checkpoint = Checkpoint(source.files, tensors, with_tie(source.config, own))
    yield by_arrays(case, f"{case.id}, {'tied' if own else 'own'} head", options, expected, checkpoint)


def with_tie(config: Any, tie: bool) -> dict[str, Any]:
    """`config` with `tie_word_embeddings` in every section, wherever the family has it."""
    sections = {key: with_tie(value, tie) if isinstance(value, dict) else value for key, value in config.items()}
    return {**sections, "tie_word_embeddings": tie}


def with_ignored(case: GoldenCase, options: Options, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a tensor more for each entry of `ignore` in force: goldens lack what few uploads have."""
    mapping, _ = spec.find_model(case.model)
    names, tensors = names_of(case, options, checkpoint), dict(checkpoint.tensors)
    scope = Scope(mapping.document, names)
    for entry in mapping.ignore:
        for looped in scope.loops(entry.loop, names, entry.where):
            if scope.holds(entry.when, looped, entry.where):
                name = render(entry.source, looped).replace("*", "any")
                tensors.setdefault(name, SourceTensor(name, "bfloat16", (1,), 0, 0, 2))
    return replace(checkpoint, tensors=tensors)


def names_of(case: GoldenCase, options: Options, checkpoint: Checkpoint) -> dict[str, Any]:
    """What expressions of the shipped mapping see."""
    mapping, model = spec.find_model(case.model)
    naming = compile_plan(mapping, model, options, checkpoint_of(case.hf)).choices.naming
    dims = evaluate_dims(mapping, model, checkpoint.config, options.set)
    named = {"config": checkpoint.config, "multimodal": options.multimodal, "dtype": options.dtype}
    return {**dims, **mapping.sources[naming], **named}


def holds(condition: Any, names: dict[str, Any]) -> bool:
    return condition is None or condition is True or bool(isinstance(condition, str) and expression(condition, names))


# -- the test ------------------------------------------------------------------------------------------------


def neutral(mutant: Mutant, family: str) -> str | None:
    """Why a mutant may do all that the mapping does; None where it may not."""
    data, kind, where = shipped(family).document.data, mutant.kind, mutant.where
    own = {judge.model for judge in judges(family)}
    match where:
        case ("models", name, *_) if name not in own:
            return "another model than the judges'"
        case ("config", *keys) if keys and all(gives(data["models"][name].get("config", {}), keys) for name in own):
            return "a number that the judges' models give themselves"
        case ("config" | "models", *_, key) if kind == "misspell key" and falls_back(mutant, family, str(key)):
            return "a number that is taken where the key is missing, too"
        case ("dims", name) if kind == "change dim" and all(name in data["models"][m].get("set", {}) for m in own):
            return "a dim that the judges' models set themselves"
        case ("blocks" | "sources", _) if kind == "misspell key":
            return "a label for people, which nothing refers to"
        case ("sources", naming, *_) if naming not in {j.right.choices.naming for j in by_array_judges(family)}:
            return "a naming that no golden has"
        case ("dims", name) if name not in used(family):
            return "a dim that only rules use which no golden's model has"
    inside = [rule for rule in unreached(family) if where[: len(rule)] == rule]
    if inside and where[len(inside[0]) :] != ("when",):
        return "a rule, or a block, that no golden's model has"
    if kind == "drop condition" and true_for_all(get(data, where), family):
        return "a condition that is true of every golden"
    if kind == "drop ignore" and false_for_all(get(data, where).get("when"), family):
        return "an entry that is in force for no golden"
    if kind == "swap axes" and where[-1] == "as" and only_moves_a_cut_axis(data, mutant):
        return "an axis that the next op drops by its index, wherever it is"
    return None


def gives(config: Any, keys: list[Any]) -> bool:
    for key in keys:
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


def falls_back(mutant: Mutant, family: str, key: str) -> bool:
    """Whether the key is for dims, and they are the same without it: they have a default, or the family a number."""
    broken = copy.deepcopy(shipped(family).document.data)
    if not any(re.search(rf"\b{key}\b", str(value)) for value in broken["dims"].values()):
        return False
    mutant.edit(broken)
    other = spec._mapping(Document("mutant.yaml", "", broken))
    try:
        return all(sizes(other, model) == shipped_sizes(family, model) for model in {j.model for j in judges(family)})
    except InputError:
        return False


@functools.cache
def shipped_sizes(family: str, model: str) -> dict[str, Any]:
    return sizes(shipped(family), model)


def sizes(mapping: spec.Family, name: str) -> dict[str, Any]:
    model = mapping.models[name]
    return {n: v for n, v in evaluate_dims(mapping, model, model.config, {}).items() if not isinstance(v, dict)}


def only_moves_a_cut_axis(data: Any, mutant: Mutant) -> bool:
    broken = copy.deepcopy(data)
    mutant.edit(broken)
    rule = get(data, mutant.where[:-1])
    first = (rule.get("ops") or [{}])[0].get("slice", {})
    cut = {axis for axis, at in first.items() if not isinstance(at, list)}

    def rest(pattern: str) -> list[str]:
        return [name for name in pattern.split("->")[-1].split() if name not in cut]

    return rest(rule["as"]) == rest(get(broken, mutant.where))


def shipped(family: str) -> spec.Family:
    return next(m for m in spec.shipped() if m.family == family)


def by_array_judges(family: str) -> list[ByArrays]:
    return [judge for judge in judges(family) if isinstance(judge, ByArrays)]


@functools.cache
def unreached(family: str) -> tuple[Where, ...]:
    """The rules that make no array of any judge's model, and the blocks that have only such rules."""
    data = shipped(family).document.data
    made = {array.rule for judge in by_array_judges(family) for array in judge.right.arrays}

    def label(where: Where) -> str:
        return f"{where[1]}: {where[-1]}" if where[0] == "blocks" else str(where[-1])

    silent = [where for where, _ in rules(data) if label(where) not in made]
    blocks = [("blocks", name) for name in data.get("blocks", {})]
    return (*(b for b in blocks if all(w in silent for w, _ in rules(data) if w[:2] == b)), *silent)


@functools.cache
def used(family: str) -> frozenset[str]:
    """The dims that something reached uses, itself or through other dims. Any word that is spelled like one counts."""
    data = copy.deepcopy(shipped(family).document.data)
    for where in reversed(unreached(family)):  # rules before their blocks
        del get(data, where[:-1])[where[-1]]
    dims = data.pop("dims")
    words, waiting = set[str](), [json.dumps(data)]
    while waiting:
        new = set(re.findall(r"[a-z_][a-z0-9_]*", waiting.pop())) - words
        words |= new
        waiting += [str(dims[name]) for name in new & dims.keys()]
    return frozenset(words)


def true_for_all(condition: Any, family: str) -> bool:
    try:
        return all(holds(condition, judge.names) for judge in by_array_judges(family))
    except ExpressionError:  # of loop variables, which differ from array to array
        return False


def false_for_all(condition: Any, family: str) -> bool:
    return condition is not None and true_for_all(f"not ({condition})", family)


# Of a mapping with more mutants than this, one in so many is tried, the same ones every time; all of them where this
# variable of the environment is set, which takes some ten minutes.
QUICK, SHARE, ALL = 280, 16, "CKPTC_ALL_MUTANTS"

# Mutants that nobody notices though no rule excuses them, by family, and why.
UNNOTICED: dict[str, dict[str, str]] = {
    "gemma3": {
        "drop condition: ignore > 2 > when": "without --multimodal the first entry leaves out the whole tower already",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_passes_unseen(family: str) -> None:
    data = shipped(family).document.data
    every = list(mutants(data))
    share = 1 if len(every) <= QUICK or os.environ.get(ALL) else SHARE
    drawn = [mutant for mutant in every if crc32(mutant.name.encode()) % share == 0]
    tried = [mutant for mutant in drawn if neutral(mutant, family) is None]
    assert len(tried) > 10
    unseen = {mutant.name for mutant in tried if verdict(data, mutant, judges(family)) is None}
    assert unseen - UNNOTICED.get(family, {}).keys() == set()
    assert UNNOTICED.get(family, {}).keys() & {mutant.name for mutant in tried} <= unseen, "an entry is not needed"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mapping_written_back_unbroken_passes_every_judge(family: str, tmp_path: Path) -> None:
    """So the judges see what is broken, and not how it was written: as text, a mapping is what its data says."""
    file = tmp_path / "mapping.yaml"
    with file.open("w", encoding="utf-8") as stream:
        YAML().dump(shipped(family).document.data, stream)
    mapping = spec.load_mapping(file)
    assert mapping.document.data == shipped(family).document.data
    for judge in judges(family):
        assert judge.objection(mapping) is None, judge.name


def verdict(data: Any, mutant: Mutant, among: tuple[Judge, ...]) -> str | None:
    """How the mutant is found out, None where nobody notices."""
    broken = copy.deepcopy(data)
    mutant.edit(broken)
    document = Document("mutant.yaml", json.dumps(broken), broken)
    try:
        check(document)
        mapping = spec._mapping(document)
        # A checkpoint has numbers of its own, and goldens set the vocabulary: the mapping's are for the full-size tree.
        sizes = mutant.where[0] in ("models", "config") or mutant.where == ("dims", "padded_vocab")
        for judge in (judge for judge in among if isinstance(judge, ByTree) == sizes):
            if objection := judge.objection(mapping):
                return f"{judge.name}: {objection}"
    except InputError as error:
        return f"refused: {error}"
    return None
