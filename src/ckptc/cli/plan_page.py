"""A plan as one page for a browser: sources left, outputs right, what is done between them, sizes as areas.

The page is one file that asks nothing of any server. It holds the plan's rows as they are and makes what is looked at
when it is looked at, so that a plan of tens of thousands of tensors opens at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from ckptc.cli import render
from ckptc.cli.export import exactness
from ckptc.plan.model import Plan, Safetensors
from ckptc.plan.trace import pieces


def page(plan: Plan, proofs: Sequence[tuple[str, bool]] = ()) -> str:
    """The page's text. `proofs`: sentences on what is proved, and whether it is."""
    template = files("ckptc.cli").joinpath("plan_page.html").read_text(encoding="utf-8")
    # In a script element nothing but `</` ends the text, and JSON may escape the slash.
    data = json.dumps(record(plan, proofs), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return template.replace("__DATA__", data)


def record(plan: Plan, proofs: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """What the page's script reads."""
    rules: dict[str, dict[str, Any]] = {}
    for output in plan.outputs:
        kind = plan.kinds[output.kind]
        rule = rules.setdefault(kind.rule, {"name": kind.rule, "outputs": 0, "bytes": 0, "ops": list(kind.ops)})
        rule["outputs"] += 1
        rule["bytes"] += kind.nbytes
    numbers = {name: n for n, name in enumerate(rules)}
    return {
        "title": plan.made.model,
        "facts": _facts(plan),
        "proofs": [list(p) for p in proofs],
        "left_out": [[x.pattern, x.reason, x.tensors] for x in plan.left_out],
        "files": [f.name for s in plan.sources for f in s.files],
        "tensors": [[t.name, t.nbytes, t.file, t.begin] for t in plan.tensors],
        "rules": list(rules.values()),
        "kinds": [_kind(plan, n, numbers) for n in range(len(plan.kinds))],
        "outputs": [{"name": o.name, "kind": o.kind, "tensors": o.tensors, "begins": o.begins} for o in plan.outputs],
    }


def _facts(plan: Plan) -> list[tuple[str, str]]:
    t, c = plan.totals, plan.choices
    to = "safetensors" if isinstance(plan.layout, Safetensors) else "Orbax"
    return [
        ("family", plan.made.family),
        ("to", f"{to}, {c.layout}, {c.dtype}"),
        ("reads", f"{render.size(t.read_bytes)} of {t.tensors:,} tensors"),
        ("writes", f"{render.size(t.write_bytes)} in {t.arrays:,} outputs"),
        ("parameters", render.count(t.parameters)),
        ("memory", f"{render.size(t.peak_memory_bytes)} a worker"),
    ]


def _kind(plan: Plan, number: int, rules: dict[str, int]) -> dict[str, Any]:
    kind, at, sources = plan.kinds[number], 0, []
    for stored in kind.sources:
        sources.append({"dtype": stored.dtype, "shape": stored.shape, "first": at, "count": stored.count})
        at += stored.rows
    return {
        "rule": rules[kind.rule],
        "shape": kind.shape,
        "dtype": kind.dtype,
        "bytes": kind.nbytes,
        "ops": kind.ops,
        "axes": kind.axes,
        "exact": exactness(kind.exactness) if kind.exactness else None,
        "sources": sources,
        "parts": [
            {
                "source": p.source,
                "first": p.first,
                "base": p.base,
                "loops": [[x.size, x.tensors, x.axis, x.weight] for x in p.loops],
                "from": p.extents,
                "to": p.region,
            }
            for p in pieces(kind)
        ],
    }
