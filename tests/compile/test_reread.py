"""What a plan says of bytes that are read again."""

from __future__ import annotations

import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.plan.model import Plan
from ckptc.spec.mapping import find_model


def plan(model: str, layout: str = "scanned") -> Plan:
    return compile_plan(*find_model(model), Options(layout=layout))


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_where_each_tensor_becomes_one_array_nothing_is_read_again(layout: str) -> None:
    found = plan("llama3.1-8b", layout)
    assert found.totals.reread_bytes == 0
    assert found.totals.read_bytes == sum(t.end - t.begin for t in found.tensors)


def test_rows_of_one_tensor_that_alternate_between_two_arrays_are_read_twice() -> None:
    found = plan("gpt-oss-20b")
    size = {t.name: t.end - t.begin for t in found.tensors}
    fused = sum(n for name, n in size.items() if "gate_up_proj" in name)
    assert found.totals.reread_bytes == pytest.approx(fused, rel=1e-3)
    assert found.totals.read_bytes == sum(size.values()) + found.totals.reread_bytes


def test_parts_of_one_tensor_that_lie_apart_are_read_once() -> None:
    found = plan("qwen3-next-80b-a3b")
    assert found.totals.reread_bytes < 0.01 * found.totals.read_bytes
