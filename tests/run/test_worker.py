"""The worker: whatever the ops, chunks and units, the chunks are the array, and what is read is what was announced."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.ops.evaluate import Array, dtype_of, same
from tests.ops.strategies import Made, apply, chains, leaf

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.compile.schedule import account
from ckptc.diagnostics import InputError
from ckptc.ir.source import Checkpoint, SourceFile
from ckptc.ops import Add, Axis, Cast, Concat, Pad, ReshapeHeads, Scale, Slice, Stack, TensorType, Transpose
from ckptc.ops.codes import Code
from ckptc.ops.nest import Part, whole
from ckptc.plan import model
from ckptc.plan.model import Box, Plan
from ckptc.plan.order import Unit
from ckptc.run.readers import Readers
from ckptc.run.worker import Worker, constant
from ckptc.spec.mapping import load_mapping
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from ckptc.storage.source.ranges import RangeReader
from plans import array as made_array
from plans import operand

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
relaxed = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


# --- plans made by hand, and running them -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """How a leaf's tensors lie in the file, where that is not as numbers."""

    code: Code
    shape: Shape  # of the weight
    tensors: Sequence[Sequence[Array]]  # of each weight, the codes and what is beside them


@dataclass
class Ran:
    """The arrays a run made, by position in the plan, and what it took."""

    arrays: dict[int, Array] = field(default_factory=dict)
    bytes_read: int = 0
    reads: list[tuple[int, int]] = field(default_factory=list)  # (offset, bytes)
    held: int = 0  # bytes of the worker's buffers


class Recording(RangeReader):
    """Remembers every range it is asked for."""

    def __init__(self, directory: Path, files: Sequence[SourceFile]) -> None:
        super().__init__(directory, files)
        self.reads: list[tuple[int, int]] = []

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, buffer.nbytes))
        super().read_into(file, offset, buffer)


def write(directory: Path, tensors: dict[str, Array]) -> Checkpoint:
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, str(directory / "model.safetensors"))
    return open_checkpoint(directory)


def plan_for(directory: Path, made: Made, chunk: Shape, unit: Shape, stored: dict[int, Stored] | None = None) -> Plan:
    """The plan of one array, its source tensors written to a file."""
    tensors: dict[str, Array] = {}
    lists: list[list[tuple[str, ...]]] = []  # of each source, the names of its tensors and of those beside them
    for number, arrays in enumerate(made.sources):
        how = (stored or {}).get(number)
        columns = list(zip(*how.tensors, strict=True)) if how else [tuple(arrays)]
        named = [{f"{number}.{c}.{i}": t for i, t in enumerate(column)} for c, column in enumerate(columns)]
        for column in named:
            tensors |= column
        lists.append([tuple(column) for column in named])
    checkpoint = write(directory, tensors)
    position = {name: i for i, name in enumerate(checkpoint.tensors)}
    sources = []
    for number, (values, *others) in enumerate(lists):
        first, decode = checkpoint.tensors[values[0]], None
        if number in (stored or {}):
            how = (stored or {})[number]
            beside = []
            for column in others:
                found = [checkpoint.tensors[name] for name in column]
                most = max(found, key=lambda t: t.end - t.begin)
                beside.append(model.Beside(most.dtype, most.shape))
            decode = model.Decode(how.code.name, how.code.settings(), how.shape, tuple(beside))
        columns = [[position[n] for n in column] for column in others] if decode else []
        sources.append(operand(first.dtype, first.shape, [position[n] for n in values], decode, *columns))
    array = made_array("array", made.type.shape, made.type.dtype, chunk, unit, sources, made.parts)
    cost = account(array.kind)
    kinds, outputs = model.tabulated([array])
    files = tuple(model.File(f.name, f.size, f.header_digest) for f in checkpoint.files)
    return Plan(
        made=model.Made("", "", "", "", ""),
        choices=model.Choices("scanned", made.type.dtype, False, 1, "hub", {}),
        totals=model.Totals(1, len(tensors), made.type.size, cost.read, array.nbytes, cost.buffers),
        sources=(model.Source("safetensors", files),),
        layout=model.Orbax(),
        left_out=(),
        kinds=kinds,
        outputs=outputs,
        tensors=tuple(model.Tensor(t.name, t.file, t.begin, t.end) for t in checkpoint.tensors.values()),
    )


