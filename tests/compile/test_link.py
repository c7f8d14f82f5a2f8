"""Chunks for links: as large as they may be, aligned where that is worth it, and none where copying is better."""

from __future__ import annotations

import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.link import LEAST, MOST, choose
from ckptc.compile.options import Options
from ckptc.ops.nest import AxisMap, Factor, Part, whole
from ckptc.plan.links import linked_bytes
from ckptc.plan.model import Content, Stored
from ckptc.spec.mapping import find_model

BUDGET = 64 << 20
EMBED, MLP = 4096, 14336
KERNEL = Stored("bfloat16", (MLP, EMBED), 32)


def content(shape: tuple[int, ...], source: Stored, parts: tuple[Part, ...]) -> Content:
    return Content(shape, source.dtype, (source,), parts)


def test_a_transposed_stack_is_cut_along_what_its_source_stores_slowest() -> None:
    turned = Part(0, 0, 0, (whole(EMBED, 1), whole(32, 0, 1), whole(MLP, EMBED)))
    chunk, order = choose(content((EMBED, 32, MLP), KERNEL, (turned,)), (16, 1, 1), BUDGET) or ((), ())
    assert chunk == (EMBED, 1, 2048) and order == (1, 2, 0)
    assert 2048 * EMBED * 2 <= MOST


def test_no_transposition_is_stated_where_there_is_none() -> None:
    plain = Part(0, 0, 0, (whole(MLP, EMBED), whole(32, 0, 1), whole(EMBED, 1)))
    chunk, order = choose(content((MLP, 32, EMBED), KERNEL, (plain,)), (1, 1, 1), BUDGET) or ((), ())
    assert chunk == (2048, 1, EMBED) and order == (0, 1, 2)


def test_shards_are_whole_chunks_where_the_source_is_cut_so() -> None:
    plain = Part(0, 0, 0, (whole(MLP, EMBED), whole(EMBED, 1)))
    chunk, _ = choose(content((MLP, EMBED), KERNEL, (plain,)), (16, 1), BUDGET) or ((), ())
    assert chunk == (MLP // 16, EMBED)


def test_chunks_end_where_padding_begins_if_they_stay_large() -> None:
    def padded(rows: int, size: int) -> tuple[int, ...]:
        parts = (
            Part(0, 0, 0, (whole(rows, EMBED), whole(EMBED, 1))),
            Part(None, 0, 0, (AxisMap(rows, (Factor(size - rows, 1, 0),)), whole(EMBED, 0))),
        )
        source = Stored("bfloat16", (rows, EMBED))
        return (choose(content((size, EMBED), source, parts), (1, 1), BUDGET) or ((), ()))[0]

    assert padded(128256, 128512) == (256, EMBED)
    assert padded(128256, 128260) == (2004, EMBED)  # 4 rows of 8 kB are too small: the last chunk straddles


@pytest.mark.parametrize("budget", [4 << 20, 16 << 20, BUDGET])
def test_a_chunk_that_must_be_made_fits_in_the_budget_four_times(budget: int) -> None:
    """As it is read, made while another is written, and as that is turned into the order that it is stored in."""
    rows, size = 128256, 128260
    parts = (
        Part(0, 0, 0, (whole(EMBED, 1), whole(rows, EMBED))),
        Part(None, 0, 0, (whole(EMBED, 0), AxisMap(rows, (Factor(size - rows, 1, 0),)))),
    )
    source = Stored("bfloat16", (rows, EMBED))
    chunk, order = choose(content((EMBED, size), source, parts), (1, 1), budget) or ((), ())
    assert order == (1, 0) and 4 * chunk[0] * chunk[1] * 2 <= budget


def test_what_lies_in_small_pieces_is_copied() -> None:
    """A permutation inside of heads leaves single rows of 8 kB."""
    inside = AxisMap(0, (Factor(64, 2, EMBED), Factor(2, 1, 64 * EMBED)))
    rope = Part(0, 0, 0, (whole(EMBED, 1), whole(32, 128 * EMBED), inside))
    assert EMBED * 2 < LEAST
    source = Stored("bfloat16", (EMBED, EMBED))
    assert choose(content((EMBED, 32, 128), source, (rope,)), (1, 1, 1), BUDGET) is None


def test_whole_tensors_are_linked_however_small() -> None:
    norm = Part(0, 0, 0, (whole(128, 1), whole(32, 0, 1)))
    source = Stored("bfloat16", (128,), 32)
    assert choose(content((128, 32), source, (norm,)), (1, 1), BUDGET) == ((128, 1), (0, 1))


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
@pytest.mark.parametrize(
    ("name", "least"), [("qwen3-235b-a22b", 1.0), ("deepseek3-671b", 0.9999999), ("gemma3-4b", 0.8)]
)
def test_models_are_linked_but_for_their_arithmetic(name: str, layout: str, least: float) -> None:
    plan = compile_plan(*find_model(name), Options(layout=layout, link=True))
    assert plan.totals.linked_bytes >= least * plan.totals.write_bytes
    copied = [a for a in plan.arrays if not linked_bytes(a.kind)]
    assert all(part.math for a in copied for part in a.parts if part.source is not None)
    assert plan.totals.peak_memory_bytes <= BUDGET
