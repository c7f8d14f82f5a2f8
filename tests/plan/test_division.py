"""The division of work: nothing left out, nothing twice, balanced in bytes, the same in every process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptc.plan.division import Load, balance, divide, load, shares
from ckptc.plan.order import forwards
from golden import compile_case, known_cases

LOADS = st.lists(st.builds(Load, st.integers(0, 1000), st.integers(0, 1000)), max_size=60)
CASES = [
    case for case in known_cases() if case.id in ("qwen3_moe.scan", "gemma3.unscan", "gpt_oss.scan", "deepseek3.scan")
]


@given(LOADS, st.integers(1, 70))
def test_every_unit_is_in_one_stretch_in_order(loads: list[Load], processes: int) -> None:
    parts = divide(loads, processes)
    assert len(parts) == processes
    assert [i for part in parts for i in part] == list(range(len(loads)))


@given(LOADS, st.integers(1, 70))
def test_no_process_is_further_than_a_unit_from_its_portion(loads: list[Load], processes: int) -> None:
    total, largest = sum(x.moved for x in loads), max([x.moved for x in loads], default=0)
    for part in divide(loads, processes):
        assert abs(sum(loads[i].moved for i in part) - total / processes) <= largest


def test_more_processes_than_units_leave_some_without_work() -> None:
    parts = divide([Load(1, 1)] * 3, 8)
    assert sorted(len(part) for part in parts) == [0] * 5 + [1] * 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("processes", [1, 3])
def test_the_parts_are_the_plans_bytes(case, processes: int) -> None:  # type: ignore[no-untyped-def]
    plan = compile_case(case, memory=1 << 20)
    parts = shares(plan, processes)
    assert sum(x.read for x in parts) == plan.totals.read_bytes
    assert sum(x.written for x in parts) == plan.totals.write_bytes


def test_scaling_is_bounded_by_the_process_that_moves_the_most() -> None:
    plan = compile_case(CASES[0], memory=2048)
    loads = [load(plan, unit) for unit in forwards(plan)]
    found = balance(plan, 6)
    assert [n for n, _ in found.scaling] == [1, 2, 4, 6]
    assert found.scaling[0][1] == 1
    most = max(sum(loads[i].moved for i in part) for part in divide(loads, 6))
    assert found.scaling[-1][1] == pytest.approx(sum(x.moved for x in loads) / most)
    assert found.read.least <= found.read.mean <= found.read.most
    assert found.written.mean == pytest.approx(plan.totals.write_bytes / 6, abs=1)
