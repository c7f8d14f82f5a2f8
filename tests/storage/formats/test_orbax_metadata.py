"""What the metadata says of shardings is what Orbax writes of arrays that are sharded so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ckptc.storage.formats.orbax_metadata import ArraySpec, Mesh, sharding_metadata
from restoring import with_devices

MESH: Mesh = (("fsdp", 2), ("context", 1), ("tensor", 4))
SPECS: dict[str, tuple[tuple[str, ...], ...]] = {
    "both": (("fsdp",), ("tensor",)),
    "one": ((), ("tensor",)),
    "first": (("fsdp",), ()),
    "together": (("fsdp", "tensor"), ()),
    "reversed": ((), ("tensor", "fsdp")),
    "whole": ((), ()),
    "unknown": (),
}
SAVE = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(2, 1, 4), ("fsdp", "context", "tensor"))
tree = {
    name: jax.device_put(np.zeros((8, 8), "float32"), NamedSharding(mesh, P(*(over or None for over in spec))))
    for name, spec in SPECS.items()
}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1] + "/saved", tree)
"""


@pytest.fixture(scope="module")
def orbaxs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`_sharding` as Orbax writes it from eight devices."""
    directory = tmp_path_factory.mktemp("orbaxs")
    command = [sys.executable, "-c", f"SPECS = {SPECS!r}\n{SAVE}", str(directory)]
    done = subprocess.run(command, env=with_devices(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (Path(directory) / "saved" / "_sharding").read_text("utf-8")


def test_shardings_on_a_mesh_are_the_text_that_orbax_writes(orbaxs: str) -> None:
    arrays = [ArraySpec((name,), (8, 8), "float32", (1, 1), (1, 1), spec) for name, spec in SPECS.items()]
    assert json.dumps(sharding_metadata(arrays, MESH), separators=(",", ":")) == orbaxs
