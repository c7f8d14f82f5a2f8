"""`ckptc export`, and what `compile` and `run` do with plans of exports."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptc.cli import arguments, render
from ckptc.cli.progress import show_progress
from ckptc.diagnostics import fail

if TYPE_CHECKING:
    from ckptc.api import ExportCompilation
    from ckptc.plan.model import Exactness, Plan
    from ckptc.run.export import ExportReport
    from ckptc.storage.checkpoint.orbax_index import PlainIndex

SCHEME = arguments.SCHEME
MEMORY = 1024 * arguments.MIB  # of an export


def add_export(commands: Any) -> None:
    """The parser of `export`."""
    parser = commands.add_parser(
        "export",
        help="turn a MaxText checkpoint into safetensors",
        description="The way back: reads an Orbax checkpoint, converted or trained, and writes what `transformers` "
        "loads. Works from the same mapping; the output appears complete or not at all.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a named model; `ckptc models` lists them (default: what a conversion has noted)",
    )
    parser.add_argument(
        "--source",
        required=True,
        metavar="DIR",
        help="the checkpoint: an output or a run's directory, its `checkpoints` (the last step), a step, or its items",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR|hf://ORG/NAME",
        help="where the safetensors files and config.json go: a directory, or a repository of the Hub, as a new commit",
    )
    parser.add_argument(
        "--public", action="store_true", help="of a repository that is made on the Hub (default: private)"
    )
    compilation(parser)
    parser.add_argument("-o", metavar="PLAN", dest="plan_file", help="write the plan to this file, too")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--dump-plan", action="store_true", help="print the plan as JSON on stdout, and stop there")
    shown.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments.jobs(parser)
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is in the output")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="throw away what an unfinished export has left in the output (default: go on where it stopped)",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def compilation(parser: argparse.ArgumentParser) -> None:
    """What decides an export's plan, beside the model and the source."""
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "float16"],
        help="of floating tensors (default: the original's, else bfloat16)",
    )
    parser.add_argument(
        "--scan",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether layers are stacked (default: what the checkpoint says; another is an error)",
    )
    arguments.scan_axis(
        parser,
        default=None,
        help="the axis of an array that stacked layers are, as MaxText's param_scan_axis (default: what the shapes say)",
    )
    parser.add_argument("--multimodal", action="store_true", help="export the vision and audio towers too")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=arguments.setting,
        metavar="DIM=VALUE",
        help="override a dim of the mapping; may be repeated",
    )
    parser.add_argument("--mapping", metavar="FILE", help="a mapping that is not among the shipped ones")
    _original(parser)
    parser.add_argument(
        "--memory",
        type=arguments.memory,
        default=MEMORY,
        metavar="SIZE",
        help="budget for buffers: boxes read and made, and chunks being decoded, which are held whole (default: 1GiB)",
    )


def _original(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-from",
        metavar="DIR",
        help="the original, or just its config.json and tokenizer, or a checkpoint that was converted from it: its config "
        "decides the dims and is written, its tokenizer and generation files are copied, its tensors' names and dtypes are "
        "kept (default: what the checkpoint itself has kept of it)",
    )
    parser.add_argument(
        "--fill-from",
        metavar="DIR|hf://…",
        help="a checkpoint, the original as a rule, whose tensors are copied bit for bit where the target has no place for "
        "them: towers of a text model (default: --config-from, where it holds the weights, too)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=arguments.size,
        metavar="SIZE",
        help="bytes of tensors in a file at most, unless one tensor is larger (default: 5GB)",
    )


def compilation_too(parser: argparse.ArgumentParser) -> None:
    """The options that `compile` has for exports besides its own."""
    parser.add_argument(
        "--export",
        action="store_true",
        help="plan the way back: --source is an Orbax checkpoint, options mean what they mean to `ckptc export`",
    )
    _original(parser)
    # What nobody has set has other defaults in either direction.
    parser.set_defaults(scan=None, dtype=None, memory=None, param_scan_axis=None)


