"""What each command does: inputs read, stages called, results rendered."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptc.cli import export, processes, render
from ckptc.cli.progress import show_progress
from ckptc.cli.unused import refuse_unused
from ckptc.compile.compiler import compile_plan
from ckptc.compile.mesh import Mesh, read_mesh
from ckptc.compile.options import Options
from ckptc.compile.stacking import read_pipeline
from ckptc.diagnostics import fail
from ckptc.plan import json as plan_json
from ckptc.plan.check import check_plan
from ckptc.plan.division import balance
from ckptc.plan.model import Orbax, Plan, Safetensors
from ckptc.regular import open_file
from ckptc.spec.halves.expanded import expanded
from ckptc.spec.mapping import TARGET, Family, Model, find_model, load_mapping, shipped
from ckptc.spec.rules import load_rules
from ckptc.spec.target import Rules, target_tree
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from ckptc.storage.source.base import Source, opened
from ckptc.storage.source.hub import Repository
from ckptc.storage.source.hub_client import SCHEME
from ckptc.storage.source.remembered import remember

if TYPE_CHECKING:
    from ckptc.run.coordinator import Alone

_PLAN_BEGINS = b'{\n "format":'


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
    plan = _compile_export(args) if args.export else _compile(args, opened(args.source) if args.source else None)
    if args.num_processes and isinstance(plan.layout, Safetensors):
        raise fail("not-divided", "an export is the work of one process")
    text = plan_json.dumps(plan)
    if args.plan_file:
        write_plan(Path(args.plan_file), text, args.force)
    if args.dump_plan:
        sys.stdout.write(text)
    elif args.json:
        record = export.summary_record(plan) if args.export else render.summary_record(plan)
        if args.num_processes:
            record["processes"] = asdict(balance(plan, args.num_processes))
        print(json.dumps(record, indent=1))
    else:
        print(export.summary(plan) if args.export else render.summary(plan))
        if args.num_processes:
            print(f"\n{render.balance(balance(plan, args.num_processes))}")
        if args.plan_file:
            # Made without a checkpoint, a plan is to be read and compared; there are no bytes to run it on.
            runs = f"; `ckptc run {args.plan_file} --output DIR` executes it" if plan.source else ""
            print(f"\nplan written to {args.plan_file}{runs}")


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


def read_plan(path: Path) -> tuple[Plan, bytes]:
    """A plan that can be run, and its text. Raises `unreadable-plan`, and what `loads` and `check_plan` raise."""
    try:
        with open_file(path) as file:
            text = file.read(plan_json.MAX_BYTES + 1)
    except OSError as error:
        raise fail(
            "unreadable-plan", f"cannot read {path}: {error.strerror}", help="`ckptc compile -o PLAN` writes plans"
        ) from None
    plan = plan_json.loads(text, str(path))
    check_plan(plan, str(path))
    return plan, text


def convert(args: argparse.Namespace) -> None:
    with processes.peers(args) as peers:
        # Without one, the repository in which the model is published.
        source = opened(args.source or f"{SCHEME}{find(args)[1].repo}")
        plan = _compile(args, source)
        _execute(plan, plan_json.dumps(plan), args, source, peers)


def _mappings(file: str | None) -> tuple[Family, ...] | None:
    return (load_mapping(Path(file)),) if file else None


def _compile(args: argparse.Namespace, source: Source | None) -> Plan:
    mapping, model = find(args)
    mesh, rules = _mesh(args, mapping)
    options = Options(
        layout="unscanned" if args.scan is False else "scanned",
        dtype=args.dtype or Options().dtype,
        multimodal=args.multimodal,
        set=dict(args.set),
        shards=args.shards,
        mesh=mesh,
        rules=rules,
        compression=args.compression,
        memory=args.memory or Options().memory,
        link=args.link,
        scan_axis=Options().scan_axis if args.param_scan_axis is None else args.param_scan_axis,
        pipeline=read_pipeline(args.pipeline) if args.pipeline else None,
    )
    checkpoint = open_checkpoint(source) if source else None
    if isinstance(source, Repository):
        _say_source(args, source)
    plan = compile_plan(mapping, model, options, checkpoint)
    if plan.source and source and source.local is not None:
        remember(plan.source, source.local)
    return plan


def _say_source(args: argparse.Namespace, source: Repository) -> None:
    """Which commit is read, and what it took to know all of its tensors."""
    if source.note:
        print(f"note: {source.note}", file=sys.stderr)
    if not (args.json or getattr(args, "quiet", False) or getattr(args, "dump_plan", False)):
        requests = source.client.requests
        asked = f"{requests} request{'s' if requests != 1 else ''}" if requests else "no request"
        print(f"source  {source}, known after {asked}")


def _mesh(args: argparse.Namespace, mapping: Family) -> tuple[Mesh, Rules]:
    if args.mesh is None:
        if args.rules is not None:
            raise fail("bad-mesh", "--rules say how a mesh shards, and there is none", help="give one with --mesh")
        return (), ()
    tree = target_tree(mapping.target)
    axes, rules = load_rules(Path(args.rules), tree) if args.rules is not None else (tree.mesh_axes, tree.rules)
    return read_mesh(args.mesh, axes), rules


def _compile_export(args: argparse.Namespace) -> Plan:
    if not args.source:
        raise fail("unknown-source", "an export is compiled for a checkpoint", help="say which one with `--source DIR`")
    if args.mesh is not None or args.rules is not None:
        raise fail("bad-mesh", "an export is of whole tensors", help="leave out --mesh and --rules")
    if args.pipeline is not None:
        raise fail("bad-pipeline", "an export finds out how layers are pipelined", help="leave out --pipeline")
    if args.link:
        raise fail("cannot-link", "an export writes files of its own", help="leave out --link")
    with export.reading(args, chunks=False) as work:
        return export.compiled(args, work)[0]


def find(args: argparse.Namespace) -> tuple[Family, Model]:
    return find_model(args.model, _mappings(args.mapping))


def _execute(plan: Plan, text: str | bytes, args: argparse.Namespace, source: Source | None, peers: Alone) -> None:
    from ckptc.cli import verify
    from ckptc.run.pool import cores
    from ckptc.run.runner import Settings
    from ckptc.run.runner import run as run_plan

    digest: str = json.loads(text)["digest"]
    if getattr(args, "cache", False):
        _fill_cache(plan, args, source)
    settings = Settings(args.jobs or cores(), args.restart, args.force, args.check_source)
    verified = []
    with show_progress(enabled=not args.quiet and not args.json) as on_progress:

        def check(step: Path) -> None:
            verified.append(verify.against_source(plan, step, source, args.mapping, on_progress))

        before_commit = check if args.verify else None
        report = run_plan(plan, digest, args.output, source, on_progress, settings, before_commit, peers)
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
        help = "leave it out: the source is on this machine"
        raise fail("unused-option", f"--cache is for a source on the Hub, and {found} is none", help=help)

    def say(name: str) -> None:
        if not args.quiet and not args.json:
            print(f"fetches {name}", file=sys.stderr)

    found.fetch([f.name for f in plan.sources[0].files], say)


def write_plan(path: Path, text: str, force: bool) -> None:
    """Whole or not at all; replaces an earlier plan, and nothing else unless told to."""
    try:
        _refuse_to_replace(path, force)
        final = Path(os.path.realpath(path))  # the plan that a link points at is replaced, not the link
        descriptor, temporary = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name[:50]}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, final)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        help = None if os.path.lexists(path.parent) else f"create the directory {path.parent} first"
        raise fail("unwritable-output", f"cannot write {path}: {error.strerror}", help=help) from None


def _refuse_to_replace(path: Path, force: bool) -> None:
    if not path.exists():
        return
    if not path.is_file():
        what = "a directory" if path.is_dir() else "not a regular file"
        help = "`-o` names the plan's own file; `--dump-plan` prints the plan"
        raise fail("output-exists", f"{path} is {what}", help=help)
    if not force:
        with path.open("rb") as file:
            if file.read(len(_PLAN_BEGINS)) != _PLAN_BEGINS:
                raise fail(
                    "output-exists", f"{path} exists and is not a plan", help="choose another name, or use --force"
                )
