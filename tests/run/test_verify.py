"""Verification: what is right passes, and whatever is wrong with one bit does not."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from msgspec.structs import replace

import ckptc
from ckptc.cli.main import run as command
from ckptc.compile.recompile import recompiled_graph
from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.graph import Graph, Target, leaves
from ckptc.ir.source import Checkpoint
from ckptc.ops.types import itemsize
from ckptc.plan.json import dumps
from ckptc.plan.model import Plan
from ckptc.run import reference, runner, worker
from ckptc.run.runner import Settings
from ckptc.run.verify import Verified, _compare_chunk, _Difference, check_sums, compare
from ckptc.spec import mapping as spec
from ckptc.storage.checkpoint.restored import open_restored
from golden import checkpoint_of, compile_case, known_cases
from plans import altered, with_arrays
from reference import GoldenCase, read_safetensors

# Stacked and not, with experts, with arithmetic and padding, decoded from 8 and from 4 bits, with towers.
VARIED = ["gemma2.scan", "llama3_1.unscan", "qwen3_moe.scan", "deepseek3.scan", "gpt_oss.scan", "gemma3_mm.unscan"]
CASES_BY_ID = {case.id: case for case in known_cases()}
CASE = CASES_BY_ID["gemma2.scan"]
NORM = "params/params/decoder/decoder_norm/scale"
EMBEDDING = "params/params/token_embedder/embedding"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def digest_of(plan: Plan) -> str:
    digest: str = json.loads(dumps(plan))["digest"]
    return digest


def convert(plan: Plan, source: Path, output: Path, jobs: int = 1) -> Path:
    runner.run(plan, digest_of(plan), output, source, settings=Settings(jobs=jobs))
    return output / "0"


def graph_of(plan: Plan, source: Path) -> Graph:
    return recompiled_graph(plan, *spec.find_model(plan.made.model), checkpoint_of(source))


def verify(plan: Plan, source: Path, step: Path) -> Verified:
    return compare(graph_of(plan, source), [f.name for f in plan.sources[0].files], source, step)


def found(what: Callable[[], object]) -> list[Diagnostic]:
    with pytest.raises(InputError) as caught:
        what()
    return list(caught.value.diagnostics)


@pytest.fixture
def plan() -> Plan:
    return compile_case(CASE)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(compile_case(CASE), CASE.hf, tmp_path_factory.mktemp("converted") / "out")


@pytest.fixture
def step(converted: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "out" / "0"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CASE.hf, tmp_path / "source"))


def change_source(source: Path, name: str, element: int, bits: int) -> None:
    """Writes one bfloat16 of a tensor, in place: size and header, and so the plan, stay."""
    tensor = checkpoint_of(CASE.hf).tensors[name]
    file = source / checkpoint_of(CASE.hf).files[tensor.file].name
    with open(file, "r+b") as opened:
        opened.seek(tensor.begin + 2 * element)
        opened.write(bits.to_bytes(2, "little"))


# --- against the source -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [reference.BLOCK, 1], ids=["whole arrays", "block by block"])
@pytest.mark.parametrize("id_", VARIED)
def test_what_a_run_writes_is_right(id_: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptc.run.verify._block", lambda jobs, memory: block)
    case = CASES_BY_ID[id_]
    plan = compile_case(case, memory=20_000)
    step = convert(plan, case.hf, tmp_path / "out")
    right = Verified(len(plan.arrays), plan.totals.write_bytes)
    assert verify(plan, case.hf, step) == right
    assert check_sums(step) == right


def test_one_wrong_element_is_found_with_its_place_and_both_values(plan: Plan, source: Path, step: Path) -> None:
    """The source is another one than was converted, by one element of a norm: 1 + w, in float32."""
    change_source(source, "model.norm.weight", 5, 0x3F80)  # 1.0
    stored = np.asarray(open_restored(step / "items")[NORM].store[5].read().result())
    (problem,) = found(lambda: verify(plan, source, step))
    assert problem.code == "output-differs"
    assert (
        problem.message == f"1 of {dict(plan.choices.dims)['embed']} elements of `{NORM}` is not what the source gives"
    )
    bits = f"0x{stored.tobytes()[::-1].hex()}"
    expected = "2.0 (0x40000000)" if stored.dtype == np.float32 else "2 (0x4000)"
    assert problem.notes == ("first index: [5]", f"expected: {expected}", f"found: {stored!s} ({bits})")


@pytest.mark.parametrize("block", [reference.BLOCK, 1], ids=["whole arrays", "block by block"])
def test_every_wrong_element_is_counted_and_the_first_is_the_first(
    source: Path, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An element of each of two stacked layers; blocks come layer by layer, indices go by the array's axes."""
    monkeypatch.setattr(reference, "BLOCK", block)
    plan = compile_case(CASE, memory=2048)  # chunks of one layer
    step = convert(plan, CASE.hf, tmp_path / "out")
    target = next(
        t for t in graph_of(plan, CASE.hf).targets
        if len(t.path) > 4 and t.path[-1] == "kernel" and len(leaves(t.node)[0].tensors) > 1
    )  # fmt: skip
    tensors = leaves(target.node)[0].tensors
    for element, name in zip((7, 0), tensors[-2:], strict=True):
        change_source(source, name, element, 0x7F80)  # infinity
    (problem,) = found(lambda: verify(plan, source, step))
    assert problem.message.startswith("2 of ") and "/".join(target.path) in problem.message
    whole = reference.make(target.node, reference.Tensors(source, [f.name for f in plan.sources[0].files]))
    places = np.argwhere(~np.isfinite(whole.astype(np.float32)))
    assert len(places) == 2 and problem.notes[0] == f"first index: {places.tolist()[0]}"
    stored = next(a for a in plan.arrays if a.path == target.path)
    blocks = list(reference.blocks(target, stored.chunk, block))
    assert len(blocks) > len(tensors) if block == 1 else len(blocks) == 1


