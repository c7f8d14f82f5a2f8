"""`ckptc explain`: what a diagnostic's code means and what to do, from the catalogue in codes.yaml."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from functools import cache
from importlib.resources import as_file, files
from typing import Any

from ckptc.cli.plan import explained
from ckptc.diagnostics import fail, nearest

WIDTH = 100


@cache
def catalogue() -> Mapping[str, Mapping[str, str]]:
    """Code -> `cause` and `cure`, in the order in which a conversion meets them."""
    from ckptc.spec.document import load

    with as_file(files("ckptc.cli") / "codes.yaml") as path:
        data: Mapping[str, Mapping[str, str]] = load(path, "codes.yaml").data
    return data


def add_explain(commands: Any) -> None:
    """The parser of `explain`."""
    parser = commands.add_parser(
        "explain",
        help="say what an error's code means, or what becomes of a tensor",
        description="Errors begin with error[CODE]. With CODE, its cause and cure; without, every code. With a model and a "
        "tensor or an array of it, which rows of which tensor become which part of which array, by which rule.",
    )
    parser.add_argument("code", nargs="?", metavar="CODE|MODEL", help="such as shape-mismatch, or gemma2-2b")
    parser.add_argument(
        "tensor", nargs="?", metavar="TENSOR", help="a name at the source or in the target; may have stars"
    )
    explained(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def explain(args: argparse.Namespace) -> None:
    if args.tensor is not None:
        from ckptc.cli.trace import explain_tensor

        explain_tensor(args)
        return
    known = catalogue()
    if args.code is None:
        print(json.dumps(known, indent=1) if args.json else _list(known))
        return
    code = args.code.removeprefix("error").strip("[]: ")  # as it is copied from an error
    entry = known.get(code)
    if entry is None:
        best = nearest(code, known)
        help = f"did you mean `{best}`?" if best else "`ckptc explain` lists all of them"
        raise fail("unknown-code", f"there is no code `{code}`", help=help)
    print(json.dumps({"code": code, **entry}, indent=1) if args.json else _entry(code, entry))


def _entry(code: str, entry: Mapping[str, str]) -> str:
    texts = (f"{name + ':':6} {entry[name]}" for name in ("cause", "cure"))
    return "\n".join(
        [code, *(textwrap.fill(t, WIDTH, initial_indent="  ", subsequent_indent="         ") for t in texts)]
    )


def _list(known: Mapping[str, Mapping[str, str]]) -> str:
    wide = max(map(len, known))
    return "\n".join(
        f"{code:{wide}}  {textwrap.shorten(entry['cause'], WIDTH - wide, placeholder=' …')}"
        for code, entry in known.items()
    )
