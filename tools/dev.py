"""Set-up for a fresh machine: Python and pip, nothing else.

    python tools/dev.py demo             install ckptc into .venv, convert the bundled example, restore it
    python tools/dev.py test             install ckptc with its development tools, run every check
    python tools/dev.py test --oldest    with the oldest libraries that pyproject.toml allows: run the demo and the tests
    python tools/dev.py install          what `test` installs, with the same options, and nothing else

Further arguments of `test` are pytest's. Each Python version has its own environments, .venv/<version> and
.venv/<version>-oldest; a second call reuses one unless pyproject.toml changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def oldest(pyproject: str) -> list[str]:
    """The lower bounds of what ckptc and its tests need, as exact versions: `jax>=0.7` is `jax==0.7`.

    ValueError for a requirement that is not a name and a lower bound: there would be an end that nothing tests.
    """
    project = tomllib.loads(pyproject)["project"]
    exact = []
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        if not re.fullmatch(r"[\w.-]+>=[\w.]+", requirement):
            raise ValueError(f"pyproject.toml: `{requirement}` is not NAME>=VERSION")
        exact.append(requirement.replace(">=", "=="))
    return exact


def environment(extras: str, name: str = "", exact: Sequence[str] = ()) -> Path:
    """The directory of programs of an environment, told apart by `name`, that has ckptc (editable), `extras`, and
    `exact` versions of what they need."""
    home = ROOT / ".venv" / f"{sys.version_info.major}.{sys.version_info.minor}{name}"
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    stamp = home / "installed"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + extras.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"setting up {home} …", flush=True)
        if not (programs / "pip").exists():
            venv.create(home, with_pip=True)
        # pip of old Pythons cannot install everything a new wheel may use.
        subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        subprocess.run(
            [programs / "python", "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}{extras}", *exact],
            check=True,
        )
        # pip does not compile what stays where it is, and not all machines let Python keep what it compiles.
        subprocess.run([programs / "python", "-m", "compileall", "-q", ROOT / "src"], check=True)
        stamp.write_text(wanted)
    return programs


def run(*command: str | Path, programs: Path) -> None:
    """Runs a program of the environment from the repository's root; ends this one where it fails."""
    print("$", " ".join(str(c) for c in command), flush=True)
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    code = subprocess.run(list(command), cwd=ROOT, env={**os.environ, "PATH": path}).returncode
    if code:
        sys.exit(code)


def demo() -> None:
    programs = environment("")
    run("python", "tools/demo.py", programs=programs)


def test_environment(extras: str, old: bool) -> Path:
    if old:
        return environment("[test]", "-oldest", oldest((ROOT / "pyproject.toml").read_text("utf-8")))
    return environment(f"[{extras}]")


def test(extras: str, lint: bool, pytest: list[str]) -> None:
    programs = test_environment(extras, old=False)
    if lint:
        run("ruff", "check", ".", programs=programs)
        run("ruff", "format", "--check", ".", programs=programs)
        run("mypy", programs=programs)
    run("pytest", "-n", str(os.cpu_count() or 1), *pytest, programs=programs)


def test_oldest(pytest: list[str]) -> None:
    programs = test_environment("", old=True)
    run("python", "tools/demo.py", programs=programs)
    run("pytest", "-n", str(os.cpu_count() or 1), *pytest, programs=programs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["demo", "test", "install"])
    parser.add_argument(
        "--extras",
        default="dev",
        help="extras to install for `test` (default: dev; `dev,transformers` adds the tests that need them)",
    )
    parser.add_argument("--no-lint", action="store_true", help="`test` without ruff and mypy")
    parser.add_argument("--oldest", action="store_true", help="`test` with the oldest libraries, without linters")
    args, rest = parser.parse_known_args()
    if args.what == "demo" and (args.oldest or args.no_lint):
        parser.error("--oldest and --no-lint belong to `test`")
    if args.what == "demo":
        demo()
    elif args.what == "install":
        test_environment(args.extras, args.oldest)
    elif args.oldest:
        test_oldest(rest)
    else:
        test(args.extras, not args.no_lint, rest)


if __name__ == "__main__":
    main()
