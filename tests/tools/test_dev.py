"""The oldest libraries that are tested are those that pyproject.toml allows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("dev", ROOT / "tools" / "dev.py")
assert spec is not None and spec.loader is not None
dev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dev)


def project(*dependencies: str) -> str:
    return f"[project]\ndependencies = {list(dependencies)}\noptional-dependencies.test = ['pytest>=8', 'flax>=0.11']"


def test_every_lower_bound_becomes_the_version() -> None:
    assert dev.oldest(project("jax>=0.7", "ruamel.yaml>=0.18.1")) == [
        "jax==0.7",
        "ruamel.yaml==0.18.1",
        "pytest==8",
        "flax==0.11",
    ]


@pytest.mark.parametrize("requirement", ["jax", "jax>0.7", "jax>=0.7,<1", "jax~=0.7", "jax>=0.7; os_name == 'nt'"])
def test_a_requirement_whose_oldest_version_is_not_stated_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match="is not NAME>=VERSION"):
        dev.oldest(project(requirement))


def test_pyproject_states_the_oldest_version_of_everything() -> None:
    exact = dev.oldest((ROOT / "pyproject.toml").read_text("utf-8"))
    assert {"jax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy"} <= {e.split("==")[0] for e in exact}