def _block_sizes(target: Target, chunk: tuple[int, ...], most: int) -> list[int]:
    boxes = [box for box, _ in reference.blocks(target, chunk, most)]
    return [prod(high - low for low, high in box) * itemsize(target.type.dtype) for box in boxes]


@pytest.mark.parametrize("most", [1, 500, 4000, 1 << 20])
def test_blocks_are_no_larger_than_they_may_be(most: int) -> None:
    plan = compile_case(CASE, memory=2048)
    for target, stored in zip(graph_of(plan, CASE.hf).targets, plan.arrays, strict=True):
        sizes, least = (_block_sizes(target, stored.chunk, n) for n in (most, 1))
        assert sum(sizes) == target.type.nbytes
        # An axis that an op mixes stays whole, and chunks are; a block may end with one that is begun.
        assert max(sizes) <= max(2 * most, max(least))


def test_threads_find_what_one_finds(plan: Plan, source: Path, tmp_path: Path) -> None:
    step = convert(plan, CASE.hf, tmp_path / "out")
    graph, names = graph_of(plan, source), [f.name for f in plan.sources[0].files]
    one, several = (compare(graph, names, source, step, jobs=jobs, memory=1 << 20) for jobs in (1, 3))
    assert one == several
    change_source(source, leaves(graph.targets[0].node)[0].tensors[0], 3, 0x7F80)
    problems = [found(lambda jobs=jobs: compare(graph, names, source, step, jobs=jobs)) for jobs in (1, 3)]
    assert problems[0] == problems[1] and problems[0][0].code == "output-differs"


