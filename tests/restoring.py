"""Checkpoints as plain Orbax restores them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

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


def by_path(tree: Any, at: str = "params") -> Arrays:
    """The leaves of nested dicts by their path, its parts joined by slashes."""
    if not isinstance(tree, dict):
        return {at: np.asarray(tree)}
    return {path: leaf for key, value in tree.items() for path, leaf in by_path(value, f"{at}/{key}").items()}


def restored(output: Path) -> Arrays:
    """The arrays of a run's output, by path."""
    with jax_with_64_bits():
        return by_path(ocp.StandardCheckpointer().restore(output / "0" / "items")["params"])
