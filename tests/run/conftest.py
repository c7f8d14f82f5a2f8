"""What tests of runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import restoring


@pytest.fixture
def jax_with_64_bits() -> Iterator[None]:
    with restoring.jax_with_64_bits():
        yield
