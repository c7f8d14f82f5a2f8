"""The two environments that a proof needs, found or made from the lock files that come with ckptc."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from ckptc.diagnostics import fail

NEEDS = {"transformers": (3, 11), "maxtext": (3, 12)}  # the least Python of each
WHAT = {"transformers": ("--transformers-python", "torch and transformers"), "maxtext": ("--target-python", "MaxText")}


def pythons(
    transformers: str | None, target: str | None, directory: Path | None, say: Callable[[str], None]
) -> tuple[str, str]:
    """The Pythons of both sides. Raises `no-environment` with what is missing, and how to get it."""
    out = []
    missing = []
    for name, given in (("transformers", transformers), ("maxtext", target)):
        if given:
            out.append(given)
        elif directory:
            out.append(str(environment(name, directory.absolute(), say)))
        else:
            option, what = WHAT[name]
            missing.append(f"{option} PYTHON: a Python with {what}")
    if missing:
        raise fail(
            "no-environment",
            "a proof runs both models, and their environments are not named",
            notes=tuple(missing),
            help="name them, or let `ckptc prove --setup DIR` make both (some 4 GB)",
        )
    return out[0], out[1]


def environment(name: str, directory: Path, say: Callable[[str], None]) -> Path:
    """The Python of an environment in `directory`, made where it is not there or is of another lock file."""
    home = directory / name
    python, stamp = home / "bin" / "python", home / "lock"
    lock = (files("ckptc.prove") / "sides" / f"{name}.lock").read_bytes()
    wanted = hashlib.sha256(lock).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    base = interpreter(NEEDS[name])
    say(f"makes {home} ({WHAT[name][1]}); this takes minutes")
    home.parent.mkdir(parents=True, exist_ok=True)
    run([base, "-m", "venv", "--clear", str(home)], name)
    with as_file(files("ckptc.prove") / "sides" / f"{name}.lock") as path:
        # MaxText's lock file is whole: what MaxText asks for and a proof does not need is left out. What torch needs depends on its build.
        whole = ["--no-deps"] if name == "maxtext" else []
        run([str(python), "-m", "pip", "install", "--quiet", *whole, "-r", str(path)], name)
    stamp.write_text(wanted)
    return python


def interpreter(least: tuple[int, int]) -> str:
    """A Python of that version or a later one: this one, or one on the PATH. Raises `no-environment`."""
    if sys.version_info[:2] >= least:
        return sys.executable
    for minor in range(least[1], least[1] + 3):
        found = shutil.which(f"python3.{minor}")
        # A program of that name may be a shim that has no such version.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    version = ".".join(map(str, least))
    raise fail(
        "no-environment",
        f"an environment needs Python {version} or later, and there is none on the PATH",
        help=f"install python{version}, or name a Python that has the packages with --target-python",
    )


def run(words: list[str], name: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-6:]
        raise fail(
            "no-environment",
            f"the environment of {name} could not be made",
            notes=(f"command: {' '.join(words)}", *said),
            help="mend what pip says, and give the same command again; or name Pythons that have the packages",
        )
