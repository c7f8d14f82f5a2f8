"""Headers: what the reference library writes is read as it reads it; malformed ones are refused by code."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptc.diagnostics import InputError
from ckptc.storage.formats.safetensors import (
    DTYPES,
    MAX_HEADER,
    MAX_REPORTED,
    SUB_BYTE,
    parse_header,
    read_header,
)
from ckptc.storage.source.files import header_digest

# Refusals of files that the reference library reads: see the module's docstring.
STRICTER = {"header-duplicate-key", "header-entry", "header-metadata", "unsupported-dtype"}


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def codes(content: bytes, size: int | None = None) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_header("m.safetensors", len(content) if size is None else size, content)
    return [d.code for d in caught.value.diagnostics]


def library_reads(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except (safetensors.SafetensorError, RecursionError):
        return False
    return True


# -- agreement with the reference library --------------------------------------------------------------------

ARRAY_DTYPES = sorted({name for name, _ in DTYPES.values()})


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype = numpy_dtype(draw(st.sampled_from(ARRAY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype == np.bool_:
        data = bytes(byte & 1 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape)


# Not empty: for no tensors and an empty map safetensors 0.8.0 writes JSON that it cannot read itself.
metadata_maps = st.none() | st.dictionaries(st.text(max_size=12), st.text(max_size=5), min_size=1, max_size=2)
names = st.text(max_size=12).filter(lambda name: name != "__metadata__")


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(names, arrays(), max_size=6), metadata_maps)
def test_a_file_the_library_saved_has_the_same_dtypes_shapes_and_bytes(
    saved: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str] | None
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.safetensors")
        safetensors.numpy.save_file(saved, path, metadata)
        header, content = read_header(path, file=7), path.read_bytes()
    assert {t.name for t in header.tensors} == set(saved)
    for tensor in header.tensors:
        array = saved[tensor.name]
        assert (tensor.dtype, tensor.shape, tensor.file) == (array.dtype.name, array.shape, 7)
        assert content[tensor.begin : tensor.end] == array.tobytes()
    assert header.metadata == (metadata or {})
    assert (header.file.name, header.file.size) == ("model.safetensors", len(content))


def test_every_dtype_of_the_library_is_known() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(file_bytes({"a": entry("no such dtype")}))
    listed = re.findall(r"`([A-Z0-9_]+)`", str(caught.value).split("expected one of")[1])
    assert set(listed) == set(DTYPES) | set(SUB_BYTE)


@pytest.mark.parametrize("code", DTYPES)
def test_dtype_names_and_sizes_are_those_of_numpy_and_ml_dtypes(code: str) -> None:
    name, size = DTYPES[code]
    assert (numpy_dtype(name).name, numpy_dtype(name).itemsize) == (name, size)
    content = file_bytes({"a": entry(code, [3], [0, 3 * size])}, bytes(3 * size))
    assert library_reads(content)
    assert parse_header("m", len(content), content).tensors[0].dtype == name


layouts = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=5)


@settings(max_examples=600, deadline=None)
@given(layouts, st.integers(0, 9))
def test_a_layout_is_accepted_exactly_when_the_library_accepts_it(pieces: list[tuple[int, int]], size: int) -> None:
    header = {f"t{i}": entry("U8", [n], [begin, begin + n]) for i, (begin, n) in enumerate(pieces)}
    content = file_bytes(header, bytes(size))
    try:
        parse_header("m", len(content), content)
        accepted = True
    except InputError:
        accepted = False
    assert accepted == library_reads(content)


VALID = file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("BF16", [2, 3], [0, 12]),
        "b": entry("F32", [], [12, 16]),
        "c": entry("I64", [0, 5], [16, 16]),
    },
    bytes(range(16)),
)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                content[at] = draw(st.integers(0, 255))
            case 1:
                content[at:at] = draw(st.binary(max_size=6) | st.sampled_from([b"[", b"{", b'"', b"NaN", b"-", b"e9"]))
            case 2:
                del content[at : at + draw(st.integers(1, 20))]
            case _:
                other = draw(st.integers(0, len(content) - 1))
                content[at:at] = content[other : other + draw(st.integers(1, 60))]
        if not content:
            return b""
    if draw(st.booleans()):  # a length that fits again lets the mutation reach the later checks
        end = bytes(content).rfind(b"}") + 1
        content[:8] = max(0, end - 8).to_bytes(8, "little")
    return bytes(content)


@settings(max_examples=2000, deadline=None)
@given(mutations())
def test_a_mutated_header_raises_input_error_or_reads_as_the_library_reads_it(content: bytes) -> None:
    try:
        header = parse_header("m", len(content), content)
    except InputError as error:
        assert error.diagnostics and all(d.help and d.message for d in error.diagnostics)
        assert not library_reads(content) or STRICTER & {d.code for d in error.diagnostics}
        return
    read = dict(safetensors.deserialize(content)) if b"-0" not in content else {}  # Python reads -0 as 0
    for name, stored in read.items():
        tensor = next(t for t in header.tensors if t.name == name)
        assert (tensor.dtype, tensor.shape) == (DTYPES[stored["dtype"]][0], tuple(stored["shape"]))
        assert content[tensor.begin : tensor.end] == bytes(stored["data"])


@settings(max_examples=500, deadline=None)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5),
    st.data(),
)
def test_any_json_in_any_place_raises_nothing_but_input_error(value: Any, data: st.DataObject) -> None:
    header: dict[str, Any] = {"__metadata__": {}, "a": entry(), "b": entry(offsets=[4, 8])}
    key = data.draw(st.sampled_from(["__metadata__", "a", "b", "dtype", "shape", "data_offsets"]))
    (header if key in header else header["a"])[key] = value
    content = file_bytes(header, bytes(8))
    try:
        parse_header("m", len(content), content)
    except InputError:
        return
    assert library_reads(content)


# -- refusals ------------------------------------------------------------------------------------------------


def alone(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> bytes:
    return file_bytes({"a": entry(dtype, shape, offsets)}, b"abcd")


A = entry()
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "header-truncated"),
    "shorter than the length field": (b"\x02\0\0\0", "header-truncated"),
    "header past the end": (b"\xff\0\0\0\0\0\0\0{}", "header-truncated"),
    "header over the limit": ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "header-too-large"),
    "a zip archive": (b"PK\x03\x04\0\0\x08\x08" + bytes(22) + b"archive/data.pkl", "header-too-large"),
    "a web page": (b"<!DOCTYPE html><html></html>", "header-too-large"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 4976698672\n", "lfs-pointer"),
    "empty header": (file_bytes(b""), "header-json"),
    "not JSON": (file_bytes(b"{'a': 1}"), "header-json"),
    "JSON cut short": (file_bytes(b'{"a": {"dtype"'), "header-json"),
    "JSON with more after it": (file_bytes(b"{} {}"), "header-json"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "header-json"),
    "UTF-16": (file_bytes("{}".encode("utf-16")), "header-json"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "header-json"),
    "NaN": (file_bytes('{"a": NaN}'), "header-json"),
    "Infinity in metadata": (file_bytes('{"__metadata__": {"a": -Infinity}}'), "header-json"),
    "float too large": (file_bytes('{"a": 1e999}'), "header-json"),
    "integer of 5000 digits": (file_bytes('{"a": ' + "9" * 5000 + "}"), "header-json"),
    "a list": (file_bytes([]), "header-not-object"),
    "null": (file_bytes("null"), "header-not-object"),
    "duplicate tensor": (file_bytes('{"a": 1, "a": 1}'), "header-duplicate-key"),
    "duplicate field": (file_bytes('{"a": {"shape": [4], "shape": [4]}}'), "header-duplicate-key"),
    "duplicate metadata": (file_bytes('{"__metadata__": {"x": "1", "x": "2"}}'), "header-duplicate-key"),
    "metadata is a list": (file_bytes({"__metadata__": []}), "header-metadata"),
    "metadata is null": (file_bytes({"__metadata__": None}), "header-metadata"),
    "metadata holds a number": (file_bytes({"__metadata__": {"version": 1}}), "header-metadata"),
    "entry is a number": (file_bytes({"a": 3}), "header-entry"),
    "entry without dtype": (file_bytes({"a": {"shape": [], "data_offsets": []}}), "header-entry"),
    "entry with one more field": (file_bytes({"a": {**A, "strides": [1]}}, b"abcd"), "header-entry"),
    "half a surrogate pair in a name": (file_bytes({"\ud800": A}, b"abcd"), "header-tensor-name"),
    "unknown dtype": (alone("FP16"), "unknown-dtype"),
    "dtype in lower case": (alone("u8"), "unknown-dtype"),
    "dtype is a list": (alone(["U8"]), "unknown-dtype"),
    "four bits per element": (alone("F4", [8], [0, 4]), "unsupported-dtype"),
    "six bits per element": (file_bytes({"a": entry("F6_E2M3", [4], [0, 3])}, b"abc"), "unsupported-dtype"),
    "shape is a number": (alone(shape=4), "header-shape"),
    "negative extents": (alone(shape=[-2, -2]), "header-shape"),
    "extent is a float": (alone(shape=[4.0]), "header-shape"),
    "extent is a truth value": (alone(shape=[4, True]), "header-shape"),
    "extents beyond any memory": (alone(shape=[1 << 62, 1 << 62, 0]), "header-shape"),
    "extents of a million digits": (alone(shape=[10**4000] * 300), "header-shape"),
    "one offset": (alone(offsets=[0]), "header-offsets"),
    "three offsets": (alone(offsets=[0, 4, 8]), "header-offsets"),
    "negative begin": (alone(offsets=[-4, 0]), "header-offsets"),
    "end before begin": (alone(offsets=[4, 0]), "header-offsets"),
    "offsets are text": (alone(offsets="04"), "header-offsets"),
    "offset of 4300 digits": (alone(offsets=[0, int("9" * 4300)]), "header-offsets"),
    "fewer bytes than the shape": (alone("F32", [2], [0, 4]), "header-size-mismatch"),
    "more bytes than the shape": (alone("U8", [2], [0, 4]), "header-size-mismatch"),
    "bytes for a shape with a zero": (alone("U8", [9, 0]), "header-size-mismatch"),
    "overlap": (file_bytes({"a": A, "b": entry(offsets=[2, 6])}, bytes(6)), "header-overlap"),
    "two tensors on the same bytes": (file_bytes({"a": A, "b": A}, bytes(4)), "header-overlap"),
    "empty inside another": (file_bytes({"a": A, "b": entry("U8", [0], [2, 2])}, bytes(4)), "header-overlap"),
    "hole before the first": (file_bytes({"a": entry(offsets=[1, 5])}, bytes(5)), "header-gap"),
    "hole between two": (file_bytes({"a": A, "b": entry(offsets=[8, 12])}, bytes(12)), "header-gap"),
    "one byte short": (file_bytes({"a": A}, b"abc"), "source-truncated"),
    "one byte more": (file_bytes({"a": A}, b"abcde"), "header-trailing-bytes"),
    "bytes without tensors": (file_bytes({}, b"a"), "header-trailing-bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_header_is_refused_with_its_code(case: str) -> None:
    content, code = MALFORMED[case]
    assert codes(content) == [code]
    assert code in STRICTER or not library_reads(content)  # or the table would refuse good files


@pytest.mark.parametrize("case", MALFORMED)
def test_a_refusal_names_the_file_and_says_expected_found_and_what_to_do(case: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_header("m.safetensors", len(MALFORMED[case][0]), MALFORMED[case][0])
    (problem,) = caught.value.diagnostics
    assert "`m.safetensors`" in problem.message and not problem.message.endswith(".")
    assert [note.split(":")[0] for note in problem.notes] == ["expected", "found"]
    assert problem.help
    assert all(len(text) < 600 and text.isprintable() for text in (problem.message, *problem.notes))


@pytest.mark.parametrize(
    "case", [case for case, (_, code) in MALFORMED.items() if re.match("unknown|header-(sh|of|si|g)", code)]
)
def test_a_refused_tensor_is_named(case: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_header("m", len(MALFORMED[case][0]), MALFORMED[case][0])
    assert re.search("tensor `[ab]` in `m`", caught.value.diagnostics[0].message)


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_json_nested_too_deeply_is_refused_not_a_crash(opening: bytes, closing: bytes) -> None:
    content = file_bytes(b'{"a": ' + opening * 200_000 + b"1" + closing * 200_000 + b"}")
    with pytest.raises(InputError) as caught:
        parse_header("m", len(content), content)
    assert "nested too deeply" in caught.value.diagnostics[0].notes[1]


def test_a_truncated_file_is_told_both_sizes() -> None:
    content = file_bytes({"a": entry(shape=[400], offsets=[0, 400])}, bytes(100))
    with pytest.raises(InputError) as caught:
        parse_header("m.safetensors", len(content), content)
    assert caught.value.diagnostics[0].message == (
        f"`m.safetensors` is truncated: its header declares tensor data through byte {len(content) + 300} "
        f"but the file is only {len(content)} bytes"
    )


def test_an_lfs_pointer_is_told_the_size_it_stands_for() -> None:
    with pytest.raises(InputError) as caught:
        parse_header("m", 130, MALFORMED["a git-lfs pointer"][0])
    assert "expected: 4976698672 bytes" in caught.value.diagnostics[0].notes
    assert "git lfs pull" in (caught.value.diagnostics[0].help or "")


def test_a_misspelt_dtype_gets_a_suggestion() -> None:
    content = file_bytes({"a": entry("BF61")}, b"abcd")
    with pytest.raises(InputError) as caught:
        parse_header("m", len(content), content)
    assert caught.value.diagnostics[0].help == "did you mean `BF16`?"


def test_all_problems_of_a_file_are_reported_together() -> None:
    header = {
        "__metadata__": {"n": 1},
        "a": entry("X"),
        "b": entry(shape=[-1]),
        "c": entry(shape=[9]),
        "d": 0,
    }
    expected = "header-metadata unknown-dtype header-shape header-size-mismatch header-entry"
    assert codes(file_bytes(header, b"abcd")) == expected.split()


def test_holes_left_by_refused_tensors_are_not_reported_as_gaps() -> None:
    assert codes(file_bytes({"a": entry("X"), "b": entry(offsets=[4, 8])}, bytes(8))) == ["unknown-dtype"]


def test_thousands_of_problems_are_counted_not_listed() -> None:
    content = file_bytes({f"t{i}": entry("X") for i in range(5000)})
    with pytest.raises(InputError) as caught:
        parse_header("m", len(content), content)
    assert len(caught.value.diagnostics) == MAX_REPORTED + 1
    assert f"{5000 - MAX_REPORTED} more problems" in caught.value.diagnostics[-1].message


# -- acceptance ----------------------------------------------------------------------------------------------


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    header = {
        "z": A,
        "a": entry(offsets=[8, 12]),
        "m": entry(offsets=[4, 8]),
        "e": entry(shape=[0], offsets=[4, 4]),
    }
    content = file_bytes(header, bytes(12))
    assert [t.name for t in parse_header("m", len(content), content).tensors] == ["z", "e", "m", "a"]


def test_the_digest_covers_length_and_header_but_not_data() -> None:
    first, second = file_bytes({"a": A}, b"abcd"), file_bytes({"a": A}, b"efgh")
    assert parse_header("m", len(first), first).file == parse_header("m", len(second), second).file
    other = file_bytes({"b": A}, b"abcd")
    assert parse_header("m", len(other), other).file.header_digest != header_digest(first[:-4])
    assert parse_header("m", len(first), first).file.header_digest == header_digest(first[:-4])


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    content = file_bytes({f"tensor.{i}": entry(offsets=[4 * i, 4 * i + 4]) for i in range(4000)}, bytes(16000))
    assert len(content) > 200_000
    (tmp_path / "m").write_bytes(content)
    assert read_header(tmp_path / "m") == parse_header("m", len(content), content)


def test_a_file_that_shrank_while_it_was_read_is_truncated() -> None:
    assert codes(VALID[:40], size=len(VALID)) == ["header-truncated"]
    assert codes(VALID[:4], size=len(VALID)) == ["header-truncated"]


def test_nan_inside_a_string_is_not_mistaken_for_the_fault() -> None:
    with pytest.raises(InputError) as caught:
        content = file_bytes('{"a NaN \\" NaN": 1, "b": NaN}')
        parse_header("m", len(content), content)
    assert "NaN, which is not a JSON number at character 25" in caught.value.diagnostics[0].notes[1]
