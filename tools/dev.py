"""Set-up for a fresh machine: Python and pip, nothing else.

    python tools/dev.py demo    install ckptc into .venv, convert the bundled example, restore it
    python tools/dev.py test    install ckptc with its development tools, run every check

Each Python version has its own environment, .venv/<version>; a second call reuses it unless pyproject.toml changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(extras: str) -> Path:
    """The directory of programs of an environment that has ckptc (editable) and `extras`."""
    home = ROOT / ".venv" / f"{sys.version_info.major}.{sys.version_info.minor}"
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
            [programs / "python", "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}{extras}"],
            check=True,
        )
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


def test(extras: str, pytest: list[str]) -> None:
    programs = environment(f"[{extras}]")
    run("ruff", "check", ".", programs=programs)
    run("ruff", "format", "--check", ".", programs=programs)
    run("mypy", programs=programs)
    run("pytest", "-n", str(os.cpu_count() or 1), *pytest, programs=programs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["demo", "test"])
    parser.add_argument(
        "--extras",
        default="dev",
        help="extras to install for `test` (default: dev; `dev,transformers` adds the tests that need them)",
    )
    args, rest = parser.parse_known_args()
    if args.what == "demo":
        demo()
    else:
        test(args.extras, rest)


if __name__ == "__main__":
    main()
