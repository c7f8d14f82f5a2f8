"""recompile: the graph that a plan was folded from.

A plan keeps what its ops came to, not the ops. Who wants to check it against them compiles its mapping once more, with
the choices and the dims that the plan records.
"""

from __future__ import annotations

from typing import Any

from ckptc.compile.assemble import sha256
from ckptc.compile.compiler import decoded, expand_namings
from ckptc.compile.dims import evaluate_dims
from ckptc.compile.options import Options
from ckptc.compile.stacking import read_pipeline
from ckptc.diagnostics import fail
from ckptc.ir.graph import Graph
from ckptc.ir.source import Checkpoint
from ckptc.plan.model import Plan
from ckptc.spec.mapping import Family, Model


def recompiled_graph(plan: Plan, mapping: Family, model: Model, checkpoint: Checkpoint) -> Graph:
    """The plan's graph. `checkpoint` is the plan's source.

    Raises InputError: `mapping-changed` (the mapping is not the text that the plan was made from), `config-changed`
    (the same mapping now gives other arrays: config.json is another one), and what compiling raises.
    """
    digest = sha256(mapping.document.text.encode())
    if digest != plan.made.mapping:
        raise fail(
            "mapping-changed",
            f"{mapping.document.name} is not the mapping that the plan was made from",
            notes=(f"expected: {plan.made.mapping}", f"found:    {digest}"),
            help=f"give the mapping with --mapping, or use ckptc {plan.made.ckptc}, which made the plan",
        )
    choices = plan.choices
    # Text is an expression. What is 0 is no size that can be given: it is computed again.
    given: dict[str, Any] = {
        n: repr(v) if isinstance(v, str) else v for n, v in choices.dims.items() if isinstance(v, bool) or v != 0
    }
    options = Options(
        layout=choices.layout, dtype=choices.dtype, multimodal=choices.multimodal, set=given, shards=choices.shards,
        memory=choices.memory, scan_axis=choices.scan_axis,
        pipeline=read_pipeline(choices.pipeline) if choices.pipeline else None,
    )  # fmt: skip
    config = checkpoint.config or model.config
    dims = evaluate_dims(mapping, model, config, given)
    names: dict[str, Any] = {**dims, "config": config, "multimodal": options.multimodal, "dtype": options.dtype}
    dtypes = {name: t.dtype for name, t in checkpoint.tensors.items()}
    _, graph = expand_namings(mapping, options, dims, names, dtypes, decoded(options, config, checkpoint))
    made = {(t.path, t.type.shape, t.type.dtype) for t in graph.targets}
    planned = {(a.path, a.shape, a.dtype) for a in plan.arrays}
    if made != planned:
        other = sorted("/".join(path) for path, _, _ in made ^ planned)
        raise fail(
            "config-changed",
            f"the plan's mapping now gives other arrays; the first is `{other[0]}`",
            help="put config.json back as it was when the plan was made, or compile the plan again",
        )
    return graph
