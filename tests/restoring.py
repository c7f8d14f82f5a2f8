"""Checkpoints as plain Orbax restores them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1

Arrays = dict[str, np.ndarray[Any, Any]]


@contextmanager
def jax_with_64_bits() -> Iterator[None]:
    """JAX would make int32 of an int64 table."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def v1_load(step: Path, target: Any = None) -> Any:
    """The tree of a step, or the target's part of it, as Orbax v1 restores it: `load`, or `load_pytree` before 0.12."""
    load = ocp_v1.load if hasattr(ocp_v1, "load") else ocp_v1.load_pytree
    return load(step, target, checkpointable_name="items")


def with_devices(count: int) -> dict[str, str]:
    """The environment of a Python that has `count` simulated devices and imports what the tests do."""
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def by_path(tree: Any, at: str = "params") -> Arrays:
    """The leaves of nested dicts by their path, its parts joined by slashes."""
    if not isinstance(tree, dict):
        return {at: np.asarray(tree)}
    return {path: leaf for key, value in tree.items() for path, leaf in by_path(value, f"{at}/{key}").items()}


def restored(output: Path) -> Arrays:
    """The arrays of a run's output, by path."""
    with jax_with_64_bits():
        return by_path(ocp.StandardCheckpointer().restore(output / "0" / "items")["params"])
