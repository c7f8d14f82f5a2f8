"""`ckptc prove`: that a conversion computes the same, shown by running both models."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptc.cli import arguments
from ckptc.diagnostics import fail

if TYPE_CHECKING:
    from ckptc.prove.prover import Outcome
    from ckptc.spec.mapping import Family

DESCRIPTION = """\
Shows that a conversion computes the same. Makes a tiny random checkpoint with the model's class in transformers (or
takes the first layers of real weights), converts it with this mapping, runs transformers' model on the original and
MaxText's on the result, and compares what they compute: embedding, attention and MLP of each layer, logits. Then
exports, and compares tensors. Where the models part, it says where. A proof that passed is recorded beside the mapping;
`compile` and `verify` say so.

Two Pythons are needed: one with torch and transformers, one with MaxText. `--setup DIR` makes both.
"""


def add_prove(commands: Any) -> None:
    """The parser of `prove`."""
    parser = commands.add_parser(
        "prove",
        help="show that a conversion computes the same, by running both models",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME", help="a named model; `ckptc models` lists them")
    parser.add_argument("--mapping", metavar="FILE", help="a mapping that is not among the shipped ones")
    parser.add_argument(
        "--layout", choices=["scan", "unscan", "both"], default="both", help="layouts to prove (default: both)"
    )
    parser.add_argument(
        "--loader",
        choices=["train", "pretrained", "linen", "all"],
        default="all",
        help="how MaxText restores: as train.py, by from_pretrained, or into its Linen module (default: all)",
    )
    parser.add_argument("--transformers-python", metavar="PYTHON", help="has torch and transformers")
    parser.add_argument("--target-python", metavar="PYTHON", help="has MaxText")
    parser.add_argument(
        "--setup", metavar="DIR", help="make both environments in DIR where they are not there yet, and use them"
    )
    parser.add_argument("--source", metavar="DIR", help="prove on the first layers of these real weights")
    parser.add_argument(
        "--layers", type=arguments.positive, default=4, metavar="N", help="with --source: how many layers (default: 4)"
    )
    parser.add_argument("--work", metavar="DIR", help="keep checkpoints, logs and what was computed here")
    parser.add_argument("--no-record", action="store_true", help="do not write the record of a proof that passed")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def prove(args: argparse.Namespace) -> int:
    """Exit code 0 for a proof that passed (or deviates as is known), 1 for one that did not."""
    from ckptc.prove import prover, record, setup
    from ckptc.prove.case import make_case
    from ckptc.spec.mapping import find_model, load_mapping

    def say(text: str) -> None:
        if not args.quiet and not args.json:
            print(text, file=sys.stderr, flush=True)

    pythons = setup.pythons(args.transformers_python, args.target_python, Path(args.setup) if args.setup else None, say)
    if args.model is None:
        if args.setup:
            print(f"transformers  {pythons[0]}\ntarget        {pythons[1]}")
            return 0
        raise fail("no-model", "the model to prove is not named", help="`ckptc prove --model NAME`")
    mapping = Path(args.mapping) if args.mapping else None
    family, model = find_model(args.model, (load_mapping(mapping),) if mapping else None)
    source = Path(args.source).absolute() if args.source else None
    case = make_case(family, model, mapping, _config(source, args.layers) if source else None)
    layouts = case.layouts if args.layout == "both" else (args.layout,)
    if absent := set(layouts) - set(case.layouts):
        raise fail("unsupported-layout", f"{model.name} has no layout `{absent.pop()}`", help="leave out --layout")
    loaders = prover.LOADERS if args.loader == "all" else (args.loader,)
    with _directory(args.work) as directory:
        work = prover.Work(
            directory, *pythons, layouts, loaders, mapping, source, args.layers, lambda text: say(f"  {text}")
        )
        say(f"{model.name}: {case.class_}, as MaxText's {case.maxtext_model}")
        outcome = prover.prove(case, work)
    deviates = bool(case.deviation) and bool(outcome.found) and not outcome.failed and not outcome.export_problem
    kept = None
    whole = layouts == case.layouts and loaders == prover.LOADERS and source is None
    if (outcome.passed or deviates) and whole and not args.no_record:
        made = record.made(
            family,
            model.name,
            outcome.found,
            outcome.export,
            versions=outcome.versions,
            note=case.note,
            deviation=case.deviation if not outcome.passed else "",
        )
        kept = record.save(made, record.folder(mapping))
    if args.json:
        print(json.dumps(as_record(outcome, kept)))
    else:
        print(text(outcome, family, case.deviation, kept))
    return 0 if outcome.passed or deviates else 1


def _config(source: Path, layers: int) -> dict[str, Any]:
    path = source / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail("unreadable-config", f"cannot read {path}: {error}", help="--source is a checkpoint") from None
    inner = config.get("text_config", config)
    inner["num_hidden_layers"] = layers
    if inner.get("layer_types"):
        inner["layer_types"] = inner["layer_types"][:layers]
    return config


@contextmanager
def _directory(given: str | None) -> Iterator[Path]:
    if given:
        path = Path(given).absolute()
        if path.exists() and any(path.iterdir()) and not (path / "job.transformers.json").exists():
            raise fail("output-exists", f"{path} has files that are no proof's", help="choose an empty directory")
        for old in [*path.glob("error.*"), *path.glob("*.npz")]:
            old.unlink()
        yield path
        return
    # Errors name files in it, so it stays where there is one.
    directory = Path(tempfile.mkdtemp(prefix="ckptc-prove-"))
    yield directory
    shutil.rmtree(directory)


def as_record(outcome: Outcome, kept: Path | None) -> dict[str, Any]:
    rows = [
        {
            "layout": f.layout,
            "loader": f.loader,
            "agrees": f.agrees,
            "relative": f.relative,
            "kl": f.kl,
            "top1": f.top1,
            "points": len(f.points),
            "parts": f.words or None,
        }
        for f in outcome.found
    ]
    return {
        "passed": outcome.passed,
        "results": rows,
        "failed": [{"layout": a, "loader": b, "why": why} for a, b, why in outcome.failed],
        "export": outcome.export if outcome.export != float("inf") else None,
        "export_problem": outcome.export_problem or None,
        "versions": outcome.versions,
        "record": str(kept) if kept else None,
    }


def text(outcome: Outcome, family: Family, deviation: str, kept: Path | None) -> str:
    lines = [f"{'LAYOUT':8}{'LOADER':12}{'LOGITS':>10}{'KL':>10}{'TOP-1':>9}  INSIDE"]
    for f in outcome.found:
        if f.agrees:
            inside = f"{len(f.points)} points agree" if f.points else "agrees"
        else:
            inside = f"parts at {f.words}"
        lines.append(f"{f.layout:8}{f.loader:12}{f.relative:>10.1e}{f.kl:>10.1e}{f.top1:>9.1%}  {inside}")
    lines += [f"{layout:8}{loader:12}did not run: {why}" for layout, loader, why in outcome.failed]
    if outcome.export_problem:
        lines.append(f"export: {outcome.export_problem}")
    else:
        lines.append(f"export: each tensor is the original's, within {outcome.export:.1e}")
    versions = f"transformers {outcome.versions['transformers']}, MaxText {outcome.versions['maxtext']}"
    if outcome.passed:
        lines.append(f"\nproved: both compute the same ({versions})")
    elif deviation and not outcome.failed and not outcome.export_problem:
        lines.append(f"\ndeviates, as is known: {deviation} ({versions})")
    else:
        worst = next((f for f in outcome.found if not f.agrees), None)
        what = f": the models part at {worst.words}" if worst else ""
        lines.append(f"\nnot proved{what} ({versions})")
        if worst:
            lines += _rules(family, worst.hints)
    if kept:
        lines.append(f"recorded in {kept}")
    return "\n".join(lines)


def _rules(family: Family, hints: tuple[str, ...]) -> list[str]:
    """The rules of the arrays that lead to where the models part."""
    rules = [*family.rules, *(rule for block in family.blocks for rule in block.rules)]
    out = []
    for rule in rules:
        words = [rule.target, *(str(key) for value in rule.loop.values() if isinstance(value, dict) for key in value)]
        if any(hint in word for hint in hints for word in words):
            span = family.document.key_span(rule.where)
            out.append(f"  {span.file}:{span.line}: {rule.target}" if span else f"  {rule.target}")
    return ["rules of what is computed there:", *out] if out else []
