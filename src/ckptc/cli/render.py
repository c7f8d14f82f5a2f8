"""Records as text a person reads."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptc.diagnostics import Diagnostic, Span
from ckptc.spec.resources import shipped_file

if TYPE_CHECKING:
    from ckptc.plan.division import Balance
    from ckptc.plan.model import Choices, Orbax, Plan
    from ckptc.run.runner import Report
    from ckptc.spec.mapping import Family, Model

RED, BLUE, BOLD, CYAN, RESET = "\033[1;31m", "\033[1;34m", "\033[1m", "\033[36m", "\033[0m"
LINE_MOST = 160  # characters of a source line that are shown, around what is underlined
MOST = 100  # diagnostics that are shown: a file that is something else has thousands
TEXT_MOST = 2000  # characters of a message, note or help: names in a checkpoint may be of any length


def diagnostics(found: Sequence[Diagnostic], color: bool = False) -> str:
    """All of them, up to MOST, each with its place in the file, and a count at the end."""
    blocks = [diagnostic(d, color) for d in found[:MOST]]
    count = f"{len(found)} error{'s' if len(found) != 1 else ''}"
    if len(found) > MOST:
        count += f", the first {MOST} are shown"
    return "\n\n".join([*blocks, count])


def diagnostic(d: Diagnostic, color: bool = False) -> str:
    def paint(text: str, code: str) -> str:
        return f"{code}{text}{RESET}" if color else text

    lines = [paint(f"error[{d.code}]", RED) + paint(f": {_safe(d.message)}", BOLD)]
    margin = 1
    if d.span:
        s = d.span
        margin = len(str(s.line))
        lines.append(" " * margin + paint("--> ", BLUE) + f"{_safe(s.file)}:{s.line}:{s.column}")
        source = _line(s.file, s.line)
        if source is not None:
            bar = paint("|", BLUE)
            shown, before, marked = _around(source, s.column - 1, s.length)
            lines += [
                f"{' ' * margin} {bar}",
                f"{paint(str(s.line), BLUE)} {bar} {shown}".rstrip(),
                f"{' ' * margin} {bar} {' ' * before}{paint('^' * marked, RED)}",
            ]
        lines += [line for what, other in s.also for line in _also(what, other, margin, paint)]
    equals = paint("=", BLUE)
    lines += [f"{' ' * margin} {equals} {_safe(note)}" for note in d.notes]
    if d.help:
        lines.append(f"{' ' * margin} {equals} {paint('help', CYAN)}: {_safe(d.help)}")
    return "\n".join(lines)


def say_step(given: Path, said: str) -> None:
    """On stderr, which of several steps is read."""
    if said:
        print(_safe(f"note: {given}: reads step {said}"), file=sys.stderr)


def _also(what: str, span: Span, margin: int, paint: Callable[[str, str], str]) -> list[str]:
    """Another place that led to a problem: who uses a shared part, or the other half of a rule."""
    lines = [" " * margin + paint("::: ", BLUE) + f"{_safe(span.file)}:{span.line}:{span.column}: {_safe(what)}"]
    source = _line(span.file, span.line)
    if source is not None:
        bar, number = paint("|", BLUE), str(span.line).rjust(margin)
        lines.append(f"{paint(number, BLUE)} {bar} {_around(source, span.column - 1, span.length)[0].strip()}".rstrip())
    return lines + [line for inner, other in span.also for line in _also(inner, other, margin, paint)]


def _safe(text: str) -> str:
    """On one line, with nothing that a terminal would obey: names come from files that anyone may have written."""
    text = text if len(text) <= TEXT_MOST else text[: TEXT_MOST - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _around(line: str, start: int, length: int) -> tuple[str, int, int]:
    """What is shown of a line, the columns of a terminal before the underlined characters, and their columns."""
    first = 0 if start + length <= LINE_MOST else max(0, min(start - LINE_MOST // 3, len(line) - LINE_MOST))
    part = line[first : first + LINE_MOST]
    lead, tail = "…" if first else "", "…" if first + LINE_MOST < len(line) else ""
    before, marked = part[: start - first], part[start - first : start - first + length]
    return lead + part + tail, len(lead) + _columns(before), max(1, _columns(marked))


def _columns(text: str) -> int:
    """Columns of a terminal: two for a wide character, none for one that combines with the character before it."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _line(file: str, number: int) -> str | None:
    """A line of a file that diagnostics name: a shipped file by its path from `mappings`, or any by its own."""
    first, *rest = Path(file).parts or ("",)
    shipped = shipped_file(*rest) if first == "mappings" and rest else None
    try:
        path = shipped if shipped is not None and shipped.is_file() else Path(file)
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except (OSError, ValueError):
        return None
    # Reading has made every line break one that YAML and JSON count. str.splitlines knows more.
    lines = text.split("\n")
    return "".join(c if c.isprintable() else " " for c in lines[number - 1]) if 0 < number <= len(lines) else None