def compiled(args: argparse.Namespace, compilation: ExportCompilation) -> Plan:
    """The plan of an export, from the options of `export` or of `compile --export`."""
    from ckptc.api.compilation import SHARD

    return compilation.plan(
        args.model,
        mapping=args.mapping,
        config_from=args.config_from,
        fill_from=args.fill_from,
        scan=args.scan,
        dtype=args.dtype,
        multimodal=args.multimodal,
        set=dict(args.set),
        scan_axis=args.param_scan_axis,
        memory=args.memory,
        max_shard_size=args.max_shard_size or SHARD,
        on_step=lambda said: render.say_step(Path(args.source), said),
    )


def export(args: argparse.Namespace) -> None:
    from ckptc.api import ExportCompilation

    with ExportCompilation(args.source, chunks=not args.dump_plan) as compilation:  # before anything else is loaded
        plan = compiled(args, compilation)
    from ckptc.plan.json import dumps
    from ckptc.plan.on_disk import write_plan

    text = dumps(plan)
    if args.plan_file:
        write_plan(Path(args.plan_file), text, args.force)
    if args.dump_plan:
        sys.stdout.write(text)
        return
    if not args.json and not args.quiet:
        print(summary(plan) + "\n")
    execute(plan, json.loads(text)["digest"], args, Path(args.source), compilation.companions, compilation.plain)


def execute(
    plan: Plan,
    digest: str,
    args: argparse.Namespace,
    source: Path | None,
    companions: Path | None,
    plain: PlainIndex | None = None,
) -> None:
    """Runs an export's plan, and says what it did. `plain`: where chunks lie, if that is known."""
    from ckptc import api
    from ckptc.compile.export import RANDOM
    from ckptc.run.export import ExportReport
    from ckptc.storage.sink import hub

    name = hub.target(args.output) if args.output.startswith(SCHEME) else None
    output = Path(args.output) if name is None else hub.staging(digest)
    if name is not None:
        hub.prepare(name, args.public, args.force)
    elif getattr(args, "public", False):  # `run` has no such option
        raise fail(
            "unused-option", "--public is for an --output on the Hub", help="leave it out, or give hf://ORG/NAME"
        )
    with show_progress(enabled=not args.quiet and not args.json) as on_progress:
        report = api.run(
            plan,
            output,
            source=source,
            config_from=companions,
            fill_from=args.fill_from,
            jobs=args.jobs,
            restart=args.restart,
            force=args.force or name is not None,
            on_progress=on_progress,
            plain=plain,
        )
    assert isinstance(report, ExportReport)
    for note in (n for n in plan.notes if n.startswith(RANDOM)):  # quiet or not: the loss shows much later
        print(f"warning: {note.removeprefix(RANDOM)}", file=sys.stderr)
    if name is not None:
        made = plan.made
        text = hub.card(made.model, made.repo, made.family, digest, _shown_source(source), exact_line(plan), plan.notes)
        report = replace(report, output=hub.send(output, name, text, f"{made.model}, exported by ckptc"))
    if args.json:
        record = {
            **asdict(report),
            "model": plan.made.model,
            "tensors": plan.totals.arrays,
            "exact": _exact_count(plan),
            "plan": digest,
        }
        print(json.dumps(record))
        return
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    rate = report.write_bytes / max(report.seconds, 1e-9)
    print(
        f"{plan.made.model}: {plan.totals.arrays} tensors, {render.size(report.write_bytes)} written to {report.output} "
        f"in {report.seconds:.1f} s ({render.size(rate)}/s), {render.size(report.read_bytes)} decoded, "
        f"peak memory {render.size(report.peak_resident_bytes)}"
    )
    print(_checked(report))


def _shown_source(source: Path | None) -> str:
    return f"an Orbax checkpoint, `{source.name}`" if source is not None else "an Orbax checkpoint"


def _checked(report: ExportReport) -> str:
    """What was compared with checksums, and what could not be."""
    if not report.checksums:
        return "the checkpoint has no checksums to compare"
    have = f"{report.checksums} arrays have the checksums they were written with"
    return have + (f"; {report.without_checksum} have none to compare" if report.without_checksum else "")


