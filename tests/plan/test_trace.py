"""Regions that people are shown cover each output once, and are as large at the source as in the output."""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np
import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.plan.model import Plan
from ckptc.plan.trace import Range, shown, trace
from ckptc.spec.mapping import find_model

MODELS = ("gemma2-2b", "gpt-oss-20b", "qwen3-next-80b-a3b", "llama4-17b-16e")


@cache
def plan_of(model: str, layout: str) -> Plan:
    return compile_plan(*find_model(model), Options(layout=layout))


def indices(region: tuple[Range, ...]) -> tuple[range, ...]:
    return tuple(range(*axis) for axis in region)


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
@pytest.mark.parametrize("model", MODELS)
def test_regions_cover_an_output_once(model: str, layout: str) -> None:
    for array in plan_of(model, layout).arrays[:60]:
        covered = 0
        for piece in trace(array):
            size = prod(map(len, indices(piece.output)))
            assert piece.tensor is None or size == prod(map(len, indices(piece.source))), array.name
            assert all(0 <= r[0] < r[-1] + 1 <= n for r, n in zip(indices(piece.output), array.shape, strict=True))
            covered += size
        assert covered == array.kind.size, array.name


def test_every_piece_says_where_its_tensor_goes() -> None:
    plan = plan_of("gpt-oss-20b", "scanned")
    array = next(a for a in plan.arrays if a.name.endswith("layers_1/GptOssMlp/wi_1"))
    piece = list(trace(array))[2]
    assert piece.tensor is not None
    assert plan.tensors[piece.tensor].name == "model.layers.5.mlp.experts.gate_up_proj"
    assert shown(piece.source, (32, 2880, 5760)) == "[:, :, 1:5760:2]"  # every second column, from the second on
    assert shown(piece.output, array.shape) == "[:, 2, :, :]"


def test_an_element_of_a_region_is_the_one_that_a_part_reads() -> None:
    for array in plan_of("gemma2-2b", "scanned").arrays:
        for piece, part in zip(trace(array), array.parts, strict=False):
            if piece.tensor is None or len(array.parts) != 1:
                continue
            stored = array.sources[0].stored
            corner = np.ravel_multi_index([r[0] for r in piece.source], stored.shape)
            assert corner == part.base, array.name