def run(plan: Plan, directory: Path) -> Ran:
    """Every unit of the plan, put together. Asserts that each chunk comes once, with the shape the grid gives it."""
    ran, seen = Ran(), set()

    def sink(number: int, box: Box, chunk: Array) -> None:
        array = plan.arrays[number]
        low = tuple(a for a, _ in box)
        index = tuple(a // c for a, c in zip(low, array.chunk, strict=True))
        high = tuple(min(a + c, n) for a, c, n in zip(low, array.chunk, array.shape, strict=True))
        assert chunk.shape == tuple(b - a for a, b in zip(low, high, strict=True)), f"chunk {index} is {chunk.shape}"
        assert chunk.dtype == dtype_of(array.dtype)
        assert (number, index) not in seen, f"chunk {index} comes twice"
        seen.add((number, index))
        if number not in ran.arrays:
            ran.arrays[number] = np.zeros(array.shape, chunk.dtype)
        ran.arrays[number][tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = chunk

    with Recording(directory, [SourceFile(f.name, f.size, f.header) for f in plan.sources[0].files]) as reader:
        worker = Worker(plan, Readers([reader]), sink, lambda: None)
        for number, array in enumerate(plan.arrays):
            made = sum(made for _, made in worker.make((0, Unit((number,), box)) for box in array.units()))
            assert made == array.nbytes
        ran.bytes_read, ran.reads = reader.bytes_read, reader.reads
        ran.held = worker.held_bytes
    for number, array in enumerate(plan.arrays):
        grid = np.prod([-(-n // c) for n, c in zip(array.shape, array.chunk, strict=True)], dtype=int)
        assert len([1 for other, _ in seen if other == number]) == grid
    return ran


def check(made: Made, chunk: Shape, unit: Shape, stored: dict[int, Stored] | None = None) -> Ran:
    """Runs a plan of one array. Asserts that it gives the ops' own result, and reads and holds what the plan says."""
    with tempfile.TemporaryDirectory() as name:
        plan = plan_for(Path(name), made, chunk, unit, stored)
        ran = run(plan, Path(name))
    assert same(ran.arrays[0], made.array), f"{ran.arrays[0]}\ninstead of\n{made.array}"
    assert ran.bytes_read == plan.totals.read_bytes
    assert ran.held <= plan.totals.peak_memory_bytes
    return ran


@st.composite
def cuts(draw: Draw, shape: Shape) -> tuple[Shape, Shape]:
    """A chunk, and a unit of some whole chunks or up to the edge."""
    chunk = tuple(draw(st.integers(1, n)) for n in shape)
    return chunk, tuple(min(n, c * draw(st.integers(1, 3))) for c, n in zip(chunk, shape, strict=True))


def typed(dtype: str, **sizes: int) -> TensorType:
    return TensorType(tuple(Axis(n, s) for n, s in sizes.items()), dtype)


# --- any ops, any units -----------------------------------------------------------------------------------------------


@relaxed
@given(data=st.data())
def test_the_chunks_of_any_ops_are_what_the_ops_give(data: st.DataObject) -> None:
    made = data.draw(chains())
    check(made, *data.draw(cuts(made.type.shape)))


def test_chunks_at_the_edge_are_cut_short() -> None:
    made = apply(Transpose(("b", "a")), [leaf(typed("bfloat16", a=7, b=5), 1, 0, 0)])
    check(made, (2, 3), (4, 6))
    check(made, (5, 3), (5, 3))


def test_a_scalar_is_one_chunk() -> None:
    check(leaf(typed("float32"), 1, 0, 0), (), ())


def test_tensors_of_a_list_stack_anywhere() -> None:
    """Layers and experts, two axes of tensors, on both sides of the tensors' own."""
    made = leaf(typed("bfloat16", layer=2, expert=3, a=4, b=6), 1, 0, 2)
    check(apply(Transpose(("expert", "b", "layer", "a")), [made]), (2, 4, 1, 2), (2, 4, 2, 4))


def test_parts_of_several_sources_meet_in_one_chunk() -> None:
    parts = [leaf(typed("float16", a=n, b=4), n, i, 0) for i, n in enumerate((3, 1, 5))]
    check(apply(Concat("a"), parts), (2, 4), (4, 4))
    check(apply(Stack("n"), [leaf(typed("float16", a=5), n, n, 0) for n in range(3)]), (2, 5), (3, 5))


def test_padding_is_zeros_even_where_buffers_were_used_before() -> None:
    made = apply(Pad("a", 9), [leaf(typed("bfloat16", a=4, b=3), 1, 0, 0)])
    check(made, (2, 3), (4, 3))
    check(apply(Transpose(("b", "a")), [made]), (3, 4), (3, 4))


def test_a_constant_goes_through_the_arithmetic_too() -> None:
    """A pad is 0 · 3 + 0.1, rounded as the others are."""
    made = apply(Pad("a", 5), [leaf(typed("float32", a=2), 1, 0, 0)])
    for op in (Scale(3.0), Add(0.1), Cast("bfloat16"), Scale(7.0), Cast("float16")):
        made = apply(op, [made])
    assert made.array[-1] == np.float16(ml_dtypes.bfloat16(0.1) * np.float32(7))
    check(made, (2,), (4,))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(("scale", 3.0), 1.5), (("unscale", 3.0), np.float32(0.5) / np.float32(3)), (("add", 0.25), 0.75)],
)
def test_a_constant_knows_every_step(step: tuple[str, float], expected: float) -> None:
    assert constant(Part(None, 0, 0, (), (step,), 0.5), "float32") == np.float32(expected)


@pytest.mark.parametrize("value", [1.0, 0.1, -0.0])
def test_a_fill_reads_nothing(value: float) -> None:
    type_ = typed("float32", a=3, b=4)
    part = Part(None, 0, 0, tuple(whole(a.size, 0) for a in type_.axes), (), value)
    made = apply(Cast("bfloat16"), [Made(type_, np.full((3, 4), value, np.float32), [part])])
    assert check(made, (2, 3), (2, 3)).reads == []


def test_whole_numbers_keep_all_their_digits() -> None:
    made = apply(Transpose(("b", "a")), [leaf(typed("int64", a=3, b=4), 1, 0, 0)])
    check(made, (2, 2), (4, 3))


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_unit_of_rows_is_one_read() -> None:
    made = leaf(typed("float32", a=8, b=6), 1, 0, 0)
    assert [size for _, size in check(made, (2, 6), (4, 6)).reads] == [4 * 6 * 4] * 2


def test_a_unit_reads_only_the_tensors_it_needs() -> None:
    made = leaf(typed("float32", layer=4, a=5), 1, 0, 1)
    assert [size for _, size in check(made, (1, 5), (2, 5)).reads] == [5 * 4] * 4


def test_interleaved_rows_are_read_in_one_piece_with_those_between() -> None:
    """Every other row: less is wasted by reading one row in vain than by a read for each."""
    made = leaf(typed("bfloat16", a=8, b=6), 1, 0, 0)
    rows = apply(ReshapeHeads("a", (Axis("pair", 4), Axis("odd", 2))), [made])
    gate = apply(Slice((("odd", 0, None),)), [rows])
    assert [size for _, size in check(gate, (2, 6), (4, 6)).reads] == [7 * 6 * 2]


def test_distant_rows_are_read_apart() -> None:
    made = leaf(typed("bfloat16", a=9, b=6), 1, 0, 0)
    rows = apply(ReshapeHeads("a", (Axis("m", 3), Axis("n", 3))), [made])
    ran = check(apply(Slice((("n", 1, None),)), [rows]), (3, 6), (3, 6))
    assert [size for _, size in ran.reads] == [6 * 2] * 3


def test_a_truncated_file_is_reported(tmp_path: Path) -> None:
    made = leaf(typed("float32", a=8, b=6), 1, 0, 0)
    plan = plan_for(tmp_path, made, (8, 6), (8, 6))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError) as caught:
        run(plan, tmp_path)
    assert caught.value.diagnostics[0].code == "source-truncated"


class Telling(RangeReader):
    """Tells of each range that it has read."""

    def __init__(self, directory: Path, files: Sequence[SourceFile], ranges: int) -> None:
        super().__init__(directory, files)
        self.read = [threading.Event() for _ in range(ranges)]
        self._next = iter(self.read)

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        super().read_into(file, offset, buffer)
        next(self._next).set()


def test_a_unit_is_read_while_the_one_before_is_made_and_what_is_lent_stays(tmp_path: Path) -> None:
    """Chunks that lie where they were read: two units later, their buffer is read into again."""
    made = leaf(typed("float32", a=64, b=16), 1, 0, 0)
    plan = plan_for(tmp_path, made, (16, 16), (16, 16))
    lent: list[tuple[int, Array]] = []
    found = np.zeros((64, 16), np.float32)

    def settle() -> None:
        for row, chunk in lent:
            found[16 * row : 16 * row + 16] = chunk
        lent.clear()

    def sink(number: int, box: Box, chunk: Array) -> None:
        row = box[0][0] // 16
        assert reader.read[min(row + 1, 3)].wait(30), "the next unit is not read"
        settle()
        lent.append((row, chunk))

    with Telling(tmp_path, [SourceFile(f.name, f.size, f.header) for f in plan.sources[0].files], 4) as reader:
        units = ((7 + n, Unit((0,), box)) for n, box in enumerate(plan.arrays[0].units()))
        done = list(Worker(plan, Readers([reader]), sink, settle).make(units))
    settle()
    assert done == [(7 + n, 16 * 16 * 4) for n in range(4)]
    assert same(found, made.array)


def test_buffers_are_made_once() -> None:
    """Four equal units: the worker holds what two need, of which one is read while the other is made."""
    made = leaf(typed("float32", a=64, b=16), 1, 0, 0)
    assert check(made, (16, 16), (16, 16)).held == 2 * 16 * 16 * 4


# --- from a mapping ---------------------------------------------------------------------------------------------------

MAPPING = """
family: tiny
target: maxtext
extra: true
dims:
  { layers: 3, experts: 2, embed: 80, mlp: 24, heads: 4, head_dim: 6, vocab: 20, padded_vocab: 23,
    hidden: 96, wi: 2 }
models: { tiny: { repo: none/tiny } }
config: { quantization_config: { quant_method: fp8, weight_block_size: [16, 32] } }
tensors:
  embedding: { from: embed.weight, as: vocab embed, ops: [{ scale: sqrt(embed) }, { pad: { vocab: padded_vocab } }] }
blocks:
  decoder:
    source: layers.{{ layer }}
    scanned: [{ at: layers, stack: { layer: layers } }]
    unscanned: [{ at: "layers_{{ layer }}", for: { layer: layers } }]
    tensors:
      query: { from: q.weight, as: (heads head_dim) embed -> embed heads head_dim, ops: [{ permute_rope: head_dim }] }
      norm: { from: norm.weight, as: embed, ops: [{ add: 1 }], dtype: float32 }
      out: { from: o.weight, as: embed mlp, ops: [{ transpose: mlp embed }] }
      down:
        stack: { expert: experts }
        from: "{{ expert }}.down.weight"
        as: embed mlp -> expert mlp embed
        ops: [{ scale: 0.5 }]
      "{{ wi }}":
        for: { wi: { gate: 0, up: 1 } }
        from: gate_up
        as: experts hidden (mlp wi) -> experts hidden mlp wi
        ops: [{ slice: { wi: wi.value } }]
"""


def test_a_mapping_of_plain_interleaved_and_quantised_tensors(tmp_path: Path) -> None:
    """Compiled from YAML, with the headers of a real file: every array as numpy makes it, every byte as announced."""
    file = tmp_path / "tiny.yaml"
    file.write_text(MAPPING, encoding="utf-8")
    tensors = tiny_tensors()
    checkpoint = write(tmp_path, tensors)
    mapping = load_mapping(file)
    for layout in ("scanned", "unscanned"):
        for memory in (1 << 12, 1 << 30):
            plan = compile_plan(mapping, mapping.models["tiny"], Options(layout=layout, memory=memory), checkpoint)
            ran = run(plan, tmp_path)
            assert ran.bytes_read == plan.totals.read_bytes
            assert ran.held <= plan.totals.peak_memory_bytes
            expected = tiny_arrays(tensors)
            for number, array in enumerate(plan.arrays):
                assert same(ran.arrays[number], expected(array.path)), array.name


def tiny_tensors() -> dict[str, Array]:
    def random(name: str, dtype: str, *shape: int) -> Array:
        rng = np.random.default_rng(sum(map(ord, name)))
        if dtype == "uint8":
            return rng.integers(*((100, 140) if "scales" in name else (0, 256)), shape, np.uint8)
        return rng.standard_normal(shape, np.float32).astype(dtype_of(dtype))

    out = {"embed.weight": random("embed", "bfloat16", 20, 80)}
    for layer in range(3):
        at = f"layers.{layer}."
        shapes: dict[str, tuple[str, Shape]] = {
            "q.weight": ("bfloat16", (24, 80)),
            "norm.weight": ("bfloat16", (80,)),
            "gate_up_blocks": ("uint8", (2, 48, 3, 16)),
            "gate_up_scales": ("uint8", (2, 48, 3)),
        }
        for fp8 in ("o", "0.down", "1.down"):
            shapes |= {f"{fp8}.weight": ("float8_e4m3fn", (80, 24)), f"{fp8}.scale": ("float32", (5, 1))}
        out |= {at + name: random(at + name, dtype, *shape) for name, (dtype, shape) in shapes.items()}
    return out


def tiny_arrays(tensors: dict[str, Array]) -> Callable[[tuple[str, ...]], Array]:
    bf16 = ml_dtypes.bfloat16

    def block_fp8(name: str) -> Array:
        scales = tensors[name + ".scale"].repeat(16, 0).repeat(32, 1)[:80, :24]
        return tensors[name + ".weight"].astype(np.float32) * scales

    def one(name: str, layer: int) -> Array:
        at = f"layers.{layer}."
        if name == "query":
            halves = tensors[at + "q.weight"].reshape(4, 2, 3, 80)
            return halves.transpose(3, 0, 2, 1).reshape(80, 4, 6)
        if name == "norm":
            return tensors[at + "norm.weight"].astype(np.float32) + np.float32(1)
        if name == "out":
            return block_fp8(at + "o").astype(bf16).T
        if name == "down":
            return np.stack([(block_fp8(f"{at}{e}.down") * np.float32(0.5)).astype(bf16).T for e in range(2)])
        blocks, scales = tensors[at + "gate_up_blocks"], tensors[at + "gate_up_scales"]
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
        pairs = values[np.stack([blocks & 15, blocks >> 4], -1)].reshape(2, 48, 3, 32)
        numbers = (pairs * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(2, 48, 96).astype(bf16)
        return numbers[:, 0 if name == "gate" else 1 :: 2].transpose(0, 2, 1)

    def array(path: tuple[str, ...]) -> Array:
        name = path[-1]
        if name == "embedding":
            scaled = (tensors["embed.weight"].astype(np.float32) * np.float32(80**0.5)).astype(bf16)
            return np.concatenate([scaled, np.zeros((3, 80), bf16)])
        if path[-2] == "layers":
            return np.stack([one(name, layer) for layer in range(3)], axis=1)
        return one(name, int(path[-2].removeprefix("layers_")))

    return array
