"""A plan that contradicts itself is refused before it is run, whoever wrote it; those that ckptc writes are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ckptc.diagnostics import InputError
from ckptc.ops.nest import AxisMap, Factor, Part
from ckptc.ops.types import OpError
from ckptc.plan.check import MAX_LOOPS, MAX_PAIRS, check_plan
from ckptc.plan.json import MAX_PARTS, dumps, loads
from ckptc.plan.model import Array, Beside, Decode, Kind, Operand, Orbax, Plan, Safetensors, Source, Tensor
from golden import compile_case, known_cases
from plans import altered, operand, with_arrays
from plans import array as made_array
from reference import GoldenCase
from roundtrip import converted, export_plan

CASES = {case.id: case for case in known_cases()}
STACKED = "params/params/decoder/layers/self_attention/query/kernel"


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_what_the_compiler_writes_passes(case: GoldenCase) -> None:
    check_plan(compile_case(case), "plan")
    check_plan(compile_case(case, memory=1 << 12, shards=2), "plan")
    check_plan(compile_case(case, link=True), "plan")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compile_case(CASES["gemma2.scan"])


@pytest.fixture
def coded(plan: Plan) -> Plan:
    """One array, decoded from fp8 in blocks."""
    codes = Decode("fp8", (("block", (2, 3)), ("flat", False)), (4, 6), (Beside("float32", (2, 2)),))
    source = operand("float8_e4m3fn", (4, 6), (0,), codes, (1,))
    axes = (AxisMap(0, (Factor(4, 1, 6),)), AxisMap(0, (Factor(6, 1, 1),)))
    array = made_array("x", (4, 6), "float32", (4, 6), (4, 6), (source,), (Part(0, 0, 0, axes),))
    tensors = (Tensor("w", -1, 0, 24), Tensor("s", -1, 0, 16))
    return recounted(with_arrays(replace(plan, tensors=tensors), (array,)))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    case = CASES["gemma2.scan"]
    return export_plan(case, converted(case, tmp_path_factory.mktemp("saved") / "out"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"link": (0, 0)}, "cannot be stored in the order [0, 0]"),
        ({"link": (0,)}, "cannot be stored in the order [0]"),
        ({"chunk": (80, 48)}, "made one by one"),
        ({"link": (1, 0)}, "do not link what its totals say"),
        ({"link": None}, "do not link what its totals say"),
    ],
    ids=str,
)
def test_links_that_contradict_the_array(change: dict[str, Any], text: str) -> None:
    plan = compile_case(CASES["llama3_1.scan"], link=True)
    arrays = [altered(a, **change) if a.name.endswith("/embedding") else a for a in plan.arrays]
    assert next(a for a in plan.arrays if a.name.endswith("/embedding")).link == (0, 1)
    assert text in refusal(with_arrays(plan, arrays))


def test_links_too_many_to_look_at() -> None:
    plan = compile_case(CASES["llama3_1.scan"], link=True)
    array = next(a for a in plan.arrays if a.name.endswith("/embedding"))
    many, shape = 1 << 22, (1 << 22,)
    part = Part(0, 0, 0, (AxisMap(0, (Factor(many, 1, 0),)),))
    huge = altered(array, shape=shape, chunk=(1,), unit=(1,), shards=(1,), axes=(), parts=(part,), link=(0,))
    assert "chunks along its axes" in refusal(recounted(with_arrays(plan, (huge,))))


def refusal(plan: Plan) -> str:
    with pytest.raises(InputError) as caught:
        check_plan(plan, "plan.json")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "invalid-plan"
    return diagnostic.message.removeprefix("plan.json is not a plan that can be run: ")


def recounted(plan: Plan) -> Plan:
    """The plan with the totals of its arrays, so that what is wrong with one of them is met."""
    try:
        size, nbytes = sum(a.size for a in plan.arrays), sum(a.nbytes for a in plan.arrays)
    except OpError:
        return plan
    return replace(plan, totals=replace(plan.totals, arrays=len(plan.arrays), parameters=size, write_bytes=nbytes))


def with_array(plan: Plan, change: Callable[[Array], Array], number: int = 0) -> Plan:
    arrays = list(plan.arrays)
    arrays[number] = change(arrays[number])
    return recounted(with_arrays(plan, arrays))


def largest(plan: Plan) -> int:
    return max(range(len(plan.arrays)), key=lambda n: (len(plan.arrays[n].shape), plan.arrays[n].size))


def with_part(plan: Plan, **changes: Any) -> Plan:
    """The first part of the plan's largest array, changed."""
    return with_array(plan, lambda a: altered(a, parts=(replace(a.parts[0], **changes), *a.parts[1:])), largest(plan))


