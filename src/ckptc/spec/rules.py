"""Rules of the user's: which axes of a device mesh shard a logical axis, from a YAML file as MaxText's settings are.

Of the file's keys `logical_axis_rules`, `mesh_axes` and `override_logical_axis_rules` count, so that a whole
configuration of MaxText can be given. They mean what they mean there (release 0.2.5, `pyconfig.py` and `types.py`):

- rules take the place of the default ones of the same logical axes, and are tried after the others;
- with `override_logical_axis_rules: true` they are all there are;
- with `mesh_axes`, as in the files of `custom_mesh_and_rule`, too, and the mesh has those axes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptc.diagnostics import Diagnostic, InputError, did_you_mean, fail
from ckptc.spec.document import Document, load
from ckptc.spec.schema import check
from ckptc.spec.target import Rules, TargetTree, typed_rules

_KEYS = ("logical_axis_rules", "mesh_axes", "override_logical_axis_rules")


def load_rules(path: Path, tree: TargetTree) -> tuple[tuple[str, ...], Rules]:
    """The axes that a mesh may have, and the rules, in the order in which they are tried.

    Raises InputError: `unreadable-rules`, what parsing YAML raises, `bad-rules` (no rules, or a parameter's axis is
    sharded over an axis that the mesh cannot have), and what a file has that is not as the schema says.
    """
    try:
        document = load(path)
    except InputError as error:
        raise InputError(
            replace(d, code="unreadable-rules") if d.code == "unreadable-mapping" else d for d in error.diagnostics
        ) from None
    found = document.data if isinstance(document.data, dict) else {}
    if "logical_axis_rules" not in found:
        raise fail(
            "bad-rules",
            f"{document.name} has no `logical_axis_rules`",
            help="give them as MaxText's settings do: `logical_axis_rules: [[embed, [fsdp]], [mlp, tensor]]`",
        )
    settings = {key: found[key] for key in _KEYS if key in found}
    check(replace(document, data=settings), "rules")
    rules = typed_rules(settings["logical_axis_rules"])
    axes = tuple(settings.get("mesh_axes", tree.mesh_axes))
    _check_axes(document, rules, axes, tree)
    if "mesh_axes" in settings or settings.get("override_logical_axis_rules"):
        return axes, rules
    named = {logical for logical, _ in rules}
    return axes, (*(rule for rule in tree.rules if rule[0] not in named), *rules)


def _check_axes(document: Document, rules: Rules, axes: tuple[str, ...], tree: TargetTree) -> None:
    """MaxText takes an unknown axis for one of size 1, and its own files have some, in rules that no parameter uses."""
    problems = [
        Diagnostic(
            "bad-rules",
            f"`{logical}` is sharded over `{axis}`, which the mesh cannot have",
            document.span(("logical_axis_rules", number)),
            (f"axes of the mesh: {', '.join(axes)}",),
            did_you_mean(axis, axes),
        )
        for number, (logical, over) in enumerate(rules)
        if logical in tree.names
        for axis in over
        if axis not in axes
    ]
    if problems:
        raise InputError(problems)
