"""What every test shares."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _workers_beside_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs have workers in tests, too: JAX is loaded in this process, to judge results, but what runs fork does not use
    it. The tests of what a run does in such a process start one of their own.
    """
    monkeypatch.setattr("ckptc.run.runner.can_fork", lambda: True)