def axis_changed(plan: Plan, change: Callable[[AxisMap], AxisMap]) -> Plan:
    axes = plan.arrays[largest(plan)].parts[0].axes
    return with_part(plan, axes=(change(axes[0]), *axes[1:]))


PARTS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "reads past the tensor": (lambda p: with_part(p, base=10**9), "reads element 1"),
    "reads past the list": (lambda p: with_part(p, first=99), "reads tensor"),
    "of a source there is not": (lambda p: with_part(p, source=7), "out of range"),
    "with an axis too few": (lambda p: with_part(p, axes=()), "another number of axes"),
    "past the array": (lambda p: axis_changed(p, lambda a: replace(a, start=1)), "reaches index"),
    "a loop of nothing": (
        lambda p: axis_changed(p, lambda a: replace(a, factors=(Factor(0, 1, 1),))),
        "without iterations",
    ),
    "a loop that stands": (
        lambda p: axis_changed(p, lambda a: replace(a, factors=(Factor(2, 0, 1),))),
        "does not move",
    ),
    "loops across": (
        lambda p: axis_changed(p, lambda a: replace(a, factors=(Factor(2, 1, 1), Factor(2, 1, 1)))),
        "loops of an axis overlap",
    ),
    "loops without end": (
        lambda p: axis_changed(p, lambda a: replace(a, factors=(Factor(1, 1, 0),) * (MAX_LOOPS + 1))),
        "more steps",
    ),
    "covers half": (lambda p: axis_changed(p, lambda a: replace(a, factors=())), "do not cover it once"),
    "casts to what is not": (lambda p: with_part(p, math=(("cast", "float12"),)), "float12"),
    "casts to integers": (lambda p: with_part(p, math=(("cast", "int8"),)), "a cast to int8"),
    "scales by text": (lambda p: with_part(p, math=(("scale", "2"),)), "`scale` by '2'"),
    "scales by infinity": (lambda p: with_part(p, math=(("scale", float("inf")),)), "`scale` by inf"),
    "adds a number no float has": (lambda p: with_part(p, math=(("add", 10**400),)), "too large"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_leaves_its_array_or_its_source_is_refused(name: str, plan: Plan) -> None:
    change, expected = PARTS[name]
    assert expected in refusal(change(plan))


ARRAYS: dict[str, tuple[Callable[[Array], Array], str]] = {
    "a chunk above its unit": (lambda a: altered(a, chunk=tuple(n + 1 for n in a.chunk)), "does not fit unit"),
    "a unit above its array": (lambda a: altered(a, unit=tuple(n + 1 for n in a.shape)), "does not fit unit"),
    "chunks that straddle units": (
        lambda a: altered(a, unit=(3, *a.shape[1:]), chunk=(2, *a.chunk[1:])),
        "does not fit unit",
    ),
    "a shape of another rank": (lambda a: altered(a, shape=(*a.shape, 1)), "differ in length"),
    "shards of another rank": (lambda a: altered(a, shards=()), "differ in length"),
    "axes of another rank": (lambda a: altered(a, axes=("x",) * (len(a.shape) + 1)), "differ in length"),
    "a huge shape": (lambda a: altered(a, shape=(1 << 51, *a.shape[1:])), "too many elements"),
    "a dtype there is not": (lambda a: altered(a, dtype="float12"), "float12 is no dtype"),
    "a dtype that is not stored": (lambda a: altered(a, dtype="int4"), "int4 is no dtype"),
    "a path that climbs": (lambda a: altered(a, name="params/../x"), "is not the path of an array"),
    "a path with a line break": (lambda a: altered(a, name="params/a\nb"), "is not the path of an array"),
    "a part twice": (lambda a: altered(a, parts=a.parts * 2), "do not cover it once"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_contradicts_itself_is_refused(name: str, plan: Plan) -> None:
    change, expected = ARRAYS[name]
    assert expected in refusal(with_array(plan, change, largest(plan)))


def constants(*boxes: tuple[tuple[int, int], ...]) -> tuple[Part, ...]:
    """Parts of a constant over boxes, [low, high) along each axis."""
    axes = (tuple(AxisMap(low, (Factor(high - low, 1, 0),)) for low, high in box) for box in boxes)
    return tuple(Part(None, 0, 0, a) for a in axes)


def of_parts(plan: Plan, shape: tuple[int, ...], parts: tuple[Part, ...]) -> Plan:
    ones = (1,) * len(shape)
    array = made_array("params/x", shape, "float32", ones, shape, (), parts)
    return recounted(with_arrays(replace(plan, tensors=()), (array,)))


@pytest.mark.parametrize(
    ("boxes", "right"),
    [
        ([((0, 4), (0, 2)), ((0, 4), (2, 4))], True),
        ([((0, 4), (0, 2)), ((0, 4), (1, 3))], False),
        ([((0, 2), (0, 4)), ((0, 2), (0, 4))], False),
        ([((0, 3), (0, 3)), ((1, 2), (0, 1)), ((3, 4), (0, 4)), ((0, 2), (3, 4))], False),
        ([((0, 3), (0, 3)), ((0, 3), (3, 4)), ((3, 4), (0, 4))], True),
    ],
)
def test_parts_cover_an_array_once(boxes: list[Any], right: bool, plan: Plan) -> None:
    made = of_parts(plan, (4, 4), constants(*boxes))
    if right:
        check_plan(made, "plan.json")
    else:
        assert refusal(made).endswith(("two of its parts overlap", "two of its parts are one", "do not cover it once"))


def test_interleaved_parts_do_not_overlap_and_shifted_ones_do(plan: Plan) -> None:
    even, odd = (Part(None, 0, 0, (AxisMap(start, (Factor(4, 2, 0),)),)) for start in (0, 1))
    check_plan(of_parts(plan, (8,), (even, odd)), "plan.json")
    assert "overlap" in refusal(of_parts(plan, (8,), (even, replace(odd, axes=(AxisMap(0, (Factor(4, 1, 0),)),)))))


def test_many_parts_are_compared_too(plan: Plan) -> None:
    count = int(MAX_PAIRS**0.5) + 2
    rows = [((n, n + 1),) for n in range(count)]
    check_plan(of_parts(plan, (count,), constants(*rows)), "plan.json")
    assert "are one" in refusal(of_parts(plan, (count,), constants(*rows[:-1], rows[0])))


def with_file(source: Source, name: str) -> Source:
    return replace(source, files=(replace(source.files[0], name=name), *source.files[1:]))


def test_files_and_tensors_stay_inside_the_checkpoint(plan: Plan) -> None:
    for name in ("../x", "/etc/passwd", "a//b", "a/./b", "..", "a\\b"):
        assert "is not the name of a file" in refusal(replace(plan, sources=(with_file(plan.sources[0], name),)))
    first, *rest = plan.tensors
    assert "in file 99" in refusal(replace(plan, tensors=(replace(first, file=99), *rest)))
    assert "past its file's end" in refusal(replace(plan, tensors=(Tensor(first.name, first.file, 0, 10**12), *rest)))
    assert "bytes, `" in refusal(replace(plan, tensors=(replace(first, end=first.end - 2), *rest)))


def test_totals_are_those_of_the_arrays_and_numbers_have_a_bound(plan: Plan) -> None:
    for name in ("arrays", "parameters", "write_bytes"):
        wrong = replace(plan.totals, **{name: getattr(plan.totals, name) + 1})
        assert "totals are not" in refusal(replace(plan, totals=wrong))
    for name in ("read_bytes", "peak_memory_bytes", "tensors"):
        assert "larger than it can be" in refusal(replace(plan, totals=replace(plan.totals, **{name: 10**39})))
    assert "larger than it can be" in refusal(replace(plan, choices=replace(plan.choices, memory=10**39)))


def test_more_parts_than_a_mapping_makes_are_refused_before_they_are_read(plan: Plan) -> None:
    body = json.loads(dumps(plan))
    body["kinds"][0]["parts"] *= MAX_PARTS + 1
    with pytest.raises(InputError, match=f"more than {MAX_PARTS} parts"):
        loads(json.dumps(body))


def test_paths_are_sorted_and_none_lies_inside_another(plan: Plan) -> None:
    assert "in the order of their paths" in refusal(replace(plan, outputs=plan.outputs[::-1]))
    assert "have one name" in refusal(recounted(with_arrays(plan, (plan.arrays[0], *plan.arrays))))
    first = plan.arrays[0]
    inside = altered(first, name=f"{first.name}/more")
    assert "holds others" in refusal(recounted(with_arrays(plan, (first, inside, *plan.arrays[1:]))))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: replace(d, code="exec"), "there is no code"),
        (lambda d: replace(d, settings=()), "has the settings block, flat"),
        (lambda d: replace(d, settings=(("block", "all"), ("flat", False))), "has the settings"),
        (lambda d: replace(d, settings=(("block", (0, 0)), ("flat", False))), "has the settings"),
        (lambda d: replace(d, settings=(("block", (1, 1)), ("flat", False))), "the scales of"),
        (lambda d: replace(d, settings=(("block", (1, 1, 1)), ("flat", False))), "does not fit"),
        (lambda d: replace(d, code="mxfp4", settings=(("groups", False),)), "mxfp4 of [4, 6] is no"),
        (lambda d: replace(d, shape=(6, 4)), "is no float8_e4m3fn[4, 6]"),
        (lambda d: replace(d, beside=()), "tensors beside its codes, not 0"),
        (lambda d: replace(d, beside=(replace(d.beside[0], dtype="int32"),)), "found int32"),
    ],
)
def test_codes_and_scales_fit_each_other(change: Callable[[Decode], Decode], expected: str, coded: Plan) -> None:
    check_plan(coded, "plan.json")

    def changed(source: Operand) -> Operand:
        assert source.stored.decode
        return replace(source, stored=replace(source.stored, decode=change(source.stored.decode)))

    assert expected in refusal(with_array(coded, lambda a: altered(a, sources=tuple(map(changed, a.sources)))))