def size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.0f} TB" if count >= 100 else f"{count:.3g} TB"


def count(number: int) -> str:
    """A number of parameters: 2.61B."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit * 0.9995:  # three digits of it round up to the unit
            return f"{number / limit:.3g}{unit}" if number < 999.5 * limit else f"{number / limit:.0f}{unit}"
    return str(number)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by their widest cell; the first row is the heading."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def model_row(mapping: Family, model: Model) -> dict[str, Any]:
    """One model, as `ckptc models --json` lists it."""
    from ckptc.compile.compiler import layouts

    row = {
        "name": model.name,
        "family": mapping.family,
        "repo": model.repo,
        "layouts": list(layouts(mapping, model)),
    }
    return {**row, "multimodal": mapping.multimodal}


def models(rows: Sequence[dict[str, Any]]) -> str:
    heading = ("MODEL", "FAMILY", "REPOSITORY", "LAYOUTS")
    cells = [
        (
            r["name"],
            r["family"],
            r["repo"],
            ", ".join(r["layouts"]) + (" (multimodal)" if r["multimodal"] else ""),
        )
        for r in rows
    ]
    return table([heading, *cells])


def model_record(mapping: Family, model: Model) -> dict[str, Any]:
    """One model whole, compiled from its shipped numbers in the first layout it has."""
    from ckptc.compile.compiler import compile_plan, layouts
    from ckptc.compile.options import Options
    from ckptc.ops.codes import CODES

    plan = compile_plan(mapping, model, Options(layout=layouts(mapping, model)[0]))
    return {
        **model_row(mapping, model),
        "title": mapping.title,
        "decodes": sorted(CODES),
        "dims": dict(plan.choices.dims),
        "tensors": plan.totals.tensors,
        "arrays": plan.totals.arrays,
        "parameters": plan.totals.parameters,
        "write_bytes": plan.totals.write_bytes,
        "rules": rules(plan),
        "ignored": [{"pattern": x.pattern, "reason": x.reason} for x in plan.left_out],
    }


def model(record: dict[str, Any]) -> str:
    counts = f"{count(record['parameters'])} parameters, {record['tensors']} source tensors, {record['arrays']} arrays"
    head = [
        f"{record['name']}: {record['title'] or record['family']}",
        f"repository  {record['repo']}",
        f"layouts     {', '.join(record['layouts'])}",
        f"decodes     {', '.join(record['decodes'])}",
        f"size        {counts}, {size(record['write_bytes'])}",
        "dims        " + ", ".join(f"{k}={v}" for k, v in record["dims"].items()),
    ]
    ignored = [f"ignored     {x['pattern']}: {x['reason']}" for x in record["ignored"]]
    return "\n".join([*head, *ignored, "", _rules(record["rules"])])


def orbax(plan: Plan) -> Orbax:
    """The layout of a plan whose outputs become an Orbax checkpoint."""
    from ckptc.plan.model import Orbax

    assert isinstance(plan.layout, Orbax)
    return plan.layout


def rules(plan: Plan) -> list[dict[str, Any]]:
    """One record for each rule that made arrays, in the order of the mapping's targets."""
    from ckptc.plan.links import linked_bytes

    layout = orbax(plan)
    out: dict[str, dict[str, Any]] = {}
    for array in plan.arrays:
        record = out.setdefault(
            array.rule,
            {
                "rule": array.rule,
                "arrays": 0,
                "tensors": 0,
                "shape": list(array.shape),
                "dtype": array.dtype,
                "ops": list(array.ops),
                "write_bytes": 0,
                **({"spec": [list(over) for over in array.spec]} if layout.mesh else {}),
                **({"linked_bytes": 0} if layout.link else {}),
            },
        )
        record["arrays"] += 1
        record["tensors"] += sum(len(s.tensors) for s in array.sources)
        record["write_bytes"] += array.nbytes
        if layout.link:
            record["linked_bytes"] += linked_bytes(array.kind)
    return list(out.values())