def test_a_fault_in_the_executor_is_found_and_nothing_is_committed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = worker.Worker._make_piece
    (embedding,) = (a.kind for a in plan.arrays if a.name == EMBEDDING)

    def faulty(self: Any, number: int, *rest: Any) -> Any:
        chunk = np.array(made(self, number, *rest))
        if plan.kinds[number] == embedding:
            chunk.view(np.uint8).reshape(-1)[0] ^= 1
        return chunk

    monkeypatch.setattr(worker.Worker, "_make_piece", faulty)
    output = tmp_path / "out"

    def check(step: Path) -> None:
        check_sums(step)  # they are of what was written, right or wrong
        verify(plan, CASE.hf, step)

    (problem,) = found(
        lambda: runner.run(plan, digest_of(plan), output, CASE.hf, settings=Settings(1), before_commit=check)
    )
    assert problem.code == "output-differs" and EMBEDDING in problem.message
    assert not (output / "0").exists()


@pytest.fixture
def quantised(tmp_path: Path) -> tuple[GoldenCase, Checkpoint]:
    """A checkpoint whose experts are stored in 8 bits, each tensor with scales of its own, as DeepSeek publishes."""
    case, header, data = CASES_BY_ID["deepseek3.scan"], dict[str, Any](), bytearray()
    rng = np.random.default_rng(5)

    def add(name: str, dtype: str, array: Any) -> None:
        content = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(content)]}
        data.extend(content)

    names = {"bfloat16": "BF16", "float32": "F32"}
    for file in sorted(case.hf.glob("*.safetensors")):
        for name, array in read_safetensors(file).items():
            if ".experts." in name:
                add(name, "F8_E4M3", array.astype(ml_dtypes.float8_e4m3fn))
                add(f"{name}_scale_inv", "F32", rng.uniform(0.1, 9, [-(-n // 128) for n in array.shape]).astype("<f4"))
            else:
                add(name, names[array.dtype.name], array)
    text = json.dumps(header).encode()
    hf = tmp_path / "quantised"
    hf.mkdir()
    shutil.copy(case.hf / "config.json", hf)
    (hf / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return dataclasses.replace(case, hf=hf), checkpoint_of(hf)


@pytest.mark.parametrize("block", [reference.BLOCK, 1], ids=["whole arrays", "block by block"])
def test_what_is_decoded_is_right(
    quantised: tuple[GoldenCase, Checkpoint], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BLOCK", block)
    case, _ = quantised
    plan = compile_case(case, memory=20_000)
    assert any(s.stored.decode and len(s.tensors) > 4 for a in plan.arrays for s in a.sources)
    assert verify(plan, case.hf, convert(plan, case.hf, tmp_path / "out")).arrays == len(plan.arrays)


def test_a_wrong_scale_is_found(quantised: tuple[GoldenCase, Checkpoint], tmp_path: Path) -> None:
    case, checkpoint = quantised
    plan = compile_case(case)
    step = convert(plan, case.hf, tmp_path / "out")
    scale = next(t for name, t in checkpoint.tensors.items() if name.endswith("_scale_inv"))
    with open(case.hf / "model.safetensors", "r+b") as opened:
        opened.seek(scale.begin)
        opened.write(np.float32(3).tobytes())
    (problem,) = found(lambda: verify(plan, case.hf, step))
    assert problem.code == "output-differs" and "MoeBlock" in problem.message


def tree(step: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = step / "items" / "_METADATA"
    metadata = json.loads(path.read_text())
    change(metadata["tree_metadata"])
    path.write_text(json.dumps(metadata))


def leaf(name: str) -> str:
    return str(tuple(name.split("/")))


@pytest.mark.parametrize("against", ["source", "checksums"])
def test_an_array_that_is_not_there_is_missed(plan: Plan, step: Path, against: str) -> None:
    tree(step, lambda leaves: leaves.pop(leaf(NORM)))
    (problem,) = found(lambda: verify(plan, CASE.hf, step) if against == "source" else check_sums(step))
    assert (problem.code, problem.message) == ("missing-array", f"the checkpoint has no array `{NORM}`")


@pytest.mark.parametrize("against", ["source", "checksums"])
def test_an_array_that_nothing_made_is_found(plan: Plan, step: Path, against: str) -> None:
    store = open_restored(step / "items")[NORM].store
    other = {**store.spec(retain_context=False).to_json(), "create": True}
    other["kvstore"]["path"] = "params.params.stranger/"
    import tensorstore as ts

    ts.open(other).result().write(0).result()
    change = {"key_metadata": [{"key": k, "key_type": 2} for k in ("params", "params", "stranger")]}

    def add(leaves: dict[str, Any]) -> None:
        leaves[leaf("params/params/stranger")] = {**leaves[leaf(NORM)], **change}

    tree(step, add)
    (problem,) = found(lambda: verify(plan, CASE.hf, step) if against == "source" else check_sums(step))
    assert problem.code == "extra-array" and "params/params/stranger" in problem.message


def test_arrays_of_another_dtype_are_other_arrays(plan: Plan, tmp_path: Path) -> None:
    step = convert(compile_case(CASE, dtype="float16"), CASE.hf, tmp_path / "out")
    problems = found(lambda: verify(plan, CASE.hf, step))
    assert {p.code for p in problems} == {"wrong-array"}
    of_embedding = next(p for p in problems if EMBEDDING in p.message)
    assert [n.split("[")[0] for n in of_embedding.notes] == ["expected: bfloat16", "found: float16"]


BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("expected", "stored", "wrong"),
    [
        (np.array([0.0, 1], dtype=np.float32), np.array([-0.0, 1], dtype=np.float32), 1),
        (np.array([np.nan, np.nan]), np.array([np.nan, np.nan]), 0),
        (np.array([0x7FC0, 0x7FC0], dtype=np.uint16).view(BF16), np.array([0x7FC1, 0x7FC0], np.uint16).view(BF16), 1),
        (np.array([1, 2], dtype=ml_dtypes.float8_e4m3fn), np.array([2, 2], dtype=ml_dtypes.float8_e4m3fn), 1),
        (np.array([True, False]), np.array([True, True]), 1),
        (np.array([1, 1j]), np.array([1, -1j]), 1),
        (np.array(3), np.array(3), 0),
    ],
    ids=["zeros have signs", "NaN is NaN", "NaNs differ", "8 bits", "booleans", "complex", "no axes"],
)
def test_elements_are_compared_as_bits(expected: Any, stored: Any, wrong: int) -> None:
    difference = _Difference()
    _compare_chunk(expected, stored, (0,) * expected.ndim, difference)
    assert difference.elements == wrong


def test_it_shares_nothing_with_the_executor() -> None:
    """No folded parts, no byte ranges, no kernel: or a fault in them might be on both sides."""
    root, seen, rest = Path(ckptc.__file__).parents[1], set[str](), ["ckptc.run.reference", "ckptc.run.verify"]
    while rest:
        module = rest.pop()
        path = root / f"{module.replace('.', '/')}.py"
        if module in seen or not path.exists():
            continue
        seen.add(module)
        if module.startswith("ckptc.run."):  # what these use further, ops and graph, has its own laws
            tops = list(ast.walk(ast.parse(path.read_text("utf-8"))))
            rest += [n.module for n in tops if isinstance(n, ast.ImportFrom) and n.module]
            rest += [f"{n.module}.{a.name}" for n in tops if isinstance(n, ast.ImportFrom) for a in n.names]
    assert {m for m in seen if m.startswith("ckptc.run.")} == {"ckptc.run.reference", "ckptc.run.verify"}
    assert not seen & {
        "ckptc.plan.reads",
        "ckptc.plan.model",
        "ckptc.compile.fold",
        "ckptc.storage.checkpoint.orbax_writer",
    }


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_", VARIED)
def test_blocks_cover_each_array_once_and_are_what_the_whole_is(id_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK", 1)
    case = CASES_BY_ID[id_]
    plan = compile_case(case, memory=20_000)
    tensors = reference.Tensors(case.hf, [f.name for f in plan.sources[0].files])
    for array, target in zip(plan.arrays, graph_of(plan, case.hf).targets, strict=True):
        whole = reference.make(target.node, tensors)
        covered = np.zeros(whole.shape, dtype=int)
        for box, node in reference.blocks(target, array.chunk):
            at = tuple(slice(low, high) for low, high in box)
            assert all(low % c == 0 for (low, _), c in zip(box, array.chunk, strict=True))
            assert reference.make(node, tensors).tobytes() == np.ascontiguousarray(whole[at]).tobytes()
            covered[at] += 1
        assert (covered == 1).all()


@pytest.mark.parametrize("id_", ["gemma2.scan", "qwen3_moe.scan", "deepseek3.scan"])
def test_a_block_of_a_stack_needs_few_tensors(id_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each point of the layers and experts that its chunks hold."""
    monkeypatch.setattr(reference, "BLOCK", 1)
    case, stacks = CASES_BY_ID[id_], 0
    plan = compile_case(case, memory=20_000)
    for target in graph_of(plan, case.hf).targets:
        grid = [a.name for a in leaves(target.node)[0].grid]
        ones = tuple(1 if a.name in grid else a.size for a in target.type.axes)
        if prod(target.type.shape) == prod(ones):
            continue
        stacks += 1
        for box, node in reference.blocks(target, ones):
            assert all(len(one.tensors) == 1 for one in leaves(node)), target.path
            assert prod(high - low for low, high in box) == prod(ones)
    assert stacks > 5


def test_blocks_are_as_large_as_the_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arrays are not read layer by layer: each chunk would be read many times."""
    plan = compile_case(CASE)
    target = next(t for t in graph_of(plan, CASE.hf).targets if len(leaves(t.node)[0].tensors) > 2)
    chunk = tuple(1 if a.name in {g.name for g in leaves(target.node)[0].grid} else a.size for a in target.type.axes)
    assert len(list(reference.blocks(target, chunk))) == 1
    count = len(leaves(target.node)[0].tensors)
    monkeypatch.setattr(reference, "BLOCK", target.type.nbytes // count * 2)
    assert len(list(reference.blocks(target, chunk))) == -(-count // 2)


# --- the mapping, once more -------------------------------------------------------------------------------------------


def test_another_mapping_than_the_plans_is_refused(plan: Plan) -> None:
    other = replace(plan, made=replace(plan.made, mapping="sha256:" + "0" * 64))
    (problem,) = found(lambda: graph_of(other, CASE.hf))
    assert problem.code == "mapping-changed" and problem.notes == (
        f"expected: {other.made.mapping}",
        f"found:    {plan.made.mapping}",
    )


def test_another_config_than_the_plans_is_refused(plan: Plan) -> None:
    """A plan records its dims; arrays that differ all the same come from what the mapping asks of config.json."""
    array = altered(plan.arrays[0], shape=(99,))
    other = with_arrays(plan, (array, *plan.arrays[1:]))
    (problem,) = found(lambda: graph_of(other, CASE.hf))
    assert problem.code == "config-changed" and plan.arrays[0].name in problem.message


def test_dims_that_were_set_are_set_again(plan: Plan, tmp_path: Path) -> None:
    """The cases set `padded_vocab`; without it the embedding would have another shape."""
    assert dict(plan.choices.dims)["padded_vocab"] != checkpoint_of(CASE.hf).config["vocab_size"]
    target = next(t for t in graph_of(plan, CASE.hf).targets if "/".join(t.path) == EMBEDDING)
    assert dict(plan.choices.dims)["padded_vocab"] in target.type.shape


# --- checksums --------------------------------------------------------------------------------------------------------


def stored_sums(step: Path) -> dict[str, str]:
    sums: dict[str, str] = json.loads((step / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["ckptc"][
        "checksums"
    ]
    return sums


def data_files(step: Path) -> Iterator[Path]:
    """The files that hold chunks: the largest of each writer."""
    for process in sorted((step / "items").glob("ocdbt.process_*")):
        yield max((process / "d").iterdir(), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_checksums_do_not_depend_on_the_number_of_jobs(plan: Plan, converted: Path, jobs: int, tmp_path: Path) -> None:
    assert stored_sums(convert(plan, CASE.hf, tmp_path / "out", jobs)) == stored_sums(converted)
    assert set(stored_sums(converted)) == {a.name for a in plan.arrays}


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_on_disk_is_found_with_its_array(plan: Plan, step: Path, seed: int) -> None:
    (file,) = data_files(step)
    at = int(np.random.default_rng(seed).integers(plan.totals.write_bytes * 9 // 10))
    with open(file, "r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << seed]))
    (problem,) = found(lambda: check_sums(step))
    (other,) = found(lambda: verify(plan, CASE.hf, step))
    assert (problem.code, other.code) == ("checksum-differs", "output-differs")
    assert problem.message.split("`")[1] == other.message.split("`")[1]


def test_zeros_where_data_was_are_found(step: Path) -> None:
    (file,) = data_files(step)
    with open(file, "r+b") as opened:
        opened.seek(4096)
        opened.write(bytes(4096))
    assert {p.code for p in found(lambda: check_sums(step))} == {"checksum-differs"}


def test_a_file_cut_short_is_an_input_error(plan: Plan, step: Path) -> None:
    (file,) = data_files(step)
    with open(file, "r+b") as opened:
        opened.truncate(1000)
    problems = found(lambda: check_sums(step))
    assert {p.code for p in problems} == {"damaged-output"} and len(problems) > 1
    assert found(lambda: verify(plan, CASE.hf, step))[0].code == "damaged-output"


@pytest.mark.parametrize("name", ["items/manifest.ocdbt", "items/_METADATA", "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[]", b"{}", b'{"custom_metadata": 3}'])
def test_metadata_that_is_damaged_is_an_input_error(step: Path, name: str, content: bytes) -> None:
    (step / name).write_bytes(content)
    assert found(lambda: check_sums(step))[0].code in ("damaged-output", "no-checksums")


def test_a_wrong_checksum_is_found_when_the_source_is_compared(plan: Plan, step: Path) -> None:
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace(stored_sums(step)[NORM], "0" * 16))
    (problem,) = found(lambda: verify(plan, CASE.hf, step))
    assert problem.code == "checksum-differs" and problem.notes[0] == "expected: 0000000000000000"


def test_checksums_of_another_kind_are_not_compared(step: Path) -> None:
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("ckptc-lanes-1", "ckptc-lanes-2"))
    (problem,) = found(lambda: check_sums(step))
    assert problem.code == "no-checksums"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    case: GoldenCase = CASE
    return ["--model", case.model, "--source", str(case.hf), "--set", f"padded_vocab={case.vocab}"]


def test_convert_and_run_verify_and_say_so(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, said = str(tmp_path / "plan.json"), "verified 24 arrays, 343 kB: each bit is what the source gives\n"
    assert command(["convert", *arguments, "--output", str(tmp_path / "a"), "--verify"]) == 0
    assert capsys.readouterr().out.endswith(said)
    assert command(["compile", *arguments, "-o", plan]) == 0
    assert command(["run", plan, "--output", str(tmp_path / "b"), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"] is True
    assert command(["verify", plan, "--output", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.startswith(said)  # then, whether its meaning is proved
    assert command(["verify", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"arrays": 24, "bytes": 342720, "against": "checksums"}


def test_what_differs_is_exit_code_1(
    arguments: list[str], step: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(tmp_path / "plan.json")
    change_source(source, "model.norm.weight", 0, 0)
    arguments[arguments.index("--source") + 1] = str(source)
    assert command(["compile", *arguments, "-o", plan]) == 0
    assert command(["verify", plan, "--output", str(step), "--source", str(source)]) == 1
    assert f"1 of 48 elements of `{NORM}` is not what the source gives" in capsys.readouterr().err
    assert command(["verify", plan]) == 1
    assert "error[no-output]" in capsys.readouterr().err
    assert command(["verify", str(step), "--source", str(source)]) == 1
    assert "error[unused-option]" in capsys.readouterr().err
    assert command(["verify", str(tmp_path)]) == 1
    assert "error[no-checkpoint]" in capsys.readouterr().err
