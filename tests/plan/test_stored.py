"""Pieces written one by one, each where its place says, are the chunks that zarr describes."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptc.plan.stored import ALIGN, _places, axis_order
from plans import array as made_array


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, large chunks, and pieces of which at most one axis is cut into more than single indices."""
    rank = draw(st.integers(1, 4))
    partial = draw(st.integers(0, rank - 1))
    shape, stored, piece = [], [], []
    for axis in range(rank):
        kind = "partial" if axis == partial else draw(st.sampled_from(["whole", "single"]))
        unit = draw(st.integers(1, 3)) if kind != "single" else 1
        pieces = draw(st.integers(1, 3)) if kind != "whole" else 1
        chunks = draw(st.integers(1, 3))
        short = draw(st.integers(0, unit - 1)) if kind == "partial" and chunks == 1 and pieces > 1 else 0
        stored.append(unit * pieces - short)
        piece.append(unit)
        shape.append(stored[-1] * chunks)
    return tuple(shape), tuple(stored), tuple(piece)


@given(layouts())
def test_pieces_at_their_places_are_the_chunks(layout: tuple[tuple[int, ...], ...]) -> None:
    shape, stored, piece = layout
    values = np.arange(1, prod(shape) + 1, dtype=np.int32).reshape(shape)
    array = made_array("w", shape, "int32", piece, shape, (), (), stored=stored)
    found, order = _places(array, ALIGN), axis_order(piece, stored) or tuple(range(len(shape)))
    file = np.zeros(found.end, dtype=np.uint8)
    for corner in product(*(range(0, n, p) for n, p in zip(shape, piece, strict=True))):
        box = tuple(slice(c, c + p) for c, p in zip(corner, piece, strict=True))
        data = np.ascontiguousarray(values[box].transpose(order)).reshape(-1).view(np.uint8)
        at = found.at([c // p for c, p in zip(corner, piece, strict=True)])
        # Stored chunks of one along the axis may end before a whole piece does.
        file[at : at + data.size] = data
    for cell, corner in enumerate(product(*(range(0, n, s) for n, s in zip(shape, stored, strict=True)))):
        box = tuple(slice(c, c + s) for c, s in zip(corner, stored, strict=True))
        begin = found.begin + cell * found.step
        chunk = file[begin : begin + prod(stored) * 4].view(np.int32).reshape([stored[a] for a in order])
        assert (chunk.transpose(np.argsort(order)) == values[box]).all()
