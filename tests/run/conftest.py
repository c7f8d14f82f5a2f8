"""What tests of runs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import restoring
from ckptc.plan.json import dumps
from ckptc.plan.model import Plan


@pytest.fixture
def jax_with_64_bits() -> Iterator[None]:
    with restoring.jax_with_64_bits():
        yield


@pytest.fixture(scope="module")
def plan_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module's plan, as a file."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(dumps(plan), "utf-8")
    return path
