"""Golden cases through `ckptc.load`, on as many CPU devices as XLA_FLAGS says: run by test_load.py, in a process of its own.

Each case is loaded once for each axis that arrays are sharded along, and once by a mesh and the target's rules.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))

import ckptc
import golden
from reference import GoldenCase


def flat(tree: Any) -> dict[str, Any]:
    return {"/".join(k.key for k in keys): np.asarray(x) for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def like(plan: ckptc.Plan, axis: int) -> dict[str, Any]:
    """The plan's tree, each array sharded along an axis over all devices, if they divide it."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    out: dict[str, Any] = {}
    for a in plan.arrays:
        fits = len(a.shape) > axis and a.shape[axis] % jax.device_count() == 0
        spec = PartitionSpec(*(["x" if n == axis else None for n in range(len(a.shape))] if fits else []))
        at = out
        for part in a.path[:-1]:
            at = at.setdefault(part, {})
        at[a.path[-1]] = jax.ShapeDtypeStruct(a.shape, jax.numpy.dtype(a.dtype), sharding=NamedSharding(mesh, spec))
    return out


def loaded(case: GoldenCase, **options: Any) -> Any:
    scan, vocab = case.layout == "scan", {"padded_vocab": case.vocab}
    given = {"scan": scan, "dtype": case.dtype, "multimodal": case.multimodal, "set": vocab}
    return ckptc.load(case.model, case.hf, **given, **options)


def main(names: list[str]) -> None:
    jax.config.update("jax_enable_x64", True)
    mesh = {1: "fsdp=1", 4: "fsdp=2,tensor=2", 8: "fsdp=2,tensor=4"}[jax.device_count()]
    for case in golden.known_cases():
        if names and case.id not in names:
            continue
        plan = golden.compile_case(case)
        expected = golden.expected_of(case)
        for axis in range(4):
            tree = like(plan, axis)
            found = loaded(case, like=tree)
            leaves, wanted = (jax.tree_util.tree_leaves(x) for x in (found, tree))
            assert [x.sharding for x in leaves] == [x.sharding for x in wanted], case.id
            assert golden.differences(flat(found), expected) == [], (case.id, axis)
        assert golden.differences(flat(loaded(case, mesh=mesh)), expected) == [], case.id
        print(case.id)


if __name__ == "__main__":
    main(sys.argv[1:])
