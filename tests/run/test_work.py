"""What a worker holds: no more than is counted when workers are fitted into the budget."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.run.test_link import convert
from tests.run.test_worker import write

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.plan.model import Plan
from ckptc.run import work
from ckptc.spec.mapping import load_mapping
from ckptc.storage.sink import file as bulk
from ckptc.storage.sink.file import LEAST
from ckptc.storage.source.ranges import RangeReader

MAPPING = """
family: tiny
target: maxtext
extra: true
dims: { rows: 1600, columns: 1001 }
models: { tiny: { repo: none/tiny } }
tensors:
  plain: { from: plain.weight, as: rows columns }
  turned: { from: turned.weight, as: columns rows -> rows columns }
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Of two arrays in large pieces: one that lies as it is stored, at no block's beginning, and one that does not."""
    (tmp_path / "tiny.yaml").write_text(MAPPING, encoding="utf-8")
    (tmp_path / "source").mkdir()
    values = np.arange(1600 * 1001, dtype=np.float32).astype(ml_dtypes.bfloat16)
    tensors = {"plain.weight": values.reshape(1600, 1001), "turned.weight": values.reshape(1001, 1600)}
    mapping, checkpoint = load_mapping(tmp_path / "tiny.yaml"), write(tmp_path / "source", tensors)
    return compile_plan(mapping, mapping.models["tiny"], Options(layout="scanned", shards=4), checkpoint)


class Mapped(mmap.mmap):
    """Anonymous memory, counted while it is there."""

    held = most = 0

    def __init__(self, *args: Any, **named: Any) -> None:
        Mapped.held += len(self)
        Mapped.most = max(Mapped.most, Mapped.held)

    def __del__(self) -> None:
        Mapped.held -= len(self)


def test_a_worker_holds_what_is_counted_and_more_than_its_plan_says(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads and writes past the page cache take buffers of their own."""
    monkeypatch.setattr(os, "major", lambda device: 1)  # whatever disk this is
    monkeypatch.setattr(mmap, "mmap", Mapped)
    convert(plan, tmp_path / "source", tmp_path / "out")
    assert Mapped.most > LEAST
    assert plan.totals.peak_memory_bytes < Mapped.most <= work.worker_bytes(plan.totals.peak_memory_bytes)


@pytest.mark.parametrize("from_disk", [False, True])
def test_files_are_synced_unasked_unless_the_source_comes_from_the_disk(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_disk: bool
) -> None:
    """Its reads would wait. One unit has 3.2 MB: the second of two goes beyond 4."""
    begun: list[int] = []
    monkeypatch.setattr(os, "major", lambda device: 1)  # whatever disk this is
    monkeypatch.setattr(bulk, "EAGER", 4_000_000)
    monkeypatch.setattr(bulk.BulkFile, "_sync_unasked", lambda file: begun.append(1))
    monkeypatch.setattr(RangeReader, "from_disk", property(lambda reader: from_disk))
    assert [len(list(a.units())) for a in plan.arrays] == [1, 1]
    convert(plan, tmp_path / "source", tmp_path / "out")
    assert len(begun) == (0 if from_disk else 1)
