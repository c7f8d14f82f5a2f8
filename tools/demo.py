"""Converts the bundled example step by step, as a user would, and restores the result with plain Orbax."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "tests" / "data" / "golden" / "gemma2" / "hf"


def step(title: str, *command: str) -> None:
    print(f"\n# {title}\n$ ckptc {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "ckptc", *command]).returncode
    if code:
        sys.exit(code)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan, output = f"{folder}/plan.json", f"{folder}/out"
        options = ("--model", "gemma2-2b", "--source", str(EXAMPLE), "--set", "padded_vocab=160")
        step("What would happen? Proved before a byte of weights is read.", "compile", *options, "-o", plan)
        step("Do exactly that.", "run", plan, "--output", output)
        print("\n# Restore it with plain Orbax, no plugin.")
        print(f">>> ocp.StandardCheckpointer().restore('{output}/0/items')", flush=True)
        import jax
        import orbax.checkpoint as ocp

        tree = ocp.StandardCheckpointer().restore(f"{output}/0/items")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree["params"]):
            print(f"{jax.tree_util.keystr(path, simple=True, separator='/'):80} {leaf.dtype}{list(leaf.shape)}")


if __name__ == "__main__":
    main()
