"""The folders are the pipeline: what each stage may know of the others, read from the imports of the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import ckptc

SOURCE = Path(ckptc.__file__).parent
SIDES = SOURCE / "prove" / "sides"  # programs for other Pythons, which have torch or MaxText
FILES = sorted(p for p in SOURCE.rglob("*.py") if "_data" not in p.parts and SIDES not in p.parents)
ORDER = (
    "diagnostics",
    "regular",
    "spec",
    "ops",
    "ir",
    "plan",
    "compile",
    "storage",
    "run",
    "prove",
    "api",
    "cli",
    "__main__",
)
# What a stage does without, of the stages before it: the table in the design.
APART = {
    "ops": {"diagnostics", "spec"},
    "ir": {"spec"},
    "plan": {"spec", "ir"},  # not how it was made
    "storage": {"spec", "plan", "compile"},
    "run": {"spec", "compile"},  # needs nothing but the plan and the source
    "prove": {"ops", "ir", "plan", "storage", "run"},  # converts as a user does
}
EXCEPTIONS = {("plan", "ckptc.spec.resources")}  # the shipped schema
# Libraries that belong to one stage alone.
AT_HOME = {
    "ruamel": "spec",
    "jinja2": "spec",
    "tensorstore": "storage",
    "orbax": "storage",
    "rich": "cli",
    "argparse": "cli",
}
NEVER = ("torch", "transformers", "maxtext", "MaxText", "pickle", "dill", "cloudpickle")
LINES_MOST = 400


def imports(file: Path) -> list[tuple[str, str]]:
    """Every module that a file imports, wherever in the file, each with its place."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(place(file, node), alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{place(file, node)}: imports are absolute"
            # `from ckptc.plan import json` names a module, `from ckptc.plan.json import dumps` does not.
            package = (SOURCE.parent / node.module.replace(".", "/")).is_dir()
            names = [f"{node.module}.{alias.name}" for alias in node.names] if package else [node.module]
            found += [(place(file, node), name) for name in names]
    return found


def place(file: Path, node: ast.stmt) -> str:
    return f"{file.relative_to(SOURCE)}:{node.lineno}"


def stage(file: Path) -> str:
    inside = file.relative_to(SOURCE).with_suffix("").parts
    return "" if inside == ("__init__",) else inside[0]


def test_imports_come_from_earlier_stages() -> None:
    wrong = []
    for file in FILES:
        own = stage(file)
        for where, module in imports(file):
            package, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if package != "ckptc" or other in ("", own):  # `import ckptc` is for the version
                continue
            if own == "" and other == "api":  # whose names it has
                continue
            late = own == "" or ORDER.index(other) > ORDER.index(own)
            if late or (other in APART.get(own, ()) and (own, module) not in EXCEPTIONS):
                wrong.append(f"{where} imports {module}")
    assert wrong == []


def test_libraries_stay_in_the_stage_that_owns_them() -> None:
    used = [(where, module, stage(file)) for file in FILES for where, module in imports(file)]
    assert [(where, m) for where, m, own in used if AT_HOME.get(m.split(".")[0], own) != own] == []


def test_nothing_of_the_other_side_is_imported_and_nothing_unpickles() -> None:
    used = [found for file in FILES for found in imports(file)]
    assert [(where, module) for where, module in used if module.split(".")[0] in NEVER] == []


def test_programs_for_other_pythons_import_nothing_of_ckptc() -> None:
    used = [found for file in sorted(SIDES.glob("*.py")) for found in imports(file)]
    assert used and [(where, module) for where, module in used if module.split(".")[0] == "ckptc"] == []


def test_every_stage_is_in_the_order() -> None:
    assert {stage(file) for file in FILES} - {""} == set(ORDER)


def test_no_file_is_long() -> None:
    lengths = {str(file.relative_to(SOURCE)): len(file.read_text("utf-8").splitlines()) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_MOST} == {}


def test_every_module_says_what_it_is() -> None:
    assert [str(f) for f in FILES if f.stat().st_size and not ast.get_docstring(ast.parse(f.read_text("utf-8")))] == []


def test_third_party_imports_are_declared_dependencies() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    declared = project[project.index("\ndependencies = [") : project.index("[project.optional-dependencies]")]
    names = {"ruamel": "ruamel.yaml", "orbax": "orbax-checkpoint"}
    used = {module.split(".")[0] for file in FILES for _, module in imports(file)}
    used -= sys.stdlib_module_names | {"ckptc"}
    assert [root for root in sorted(used) if f'"{names.get(root, root)}>=' not in declared] == []
