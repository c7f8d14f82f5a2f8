"""`ckptc explain MODEL TENSOR`: which rows of which tensor become which part of which array, by which rule."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptc.cli import render
from ckptc.diagnostics import InputError, Span, fail, nearest
from ckptc.ir.source import Checkpoint
from ckptc.plan.kinds import Array
from ckptc.plan.model import Plan
from ckptc.plan.trace import shown, trace
from ckptc.spec.mapping import find_model, load_mapping

OUTPUTS = 20  # that are shown, of all that match
PIECES = 12  # of one output


def explain_tensor(args: argparse.Namespace) -> None:
    """Prints what is done with the source tensors or target arrays whose names match. Raises `no-match`."""
    from ckptc.compile.compiler import compile_plan
    from ckptc.compile.options import Options
    from ckptc.storage.checkpoint.safetensors import open_checkpoint
    from ckptc.storage.source.base import opened

    mappings = (load_mapping(Path(args.mapping)),) if args.mapping else None
    mapping, model = find_model(args.code, mappings)
    checkpoint = open_checkpoint(opened(args.source)) if args.source else None
    layout = "unscanned" if args.scan is False else "scanned"
    options = Options(layout=layout, multimodal=args.multimodal, set=dict(args.set))
    plan = compile_plan(mapping, model, options, checkpoint)
    places = _places(plan, mapping, model, checkpoint)
    found = [record(plan, array, args.tensor, places.get(array.name)) for array in matching(plan, args.tensor)]
    if not found:
        names = [*(a.name for a in plan.arrays), *(t.name for t in plan.tensors)]
        best = nearest(args.tensor, names)
        help = f"did you mean `{best}`?" if best else "a name may have stars: `*q_proj*`"
        raise fail("no-match", f"{model.name} has no tensor and no array `{args.tensor}`", help=help)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print("\n\n".join(map(text, found[:OUTPUTS])))
    if len(found) > OUTPUTS:
        print(f"\nand {len(found) - OUTPUTS} arrays more; --json has all", file=sys.stderr)


def _places(plan: Plan, mapping: Any, model: Any, checkpoint: Checkpoint | None) -> dict[str, Span]:
    """Of each array, where its rule stands."""
    from ckptc.compile.recompile import recompiled_graph

    try:
        graph = recompiled_graph(plan, mapping, model, checkpoint or Checkpoint((), {}, model.config))
    except InputError:  # codes that only headers tell of
        return {}
    return {"/".join(t.path): t.span for t in graph.targets}


def matching(plan: Plan, pattern: str) -> Iterator[Array]:
    """The outputs whose names match, or that read a tensor whose name does."""
    wanted = {n for n, t in enumerate(plan.tensors) if fnmatch.fnmatchcase(t.name, pattern)}
    for array in plan.arrays:
        named = fnmatch.fnmatchcase(array.name, pattern) or fnmatch.fnmatchcase(array.name, f"*/{pattern}")
        if named or not all(wanted.isdisjoint(s.tensors) for s in array.sources):
            yield array


def record(plan: Plan, array: Array, pattern: str, span: Span | None) -> dict[str, Any]:
    """One output: its rule, ops and pieces; of a pattern of tensors, the pieces of those alone."""
    shapes = {n: s.stored.shape for s in array.sources for n in s.tensors}
    pieces: list[dict[str, Any]] = []
    for piece in trace(array):
        if piece.tensor is None:
            pieces.append({"value": piece.value, "becomes": shown(piece.output, array.shape)})
            continue
        tensor = plan.tensors[piece.tensor]
        one = {
            "tensor": tensor.name,
            "reads": shown(piece.source, shapes[piece.tensor]),
            "becomes": shown(piece.output, array.shape),
        }
        if tensor.file >= 0:
            file = plan.sources[tensor.source].files[tensor.file].name
            one["bytes"] = f"{tensor.begin} to {tensor.end} of {file}"
        pieces.append(one)
    of_tensors = [p for p in pieces if "tensor" in p and fnmatch.fnmatchcase(p["tensor"], pattern)]
    return {
        "array": array.name,
        "dtype": array.dtype,
        "shape": list(array.shape),
        "axes": list(array.axes),
        "rule": array.rule,
        "place": f"{span.file}:{span.line}:{span.column}" if span else None,
        "ops": list(array.ops),
        "pieces": of_tensors or pieces,
    }


def text(found: dict[str, Any]) -> str:
    axes = " ".join(a or "·" for a in found["axes"])
    lines = [f"{found['array']}  {found['dtype']}{found['shape']}" + (f"  {axes}" if axes else "")]
    lines.append(f"  rule  {found['rule']}" + (f"  ({found['place']})" if found["place"] else ""))
    lines += [f"  {'ops' if not n else '':5} {op}" for n, op in enumerate(found["ops"] or ["as it is"])]
    rows = [("TENSOR", "READS", "BECOMES", "BYTES")]
    rows += [
        (p.get("tensor", f"the value {p.get('value')}"), p.get("reads", ""), p["becomes"], p.get("bytes", ""))
        for p in found["pieces"][:PIECES]
    ]
    lines += [f"  {line}" for line in render.table(rows).splitlines()]
    if len(found["pieces"]) > PIECES:
        lines.append(f"  and {len(found['pieces']) - PIECES} pieces more")
    return "\n".join(lines)