def test_an_output_names_the_tensors_that_its_kind_reads(coded: Plan) -> None:
    (output,) = coded.outputs
    for tensors in ((0,), (0, 1, 1), ()):
        assert "does not name the tensors" in refusal(replace(coded, outputs=(replace(output, tensors=tensors),)))
    assert "not there" in refusal(replace(coded, outputs=(replace(output, tensors=(0, 2)),)))
    assert "there are 1" in refusal(replace(coded, outputs=(replace(output, kind=1),)))
    assert "reads element" in refusal(replace(coded, outputs=(replace(output, begins=(1,)),)))
    assert "there are 1" in refusal(replace(coded, tensors=tuple(replace(t, source=1) for t in coded.tensors)))
    chunked = replace(coded, sources=(replace(coded.sources[0], format="orbax"),))
    assert "is not stored as" in refusal(chunked)


def test_an_export_that_the_compiler_writes_passes(export: Plan) -> None:
    check_plan(export, "plan.json")
    assert layout(export).files


def layout(plan: Plan) -> Safetensors:
    assert isinstance(plan.layout, Safetensors)
    return plan.layout


def with_layout(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, layout=replace(layout(plan), **changes))


def with_files(plan: Plan, **changes: Callable[[Any], Any]) -> Plan:
    """The plan with other values of each file."""
    files = layout(plan).files
    return with_layout(
        plan, files=tuple(replace(f, **{k: c(getattr(f, k)) for k, c in changes.items()}) for f in files)
    )