def _rules(records: Sequence[dict[str, Any]]) -> str:
    meshed = any("spec" in r for r in records)
    links = any("linked_bytes" in r for r in records)
    optional = (*(["LINKED"] if links else []), "TARGET", *(["SHARDED OVER"] if meshed else []))
    heading = ("RULE", "ARRAYS", "TENSORS", "BYTES", *optional, "OPS")
    rows = [
        (
            r["rule"],
            str(r["arrays"]),
            str(r["tensors"]),
            size(r["write_bytes"]),
            *((size(r["linked_bytes"]) if r["linked_bytes"] else "-",) if links else ()),
            f"{r['dtype']}{r['shape']}",
            *([_over(r["spec"])] if meshed else []),
            "; ".join(r["ops"]) or "as it is",
        )
        for r in records
    ]
    return table([heading, *rows])


def _over(spec: Sequence[Sequence[str]]) -> str:
    """`fsdp, -, tensor`: of each axis, the mesh axes; nothing where each device has all."""
    return ", ".join("*".join(over) or "-" for over in spec) if any(spec) else "nothing"


def _mesh(plan: Plan) -> list[str]:
    """The mesh, how arrays lie on it, and what does not divide."""
    mesh = orbax(plan).mesh
    if not mesh:
        return []
    sharded = [a for a in plan.arrays if any(a.spec)]
    held = sum(a.nbytes // prod(a.shards) for a in plan.arrays)
    lines = [
        f"mesh    {', '.join(f'{name}={n}' for name, n in mesh)}: {prod(n for _, n in mesh)} devices, "
        f"{len(sharded)} arrays sharded, {len(plan.arrays) - len(sharded)} whole on each, {size(held)} a device"
    ]
    sizes, uneven = dict(mesh), Counter[str]()
    for a in plan.arrays:
        for axis, n, names in zip(a.axes, a.shape, a.kind.indivisible, strict=False):
            uneven.update(f"axis {axis}={n} is not divided by {name}={sizes[name]}" for name in names)
    return lines + [
        f"uneven  {text} in {n} array{'s' if n != 1 else ''}: not sharded over it; JAX refuses to shard such a parameter"
        for text, n in uneven.items()
    ]


def summary_record(plan: Plan, meaning: str = "") -> dict[str, Any]:
    """The summary, as `ckptc compile --json` prints it."""
    from msgspec import to_builtins

    body = to_builtins(plan)
    return {
        **{k: body[k] for k in ("made", "choices", "layout", "totals", "left_out")},
        "decoded": dict(decoded(plan)),
        "rules": rules(plan),
        **({"proved": meaning} if meaning else {}),
    }


def layout(choices: Choices) -> str:
    """Where layers lie: the layout, and what of MaxText's settings is not as usual."""
    axis = f", param_scan_axis {choices.scan_axis}" if choices.scan_axis != 1 else ""
    return choices.layout + axis + (f", pipeline of {choices.pipeline}" if choices.pipeline else "")


def summary(plan: Plan, meaning: str = "") -> str:
    """What a run would do: counts, bytes, memory, what is proved and left out, one line for each rule."""
    t, c, m, stored = plan.totals, plan.choices, plan.made, orbax(plan)
    source = (
        f"{len(plan.sources[0].files)} files"
        if plan.source
        else "the model's shipped numbers; compile with --source to check a checkpoint and get a plan that runs"
    )
    written = size(t.write_bytes)
    if t.linked_bytes:
        written = f"{size(t.write_bytes - t.linked_bytes)} of {written}"
    lines = [
        f"{m.model} ({m.family}), {layout(c)}, {c.dtype}" + (", multimodal" if c.multimodal else ""),
        f"from    {source}" + (f", naming `{c.naming}`" if plan.source and c.naming != "hub" else ""),
        f"reads   {size(t.read_bytes)} of {t.tensors} tensors"
        + (f", {size(t.reread_bytes)} of it again" if t.reread_bytes else ""),
        f"writes  {written} in {t.arrays} arrays, {count(t.parameters)} parameters"
        + (f", compressed: {stored.compression}" if stored.compression != "none" else ""),
        f"memory  {size(t.peak_memory_bytes)} for each worker, within a budget of {size(c.memory)}",
        *_mesh(plan),
        *([f"proof   {meaning}"] if meaning else []),
    ]
    lines += [f"decodes {n} weight{'s' if n != 1 else ''} stored as {code}" for code, n in decoded(plan)]
    lines += _links(plan)
    for x in plan.left_out:
        if x.tensors:
            lines.append(
                f"ignores {x.tensors} tensor{'s' if x.tensors != 1 else ''}, {size(x.bytes)}: `{x.pattern}`: {x.reason}"
            )
    return "\n".join([*lines, "", _rules(rules(plan))])


def decoded(plan: Plan) -> list[tuple[str, int]]:
    """How the source stores weights as codes, as people say it, and how many it stores so."""
    from ckptc.ops.codes import code_of

    found = defaultdict[str, set[int]](set)
    for s in (s for a in plan.arrays for s in a.sources):
        if d := s.stored.decode:
            found[code_of(d.code, d.settings).describe()].update(s.tensors)
    return [(code, len(tensors)) for code, tensors in sorted(found.items())]


def _links(plan: Plan) -> list[str]:
    """What a plan with `--link` does, and what that costs later."""
    if not orbax(plan).link:
        return []
    from ckptc.ops.types import itemsize  # numpy comes with it, which `--help` does not need

    t = plan.totals
    if not t.linked_bytes:
        return ["links   nothing: every array has arithmetic, another dtype, or an order that links cannot say"]
    chunk = max(prod(a.chunk) * itemsize(a.dtype) for a in plan.arrays if a.link is not None)
    return [
        f"links   {size(t.linked_bytes)}: the source's files become part of the checkpoint, as hard links",
        "        Changing them in place afterwards changes the checkpoint; deleting or replacing them does not.",
        f"        A restore reads chunks of up to {size(chunk)} whole and transposes them: 1.5 to 3 times the time; hosts that "
        "shard",
        "        an array along an axis that its chunks are not cut along read all of them.",
    ]


def balance(balance: Balance) -> str:
    """How evenly some processes share the work, and what it makes of the speed."""
    rows: list[tuple[str, ...]] = [("EACH OF", "READS", "AT LEAST", "AT MOST", "WRITES", "AT LEAST", "AT MOST")]
    spreads = [size(x) for s in (balance.read, balance.written) for x in (s.mean, s.least, s.most)]
    rows.append((f"{balance.processes} processes", *spreads))
    scaling = ", ".join(f"{n}: {speed:.3g}" for n, speed in balance.scaling)
    return f"{table(rows)}\ntimes as fast, as far as bytes decide, with processes: {scaling}"


def report(plan: Plan, report: Report) -> str:
    """The line at the end of a run."""
    rate = report.write_bytes / max(report.seconds, 1e-9)
    stored = "an unknown size" if report.stored_bytes is None else size(report.stored_bytes)
    compressed = f" as {stored}" if orbax(plan).compression != "none" else ""
    linked = f", {size(report.linked_bytes)} linked" if report.linked_bytes else ""
    if report.process:
        return (
            f"{plan.made.model}: process {report.process} of {report.processes} has written {size(report.write_bytes)} of "
            f"{report.output} in {report.seconds:.1f} s ({size(rate)}/s), {size(report.read_bytes)} read, "
            f"peak memory {size(report.peak_resident_bytes)}"
        )
    by = f"by {report.processes} processes " if report.processes > 1 else ""
    return (
        f"{plan.made.model}: {plan.totals.arrays} arrays, {size(report.write_bytes)} written{compressed} to {report.output} "
        f"{by}in {report.seconds:.1f} s ({size(rate)}/s), {size(report.read_bytes)} read{linked}, "
        f"peak memory {size(report.peak_resident_bytes)}"
    )


def restoring(plan: Plan, step: str) -> str:
    """The Python that restores a checkpoint as it is sharded."""
    devices = prod(n for _, n in orbax(plan).mesh)
    items = f"{step if '://' in step else os.path.abspath(step)}/items"
    return f"restored on {devices} devices by: orbax.checkpoint.StandardCheckpointer().restore({items!r})"
