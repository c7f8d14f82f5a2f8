"""Environments of a proof: which Python makes them, when one is there already, and what is said where none can be made."""

from __future__ import annotations

import hashlib
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from ckptc.diagnostics import InputError
from ckptc.prove import setup

LOCKS = files("ckptc.prove") / "sides"


def test_pythons_that_are_named_are_used(tmp_path: Path) -> None:
    assert setup.pythons("a", "b", None, print) == ("a", "b")
    with pytest.raises(InputError, match="no-environment") as caught:
        setup.pythons("a", None, None, print)
    assert caught.value.diagnostics[0].notes == ("--target-python PYTHON: a Python with MaxText",)


def test_an_environment_of_the_same_lock_file_is_not_made_again(tmp_path: Path) -> None:
    python = tmp_path / "transformers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    lock = (LOCKS / "transformers.lock").read_bytes()
    (tmp_path / "transformers" / "lock").write_text(hashlib.sha256(lock).hexdigest())
    assert setup.environment("transformers", tmp_path, pytest.fail) == python


def test_a_program_that_does_not_run_is_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor = sys.version_info[:2]
    shim = tmp_path / f"python{major}.{minor + 1}"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.interpreter((major, minor)) == sys.executable
    with pytest.raises(InputError, match=rf"needs Python {major}\.{minor + 1} or later"):
        setup.interpreter((major, minor + 1))


def test_a_command_that_fails_is_shown_with_what_it_said() -> None:
    with pytest.raises(InputError, match="no-environment: the environment of maxtext could not be made") as caught:
        setup.run([sys.executable, "-c", "import sys; sys.exit('no network')"], "maxtext")
    assert "no network" in caught.value.diagnostics[0].notes


@pytest.mark.parametrize("name", ["transformers", "maxtext"])
def test_a_lock_file_names_exact_versions(name: str) -> None:
    lines = (LOCKS / f"{name}.lock").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in pins)
    assert {"transformers": "torch", "maxtext": "maxtext"}[name] in {line.split("==")[0] for line in pins}
