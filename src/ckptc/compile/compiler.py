"""The compiler: a mapping, a model and (where there is one) a checkpoint's headers become a plan. Pure; no I/O.

    dims -> expand -> fold -> CHECKS -> assemble (schedule)

The graph is verified when it is made; every check runs, and all that they find is reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptc.compile.assemble import assemble
from ckptc.compile.check import check, missing
from ckptc.compile.contract import contract_problems, guarded
from ckptc.compile.coverage import coverage, unique_targets
from ckptc.compile.dims import evaluate_dims
from ckptc.compile.expand import expand
from ckptc.compile.fold import Folded, fold
from ckptc.compile.options import Options
from ckptc.compile.quantised import Quantised, find
from ckptc.compile.scope import Scope
from ckptc.compile.unproved import Unproved, unproved
from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ir.graph import Graph
from ckptc.ir.source import Checkpoint, SourceTensor, stated_dtype
from ckptc.ir.verify import verify
from ckptc.plan.model import Plan
from ckptc.spec.mapping import LAYOUTS, Family, Model

Tensors = Mapping[str, SourceTensor]


@dataclass
class Compiled:
    """What the passes have made of a model so far."""

    graph: Graph
    folded: tuple[Folded, ...]
    tensors: Tensors | None  # None without a checkpoint
    quantised: Quantised


CHECKS: tuple[Callable[[Compiled], list[Diagnostic]], ...] = (
    lambda c: unique_targets(c.graph),
    lambda c: check(c.graph, c.tensors) if c.tensors is not None else [],
    lambda c: coverage(c.graph, c.folded, c.tensors, c.quantised) if c.tensors is not None else [],
)


def compile_plan(mapping: Family, model: Model, options: Options, checkpoint: Checkpoint | None = None) -> Plan:
    """The plan. Without a checkpoint, dims come from the numbers shipped for the model and nothing is checked against headers.

    Raises InputError with everything that is wrong, found before a byte of weight data is read.
    """
    try:
        return _compile(mapping, model, options, checkpoint)
    except InputError as error:
        sizes = any(d.code in ("shape-mismatch", "missing-config") for d in error.diagnostics)
        if checkpoint is None or checkpoint.config or not sizes:
            raise
        raise InputError([_without_config(model), *error.diagnostics]) from None


def _without_config(model: Model) -> Diagnostic:
    """Said before all sizes that are wrong, for it is the likely cause."""
    return Diagnostic(
        "missing-config",
        f"the checkpoint has no config.json: sizes are taken to be those shipped for `{model.name}`",
        None,
        (),
        "download the config.json that belongs to these shards into their directory",
    )


def compile_unproved(
    mapping: Family, model: Model, options: Options, checkpoint: Checkpoint | None = None
) -> list[Unproved]:
    """What the checks take on trust. Raises InputError as `compile_plan` does."""
    return unproved(_checked(mapping, model, options, checkpoint)[2].graph)


def _compile(mapping: Family, model: Model, options: Options, checkpoint: Checkpoint | None) -> Plan:
    dims, naming, compiled = _checked(mapping, model, options, checkpoint)
    return assemble(
        mapping, model, options, dims, naming, compiled.graph, compiled.folded, checkpoint, compiled.quantised
    )


def _checked(
    mapping: Family, model: Model, options: Options, checkpoint: Checkpoint | None
) -> tuple[Mapping[str, Any], str, Compiled]:
    """The dims, the naming, and the graph after every check."""
    config = checkpoint.config if checkpoint and checkpoint.config else model.config
    dims = evaluate_dims(mapping, model, config, options.set)
    names = {**dims, "config": config, "multimodal": options.multimodal, "dtype": options.dtype}
    supported(mapping, model, options, names)
    tensors = checkpoint.tensors if checkpoint else None
    dtypes = {name: t.dtype for name, t in tensors.items()} if tensors is not None else None
    quantised = decoded(options, config, checkpoint)
    naming, graph = expand_namings(mapping, options, dims, names, dtypes, quantised)
    compiled = Compiled(graph, fold(graph), tensors, quantised)
    problems = [d for step in CHECKS for d in step(compiled)]
    if not problems:
        problems += contract_problems(mapping, options, dims, graph)
    if not problems:
        problems += guarded(mapping, model, options, dims, graph)
    if problems:
        raise InputError(dict.fromkeys(problems))
    return dims, naming, compiled


def decoded(options: Options, config: Mapping[str, Any], checkpoint: Checkpoint | None) -> Quantised:
    """The weights that are decoded. None where codes are to stay codes: with `--dtype float8_e4m3fn`."""
    if checkpoint is None or options.dtype.startswith("float8"):
        return Quantised()
    return find(config, checkpoint.tensors)


def layouts(mapping: Family, model: Model) -> tuple[str, ...]:
    """The layouts the target has for a model, judged by its shipped numbers."""
    dims = evaluate_dims(mapping, model, model.config, {})
    names = {**dims, "config": model.config, "multimodal": False, "dtype": "bfloat16"}
    scope = Scope(mapping.document, dims)
    absent = {u.layout for u in mapping.unsupported if scope.holds(u.when, names, u.where)}
    return tuple(name for name in LAYOUTS if name not in absent)


def supported(mapping: Family, model: Model, options: Options, names: dict[str, Any]) -> None:
    """Raises `unsupported-layout` or `no-towers` for options that the target does not have for this model."""
    scope = Scope(mapping.document, names)
    for entry in mapping.unsupported:
        if entry.layout == options.layout and scope.holds(entry.when, names, entry.where):
            raise fail(
                "unsupported-layout",
                f"{model.name} has no {options.layout} layout: {entry.reason}",
                span=mapping.document.span((*entry.where, "reason")),
                help="use --no-scan" if options.layout == "scanned" else "use --scan",
            )
    if options.multimodal and not mapping.multimodal:
        raise fail("no-towers", f"{model.name} has no vision or audio towers", help="leave out --multimodal")


def expand_namings(
    mapping: Family,
    options: Options,
    dims: Mapping[str, Any],
    names: dict[str, Any],
    dtypes: Mapping[str, str] | None,
    quantised: Quantised | None = None,
) -> tuple[str, Graph]:
    """Expands under each of the mapping's namings; the names the checkpoint has decide which one it is.

    `dtypes`: of the checkpoint's tensors, by name. Without one, the first naming and the config's dtype are taken.
    """
    best: tuple[int, str, Graph] | None = None
    for naming, graph in all_namings(mapping, options, dims, names, dtypes, quantised):
        absent = missing(graph, dtypes) if dtypes is not None else 0
        if best is None or absent < best[0]:
            best = (absent, naming, graph)
        if absent == 0:
            break
    assert best is not None
    return best[1], best[2]


def all_namings(
    mapping: Family,
    options: Options,
    dims: Mapping[str, Any],
    names: dict[str, Any],
    dtypes: Mapping[str, str] | None,
    quantised: Quantised | None = None,
) -> Iterator[tuple[str, Graph]]:
    """The graph under each of the mapping's namings, in their order."""
    default = stated_dtype(names["config"])

    def stored(name: str) -> str:
        return dtypes.get(name, default) if dtypes is not None else default

    for naming, values in mapping.sources.items():
        yield naming, verify(expand(mapping, options, dims, {**names, **values}, stored, quantised), "expand")
