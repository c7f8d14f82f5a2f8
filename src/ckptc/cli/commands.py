"""What each command does: inputs read, stages called, results rendered."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptc import api
from ckptc.cli import export, processes, render
from ckptc.cli.progress import show_progress
from ckptc.cli.unused import refuse_scan_axis, refuse_unused
from ckptc.compile.compiler import compile_unproved
from ckptc.compile.options import Options
from ckptc.diagnostics import fail
from ckptc.plan import json as plan_json
from ckptc.plan.division import balance
from ckptc.plan.model import Orbax, Plan, Safetensors
from ckptc.plan.on_disk import read_plan, write_plan
from ckptc.spec.halves.expanded import expanded
from ckptc.spec.mapping import TARGET, Family, find_model, load_mapping, shipped
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from ckptc.storage.source.base import Source, opened
from ckptc.storage.source.hub import Repository
from ckptc.storage.source.hub_client import SCHEME

if TYPE_CHECKING:
    from ckptc.run.coordinator import Alone
    from ckptc.run.verify import Verified


def models(args: argparse.Namespace) -> None:
    if args.expanded or args.target:
        _expanded(args)
        return
    mappings = _mappings(args.mapping)
    if args.name:
        mapping, model = find_model(args.name, mappings)
        shown = render.model_record(mapping, model)
        print(json.dumps(shown, indent=1) if args.json else render.model(shown))
        return
    rows = [render.model_row(m, model) for m in mappings or shipped() for model in m.models.values()]
    print(json.dumps(rows, indent=1) if args.json else render.models(rows))


def _expanded(args: argparse.Namespace) -> None:
    """Prints a family as explicit rules."""
    if not args.expanded or not args.name:
        option = "--expanded" if args.expanded else "--target"
        raise fail("unused-option", f"{option} is of a family", help="use `ckptc models NAME --expanded`")
    target = args.target or TARGET
    mappings = (load_mapping(Path(args.mapping), target=target),) if args.mapping else None
    document = find_model(args.name, mappings, target)[0].document
    print(json.dumps(document.data, indent=1) if args.json else expanded(document), end="\n" if args.json else "")


def compile_(args: argparse.Namespace) -> None:
    refuse_unused(args, "export" if args.export else "import")
    if args.unproved:
        _unproved(args)
        return
    plan = _compile_export(args) if args.export else _compile(args, opened(args.source) if args.source else None)
    if args.num_processes and isinstance(plan.layout, Safetensors):
        raise fail("not-divided", "an export is the work of one process")
    text = plan_json.dumps(plan)
    if args.plan_file:
        write_plan(Path(args.plan_file), text, args.force)
    if args.dump_plan:
        sys.stdout.write(text)
    elif args.json:
        record = export.summary_record(plan) if args.export else render.summary_record(plan, meaning(args, plan))
        if args.num_processes:
            record["processes"] = asdict(balance(plan, args.num_processes))
        print(json.dumps(record, indent=1))
    else:
        print(export.summary(plan) if args.export else render.summary(plan, meaning(args, plan)))
        if args.num_processes:
            print(f"\n{render.balance(balance(plan, args.num_processes))}")
        if args.plan_file:
            # Made without a checkpoint, a plan is to be read and compared; there are no bytes to run it on.
            runs = f"; `ckptc run {args.plan_file} --output DIR` executes it" if plan.source else ""
            print(f"\nplan written to {args.plan_file}{runs}")


def meaning(args: argparse.Namespace, plan: Plan) -> str:
    """What is proved of a plan, for people."""
    from ckptc.prove.record import said

    return said(
        *api.find(args.model, args.mapping),
        Path(args.mapping) if args.mapping else None,
        headers=plan.source is not None,
    )


def run(args: argparse.Namespace) -> None:
    with processes.peers(args) as peers:
        plan, text = read_plan(Path(args.plan))
        refuse_unused(args, "export" if isinstance(plan.layout, Safetensors) else "import")
        if isinstance(plan.layout, Orbax):
            _execute(plan, text, args, opened(args.source) if args.source else None, peers)
            return
        source = Path(args.source) if args.source else None
        if args.distributed or args.coordinator:
            raise fail("not-divided", "an export is the work of one process", help="leave out the options of several")
    if "://" in args.output:
        raise fail("unsupported-url", "an export is written to a directory", help="give one with --output")
    companions = Path(args.config_from) if args.config_from else None
    export.execute(plan, json.loads(text)["digest"], args, source, companions)


def convert(args: argparse.Namespace) -> None:
    with processes.peers(args) as peers:
        # Without one, the repository in which the model is published.
        source = opened(args.source or f"{SCHEME}{api.find(args.model, args.mapping)[1].repo}")
        plan = _compile(args, source)
        _execute(plan, plan_json.dumps(plan), args, source, peers)


def _mappings(file: str | None) -> tuple[Family, ...] | None:
    return (load_mapping(Path(file)),) if file else None


def _unproved(args: argparse.Namespace) -> None:
    """Prints what a compile takes on trust."""
    if args.export or args.dump_plan or args.plan_file:
        raise fail(
            "unused-option", "--unproved prints a list and makes no plan", help="give it with --model and --source"
        )
    mapping, model = find_model(args.model, _mappings(args.mapping))
    checkpoint = open_checkpoint(opened(args.source)) if args.source else None
    layout = "unscanned" if args.scan is False else "scanned"
    options = Options(layout, args.dtype or "bfloat16", args.multimodal, dict(args.set))
    found = compile_unproved(mapping, model, options, checkpoint)
    if args.json:
        print(json.dumps([asdict(u) for u in found], indent=1))
        return
    rows = [(u.rule, str(u.arrays), u.tensor, u.reason) for u in found]
    print(render.table([("RULE", "ARRAYS", "TENSOR", "NOT PROVED"), *rows]) if rows else "nothing is taken on trust")


def _compile(args: argparse.Namespace, source: Source | None) -> Plan:
    def say(found: Source) -> None:
        if isinstance(found, Repository):
            _say_source(args, found)

    refuse_scan_axis(args)
    return api.compile(
        args.model,
        source,
        mapping=args.mapping,
        scan=args.scan is not False,
        dtype=args.dtype or "bfloat16",
        multimodal=args.multimodal,
        set=dict(args.set),
        shards=args.shards or 16,
        mesh=args.mesh,
        rules=args.rules,
        compression=args.compression or "none",
        memory=args.memory,
        link=args.link,
        scan_axis=1 if args.param_scan_axis is None else args.param_scan_axis,
        pipeline=args.pipeline,
        on_source=say,
    )


def _say_source(args: argparse.Namespace, source: Repository) -> None:
    """Which commit is read, and what it took to know all of its tensors."""
    if source.note:
        print(f"note: {source.note}", file=sys.stderr)
    if not (args.json or getattr(args, "quiet", False) or getattr(args, "dump_plan", False)):
        requests = source.client.requests
        asked = f"{requests} request{'s' if requests != 1 else ''}" if requests else "no request"
        print(f"source  {source}, known after {asked}")


def _compile_export(args: argparse.Namespace) -> Plan:
    if not args.source:
        raise fail("unknown-source", "an export is compiled for a checkpoint", help="say which one with `--source DIR`")
    if args.mesh is not None or args.rules is not None:
        raise fail("bad-mesh", "an export is of whole tensors", help="leave out --mesh and --rules")
    if args.pipeline is not None:
        raise fail("bad-pipeline", "an export finds out how layers are pipelined", help="leave out --pipeline")
    if args.link:
        raise fail("cannot-link", "an export writes files of its own", help="leave out --link")
    with api.ExportCompilation(args.source) as compilation:
        return export.compiled(args, compilation)


def _execute(plan: Plan, text: str | bytes, args: argparse.Namespace, source: Source | None, peers: Alone) -> None:
    from ckptc.cli import verify
    from ckptc.run.runner import Report

    digest: str = json.loads(text)["digest"]
    if getattr(args, "cache", False):
        _fill_cache(plan, args, source)
    verified: list[Verified] = []
    with show_progress(enabled=not args.quiet and not args.json) as on_progress:
        report = api.run(
            plan,
            args.output,
            source=source,
            jobs=args.jobs,
            restart=args.restart,
            force=args.force,
            check_source=args.check_source,
            verify=args.verify,
            mapping=args.mapping,
            on_progress=on_progress,
            on_verified=verified.append,
            peers=peers,
        )
    assert isinstance(report, Report)
    record: dict[str, Any] = {
        **asdict(report),
        "model": plan.made.model,
        "arrays": plan.totals.arrays,
        "plan": digest,
        "verified": bool(verified),
    }
    print(json.dumps(record) if args.json else render.report(plan, report))
    if verified and not args.json:
        print(verify.line(verified[0], "source"))
    if render.orbax(plan).mesh and not report.process and not args.json:
        print(render.restoring(plan, report.output))


def _fill_cache(plan: Plan, args: argparse.Namespace, source: Source | None) -> None:
    """Downloads the plan's files into the Hub's cache first."""
    from ckptc.run.runner import find_source

    found = find_source(plan, source)
    if not isinstance(found, Repository):
        help = "leave it out"
        raise fail("unused-option", f"--cache is for a source on the Hub, and {found} is none", help=help)

    def say(name: str) -> None:
        if not args.quiet and not args.json:
            print(f"fetches {name}", file=sys.stderr)

    found.fetch([f.name for f in plan.sources[0].files], say)