def with_kinds(plan: Plan, change: Callable[[Kind], Kind]) -> Plan:
    return replace(plan, kinds=tuple(map(change, plan.kinds)))


def with_tensor(plan: Plan, tensor: int, begin: int) -> Plan:
    """The plan with another place of its first output."""
    first, *others = plan.outputs
    return replace(plan, batches=(), outputs=(replace(first, tensors=(tensor,), begins=(begin,)), *others))


def first_array(plan: Plan) -> int:
    return plan.outputs[0].tensors[0]


def other_array(plan: Plan) -> int:
    """A stored array of another size than the first output's."""
    size = plan.tensors[first_array(plan)].end
    return next(n for n, t in enumerate(plan.tensors) if t.end != size)


def companion(plan: Plan, name: str) -> Plan:
    return with_layout(plan, companions=(replace(plan.sources[0].files[0], name=name),))


EXPORTS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "of another layout": (lambda p: replace(p, layout=Orbax()), "shape differ in length"),
    "a header of another length": (lambda p: with_files(p, header=lambda n: n + 8), "bytes, not"),
    "a file of another size": (lambda p: with_files(p, size=lambda n: n + 1), "bytes, not"),
    "a file of fewer tensors": (lambda p: with_files(p, count=lambda n: n - 1), "its files hold"),
    "weights in place of the config": (lambda p: with_files(p, name=lambda n: "config.json"), "a file `config.json`"),
    "a companion that climbs": (lambda p: companion(p, ".."), "cannot write a file `..`"),
    "a companion of weights": (lambda p: companion(p, "more.safetensors"), "it copies weights"),
    "batches of unlike tensors": (lambda p: replace(p, batches=(tuple(range(len(p.outputs))),)), "are not alike"),
    "a tensor in two batches": (
        lambda p: replace(p, batches=(*p.batches, p.batches[0])),
        "do not make every output once",
    ),
    "chunks of another rank": (
        lambda p: with_kinds(p, lambda k: replace(k, sources=tuple(replace(s, chunk=()) for s in k.sources))),
        "are not of an array",
    ),
    "a tensor twice": (
        lambda p: replace(p, outputs=p.outputs[:-1] + p.outputs[:1]),
        "two outputs have one name",
    ),
    "a dtype that safetensors has not": (
        lambda p: with_kinds(p, lambda k: replace(k, dtype="float8_e4m3fnuz")),
        "has no float8",
    ),
    "a range of a file": (
        lambda p: replace(p, tensors=tuple(replace(t, file=0) for t in p.tensors)),
        "no range of a file",
    ),
    "a tensor past its array's end": (lambda p: with_tensor(p, first_array(p), 1 << 40), "reads element"),
    "an array of another size": (lambda p: with_tensor(p, other_array(p), 0), "bytes, `"),
    "a twin of nothing": (
        lambda p: replace(p, twins=(replace(p.outputs[0], name="other"),)),
        "no such output as the twin",
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_that_contradicts_itself_is_refused(name: str, export: Plan) -> None:
    change, expected = EXPORTS[name]
    assert expected in refusal(change(export))


def test_a_plan_is_checked_before_it_is_run(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ckptc.cli.main import run

    (tmp_path / "plan.json").write_text(dumps(with_part(plan, base=10**9)), "utf-8")
    output = tmp_path / "out"
    argv = ["run", str(tmp_path / "plan.json"), "--source", str(CASES["gemma2.scan"].hf), "--output", str(output)]
    assert run(argv) == 1
    assert "reads element 1" in capsys.readouterr().err
    assert not output.exists()
