"""Opening directories: which files count, and everything that can be wrong with them, reported together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptc.diagnostics import Diagnostic, InputError, Span
from ckptc.storage.checkpoint.safetensors import open_checkpoint

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"


def save(directory: Path, name: str, tensors: Sequence[str]) -> None:
    """A file whose tensor `x` holds the bytes of the text `x`."""
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({tensor: np.frombuffer(tensor.encode(), np.uint8) for tensor in tensors}, directory / name)


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Tensors a and b in the first shard, c in the second, an index and a config.json."""
    save(tmp_path, FIRST, ["a", "b"])
    save(tmp_path, SECOND, ["c"])
    write_index(tmp_path, {"c": SECOND, "a": FIRST, "b": FIRST})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "text_config": {"hidden_size": 8}}')
    return tmp_path


def problems(directory: Path) -> tuple[Diagnostic, ...]:
    with pytest.raises(InputError) as caught:
        open_checkpoint(directory)
    for problem in caught.value.diagnostics:
        assert problem.help and len(problem.notes) >= 2
    return caught.value.diagnostics


def problem(directory: Path, code: str) -> Diagnostic:
    (only,) = problems(directory)
    assert only.code == code
    return only


# -- which files count ---------------------------------------------------------------------------------------


def test_shards_of_an_index_are_read_in_name_order(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert [file.name for file in checkpoint.files] == [FIRST, SECOND]
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == {"a": 0, "b": 0, "c": 1}
    assert checkpoint.config == {"model_type": "llama", "text_config": {"hidden_size": 8}}


def test_tensors_lie_where_the_records_say(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    for name, tensor in checkpoint.tensors.items():
        content = (sharded / checkpoint.files[tensor.file].name).read_bytes()
        assert content[tensor.begin : tensor.end] == name.encode()
        assert checkpoint.files[tensor.file].size == len(content)


def test_files_the_index_does_not_name_are_left_alone(sharded: Path) -> None:
    save(sharded, "consolidated.safetensors", ["a", "other"])
    (sharded / "model.safetensors").write_text("not even safetensors")
    assert set(open_checkpoint(sharded).tensors) == {"a", "b", "c"}


def test_without_an_index_model_safetensors_is_used_alone(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", ["a"])
    save(tmp_path, "adapter.safetensors", ["b"])
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


def test_without_an_index_all_files_are_used_in_name_order(tmp_path: Path) -> None:
    for name in ("y", "x", "z"):
        save(tmp_path, f"{name}.safetensors", [name])
    (tmp_path / "._x.safetensors").write_text("left by another program")
    assert [file.name for file in open_checkpoint(tmp_path).files] == [f"{name}.safetensors" for name in "xyz"]


def test_no_config_is_an_empty_config(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", ["a"])
    assert open_checkpoint(tmp_path).config == {}


def test_shards_may_lie_in_folders_below(tmp_path: Path) -> None:
    save(tmp_path, "weights/one.safetensors", ["a"])
    write_index(tmp_path, {"a": "weights/one.safetensors"})
    assert open_checkpoint(tmp_path).files[0].name == "weights/one.safetensors"


def test_links_out_of_the_directory_are_followed_as_in_the_hub_cache(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate([FIRST, SECOND, INDEX, "config.json"]):
        os.rename(sharded / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b", "c"}


def test_opening_twice_gives_equal_records_in_the_same_order(sharded: Path) -> None:
    first, second = open_checkpoint(sharded), open_checkpoint(sharded)
    assert first == second
    assert list(first.tensors) == list(second.tensors) == ["a", "b", "c"]


# -- the directory -------------------------------------------------------------------------------------------


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    assert "found: nothing" in problem(tmp_path / "absent", "missing-directory").notes


def test_a_file_given_for_a_directory(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", ["a"])
    assert "found: a file" in problem(tmp_path / "model.safetensors", "missing-directory").notes


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "m.pt"]
)
def test_pickles_are_recognised_and_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    assert f"found: `{name}`" in problem(tmp_path, "pickle-checkpoint").notes


def test_pickles_beside_safetensors_are_left_alone(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"PK")
    assert len(open_checkpoint(sharded).files) == 2


def test_a_directory_without_weights_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    assert "found: `README.md`" in problem(tmp_path, "no-safetensors").notes


def test_the_hub_cache_of_a_repository_points_to_its_snapshots(tmp_path: Path) -> None:
    for name in ("blobs", "refs", "snapshots"):
        (tmp_path / name).mkdir()
    assert "snapshots" in (problem(tmp_path, "no-safetensors").help or "")


def test_a_missing_number_of_a_series_is_a_missing_file_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / FIRST).unlink()
    assert f"`{FIRST}`" in problem(sharded, "missing-file").message


def test_a_series_may_count_from_zero(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path, f"model-{number:05}-of-00003.safetensors", [f"t{number}"])
    assert len(open_checkpoint(tmp_path).files) == 3


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_directory_that_may_not_be_read(sharded: Path) -> None:
    sharded.chmod(0)
    try:
        problem(sharded, "source-unreadable")
    finally:
        sharded.chmod(0o700)


# -- the index -----------------------------------------------------------------------------------------------


def test_a_file_the_index_names_is_missing(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    found = problem(sharded, "missing-file")
    assert found.message == f"`{FIRST}` does not exist, but `{INDEX}` says that it holds 2 tensors"


def test_a_dangling_link_is_a_missing_file(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("../../blobs/gone")
    assert "../../blobs/gone" in problem(sharded, "missing-file").notes[1]


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_dangling_config_or_index_is_not_taken_for_none(sharded: Path, name: str) -> None:
    (sharded / name).unlink()
    (sharded / name).symlink_to("gone")
    assert f"`{name}`" in problem(sharded, "missing-file").message


def test_a_tensor_the_named_file_does_not_hold(sharded: Path) -> None:
    write_index(sharded, {"c": SECOND, "a": FIRST, "b": FIRST, "d": SECOND})
    found = problem(sharded, "missing-tensor")
    assert found.message == f"`{SECOND}` lacks tensor `d` that `{INDEX}` says it holds"


def test_a_tensor_that_lies_in_another_file_is_found_there(sharded: Path) -> None:
    write_index(sharded, {"c": SECOND, "a": FIRST, "b": SECOND})
    assert f"found: `b` in `{FIRST}`" in problem(sharded, "missing-tensor").notes


def test_a_tensor_the_index_does_not_list(sharded: Path) -> None:
    write_index(sharded, {"c": SECOND, "a": FIRST})
    assert problem(sharded, "unlisted-tensor").message == (f"`{FIRST}` holds tensor `b` that `{INDEX}` does not list")


def test_the_same_tensor_in_two_files_of_an_index(sharded: Path) -> None:
    save(sharded, SECOND, ["c", "a"])
    assert problem(sharded, "duplicate-tensor").message == f"`{SECOND}` and `{FIRST}` both hold tensor `a`"


def test_the_same_tensors_in_two_files_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    save(sharded, "consolidated.safetensors", ["a", "b", "c"])
    assert [found.code for found in problems(sharded)] == ["duplicate-tensor", "duplicate-tensor"]


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "/etc/passwd",
        "a/../../b",
        "a/./b",
        "",
        "a//b",
        "a/",
        "..",
        "nul\0",
        "\ud800",
    ],
)
def test_names_that_leave_the_directory_are_refused_unopened(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": name, "c": SECOND})
    problem(sharded, "unsafe-path")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a": 1}, {"a": None}, {"a": [FIRST]}])
def test_an_index_without_a_map_of_names_is_invalid(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    problem(sharded, "index-invalid")


def test_an_index_without_weight_map_is_invalid(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"metadata": {}}')
    problem(sharded, "index-invalid")


BAD_JSON: Mapping[str, tuple[str, str]] = {
    "trailing comma": ('{"a": 1,}', "json"),
    "nothing": ("", "json"),
    "NaN": ('{"a": NaN}', "json"),
    "-Infinity": ('{"a": [-Infinity]}', "json"),
    "overflow": ('{"a": 1e400}', "json"),
    "deep": ("[" * 100_000, "json"),
    "list": ("[]", "not-object"),
    "duplicate": ('{"a": {"b": 1, "b": 1}}', "duplicate-key"),
}


@pytest.mark.parametrize("case", BAD_JSON)
@pytest.mark.parametrize("kind", ["config", "index"])
def test_bad_json_is_refused_with_its_code(sharded: Path, kind: str, case: str) -> None:
    text, code = BAD_JSON[case]
    name = {"config": "config.json", "index": INDEX}[kind]
    (sharded / name).write_text(text)
    assert f"`{name}`" in problem(sharded, f"{kind}-{code}").message


def test_bad_json_is_shown_at_its_line_and_column(sharded: Path) -> None:
    path = sharded / "config.json"
    path.write_text('{\n  "ok": "NaN",\n  "eps": NaN\n}')
    assert problem(sharded, "config-json").span == Span(str(path), 3, 10)
    path.write_text('{\n  "ok": 1,\n  eps: 2\n}')
    assert problem(sharded, "config-json").span == Span(str(path), 3, 3)


@pytest.mark.parametrize("name", ["config.json", INDEX, SECOND])
def test_a_git_lfs_pointer_in_place_of_any_file(sharded: Path, name: str) -> None:
    (sharded / name).write_text(LFS_POINTER)
    assert "expected: 1234 bytes" in problem(sharded, "lfs-pointer").notes


@pytest.mark.parametrize("name", ["config.json", INDEX, SECOND])
def test_a_directory_or_a_pipe_in_place_of_any_file(sharded: Path, name: str) -> None:
    (sharded / name).unlink()
    os.mkfifo(sharded / name)  # opening it as a file would wait for ever
    problem(sharded, "source-unreadable")
    (sharded / name).unlink()
    (sharded / name).mkdir()
    problem(sharded, "source-unreadable")


def test_a_truncated_shard(sharded: Path) -> None:
    os.truncate(sharded / SECOND, (sharded / SECOND).stat().st_size - 1)
    assert "is truncated" in problem(sharded, "source-truncated").message


def test_everything_wrong_is_reported_together(sharded: Path) -> None:
    (sharded / "config.json").write_text("{")
    save(sharded, "third.safetensors", ["e", "g"])
    (sharded / "fourth.safetensors").write_bytes(b"short")
    (sharded / FIRST).unlink()
    write_index(
        sharded,
        {"a": FIRST, "c": SECOND, "d": SECOND, "e": "third.safetensors", "f": "fourth.safetensors"},
    )
    assert [found.code for found in problems(sharded)] == [
        "config-json",
        "header-truncated",
        "missing-file",
        "missing-tensor",
        "unlisted-tensor",
    ]


# -- cost ----------------------------------------------------------------------------------------------------


def test_no_descriptor_is_left_open(sharded: Path) -> None:
    (sharded / "config.json").write_text("{")
    (sharded / FIRST).write_text(LFS_POINTER)
    before = len(os.listdir("/dev/fd"))
    problems(sharded)
    assert len(os.listdir("/dev/fd")) == before


def test_opening_imports_nothing_heavy() -> None:
    heavy = ("jax", "torch", "transformers", "jsonschema", "numpy", "tensorstore", "safetensors")
    program = f"import sys, ckptc.storage.checkpoint.safetensors; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