def summary_record(plan: Plan) -> dict[str, Any]:
    """The summary as `compile --export --json` prints it."""
    from msgspec import to_builtins

    body = to_builtins(plan)
    return {
        **{k: body[k] for k in ("made", "choices", "totals", "left_out")},
        "outputs": {
            "files": body["layout"]["files"],
            "companions": body["layout"].get("companions", []),
            "padding": body.get("padding", []),
            "notes": body.get("notes", []),
        },
        "rules": _rules(plan),
    }


def summary(plan: Plan) -> str:
    """What an export would do: bytes, memory, what is left out, and for each rule whether it is exact."""
    from ckptc.plan.model import Safetensors

    t, c, m, layout = plan.totals, plan.choices, plan.made, plan.layout
    assert isinstance(layout, Safetensors)
    files = len(layout.files)
    lines = [
        f"{m.model} ({m.family}), {render.layout(c)}, to {c.dtype}" + (", multimodal" if c.multimodal else ""),
        f"reads   {render.size(t.read_bytes)} of {t.tensors} arrays, decoded chunks counted as often as they are read",
        f"writes  {render.size(t.write_bytes)} in {t.arrays} tensors, {render.count(t.parameters)} parameters, "
        f"{files} file{'s' if files != 1 else ''}",
        f"memory  {render.size(t.peak_memory_bytes)} for each worker, within a budget of {render.size(c.memory)}",
        f"exact   {exact_line(plan)}",
    ]
    for x in plan.left_out:
        what = (
            f"skips   {x.tensors} array{'s' if x.tensors != 1 else ''}"
            if x.tensors
            else "omits   what conversions ignore"
        )
        lines.append(f"{what}: `{x.pattern}`: {x.reason}")
    lines += [f"checks  {p.rows} rows of padding of `{plan.tensors[p.tensor].name}`" for p in plan.padding]
    lines += [f"note    {note}" for note in plan.notes]
    heading = ("RULE", "TENSORS", "BYTES", "FIRST", "EXACTNESS")
    rows = [
        (r["rule"], str(r["tensors"]), render.size(r["write_bytes"]), f"{r['dtype']}{r['shape']}", r["exactness"])
        for r in _rules(plan)
    ]
    return "\n".join([*lines, "", render.table([heading, *rows])])


def exact_line(plan: Plan) -> str:
    exact = _exact_count(plan)
    if exact == plan.totals.arrays:
        return "every tensor that was not trained since it was converted comes back bit for bit"
    count = f"{exact} of {plan.totals.arrays} tensors"
    return f"{count} come back bit for bit, if they were not trained since; the others are rounded"


def _exact_count(plan: Plan) -> int:
    return sum(_exact(plan.kinds[o.kind].exactness) for o in plan.outputs)


def _exact(x: Exactness | None) -> bool:
    return x is None or x.above == 0


def exactness(x: Exactness | None) -> str:
    """In words: `exact`, `exact above 3.06e-05, else within 0.00391 relative + 5.99e-08 absolute`."""
    if x is None or _exact(x):
        return "exact"
    bounds = [f"{x.relative:.3g} relative"] if x.relative else []
    bounds += [f"{x.absolute:.3g} absolute"] if x.absolute else []
    bound = "within " + " + ".join(bounds)
    return bound if x.above is None else f"exact above {x.above:.3g}, else {bound}"


def _rules(plan: Plan) -> list[dict[str, Any]]:
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for kind, count in Counter(o.kind for o in plan.outputs).items():
        k = plan.kinds[kind]
        shown = exactness(k.exactness)
        record = out.setdefault(
            (k.rule, shown),
            {
                "rule": k.rule,
                "tensors": 0,
                "shape": list(k.shape),
                "dtype": k.dtype,
                "ops": list(k.ops),
                "write_bytes": 0,
                "exactness": shown,
            },
        )
        record["tensors"] += count
        record["write_bytes"] += k.nbytes * count
    return list(out.values())
