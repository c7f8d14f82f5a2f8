"""The interface of ckptc for programs: what each command does, as a function.

    plan = ckptc.compile("qwen3-8b", source="hf://Qwen/Qwen3-8B")   proved against headers; reads no weights
    ckptc.run(plan, "OUT")                                          an Orbax checkpoint in OUT/0/items

`import ckptc` loads none of it until it is asked for, and none of it loads JAX before it is needed. Every function
raises `InputError` where its input is at fault, with the diagnostics that the command prints: `error.diagnostics`, each
with a stable `code`, a `message`, the place in a mapping, what was expected and found, and what to do.

Sizes are bytes. A `source` is a directory, or `hf://ORG/NAME[@REVISION]` where weights of the Hub are read. Outputs
appear complete or not at all.
"""

from __future__ import annotations

from ckptc.api.arrays import LoadReport, load
from ckptc.api.compilation import ExportCompilation, find
from ckptc.api.functions import against_source, compile, compile_export, convert, diff, export, run, verify
from ckptc.diagnostics import Diagnostic, InputError
from ckptc.plan.model import Plan

__all__ = [
    "Diagnostic",
    "ExportCompilation",
    "InputError",
    "LoadReport",
    "Plan",
    "against_source",
    "compile",
    "compile_export",
    "convert",
    "diff",
    "export",
    "find",
    "load",
    "run",
    "verify",
]
