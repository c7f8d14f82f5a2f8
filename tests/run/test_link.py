"""Checkpoints that refer to the source's files: plain Orbax restores them as it does copied ones, every other command
reads them, and the source is left as it was.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from ckptc.api import against_source
from ckptc.diagnostics import InputError
from ckptc.ops.types import numpy_dtype
from ckptc.plan.json import dumps, loads
from ckptc.plan.links import places
from ckptc.plan.model import Plan
from ckptc.run import diff
from ckptc.run.journal import UNFINISHED
from ckptc.run.runner import Report, Settings, run
from ckptc.run.verify import check_sums
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from golden import compile_case, difference, differences, expected_of, known_cases, source_tensors
from reference import GoldenCase
from restoring import by_path, restored, v1_load, with_devices
from roundtrip import broken_promises, export_plan, exported

CASES = {case.id: case for case in known_cases()}
# Experts under layers; rotations inside of heads, which are copied; a tied head and sums; latent attention, cut tensors.
VARIED = ["qwen3_moe.scan", "qwen3_moe.unscan", "llama3_1.scan", "llama3_1.unscan", "gemma2.scan", "deepseek3.scan"]
CASE = CASES["llama3_1.scan"]  # of which some arrays are linked, some copied
ALL = CASES["qwen3_moe.scan"]  # of which nothing is copied

pytestmark = [
    pytest.mark.usefixtures("jax_with_64_bits"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:.*donated"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of CASE's checkpoint, of the test's own."""
    shutil.copytree(CASE.hf, tmp_path / "source")
    return tmp_path / "source"


def linked(case: GoldenCase = CASE, **changes: Any) -> Plan:
    return compile_case(case, link=True, **changes)


def convert(plan: Plan, source: Path, output: Path, **settings: Any) -> Report:
    text = dumps(plan)
    assert loads(text) == plan
    return run(plan, json.loads(text)["digest"], output, source, settings=Settings(jobs=1, **settings))


def codes(error: pytest.ExceptionInfo[InputError]) -> set[str]:
    return {d.code for d in error.value.diagnostics}


# -- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linked_bytes_are_maxtexts_chunks(case: GoldenCase) -> None:
    plan, expected = linked(case), expected_of(case)
    assert plan.totals.linked_bytes or case.dtype == "float32"
    for place in places(plan):
        array = plan.arrays[place.array]
        order = array.link or ()
        grid = [-(-n // c) for n, c in zip(array.shape, array.chunk, strict=True)]
        stored = [array.chunk[axis] for axis in order]
        for cell, file, offset in zip(place.cells, place.files, place.offsets, strict=True):
            data = np.fromfile(
                case.hf / plan.sources[0].files[file].name,
                numpy_dtype(array.dtype),
                int(np.prod(stored)),
                offset=offset,
            )
            found = data.reshape(stored).transpose(np.argsort(np.array(order, int)))
            corner = [
                int(i) * c for i, c in zip(np.unravel_index(cell, grid) if grid else (), array.chunk, strict=True)
            ]
            box = tuple(slice(low, low + c) for low, c in zip(corner, array.chunk, strict=True))
            assert difference(array.name, found, expected[array.name][box]) is None


@pytest.mark.parametrize("id_", VARIED)
def test_orbax_restores_maxtexts_arrays(id_: str, tmp_path: Path) -> None:
    case, plan = CASES[id_], linked(CASES[id_])
    report = convert(plan, case.hf, tmp_path)
    assert report.linked_bytes == plan.totals.linked_bytes > plan.totals.write_bytes // 2
    assert report.write_bytes == plan.totals.write_bytes - plan.totals.linked_bytes
    assert differences(restored(tmp_path), expected_of(case)) == []
    v1 = by_path(v1_load(tmp_path / "0")["params"])
    assert differences(v1, expected_of(case)) == []


RESTORE_SHARDED = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from restoring import v1_load

mesh = Mesh(np.array(jax.devices()), ("x",))
def restore(made, axis):
    # Every array cut along one axis where 4 divides it: across chunks for some, along them for others.
    def abstract(m):
        at = (axis + len(m.shape)) % max(1, len(m.shape))
        cut = len(m.shape) > 0 and m.shape[at] % 4 == 0
        spec = P(*("x" if i == at else None for i in range(len(m.shape)))) if cut else P()
        return jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=NamedSharding(mesh, spec))
    metadata = ocp.StandardCheckpointer().metadata(made / "items").item_metadata
    target = {"step": 0, "params": jax.tree.map(abstract, dict(metadata)["params"]), "opt_state": {}}
    yield ocp.StandardCheckpointer().restore(made / "items", target)
    yield v1_load(made, target)

for axis in (0, -1):
    for a, b in zip(*(restore(Path(made), axis) for made in sys.argv[1:]), strict=True):
        equal = jax.tree.map(lambda x, y: x.sharding == y.sharding and x.dtype == y.dtype
            and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a["params"], b["params"])
        assert all(jax.tree.leaves(equal)), equal
"""


def test_orbax_restores_onto_devices_what_it_does_of_a_copied_one(tmp_path: Path) -> None:
    convert(linked(), CASE.hf, tmp_path / "linked")
    convert(compile_case(CASE), CASE.hf, tmp_path / "copied")
    command = [sys.executable, "-c", RESTORE_SHARDED, str(tmp_path / "linked" / "0"), str(tmp_path / "copied" / "0")]
    done = subprocess.run(command, env=with_devices(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_padding_is_made_and_what_is_before_it_linked(tmp_path: Path) -> None:
    plan = linked(set={"padded_vocab": 192})  # of 160
    array = next(a for a in plan.arrays if a.name.endswith("embedding"))
    expected = expected_of(CASE)[array.name]
    assert array.link is not None and array.shape[0] == 192
    convert(plan, CASE.hf, tmp_path)
    found = restored(tmp_path)[array.name]
    assert difference(array.name, found[:160], expected[:160]) is None
    assert not found[160:].astype(np.float32).any()


def test_nothing_is_linked_where_every_number_is_converted(tmp_path: Path) -> None:
    plan = linked(dtype="float32")
    assert plan.totals.linked_bytes == 0
    convert(plan, CASE.hf, tmp_path)
    assert not (tmp_path / "0" / "items" / "linked").exists()


# -- other commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_", ["qwen3_moe.scan", "llama3_1.unscan"])
def test_export_gives_the_original_back(id_: str, tmp_path: Path) -> None:
    case = CASES[id_]
    convert(linked(case), case.hf, tmp_path / "orbax")
    plan = export_plan(case, tmp_path / "orbax")
    found, _ = exported(plan, tmp_path / "orbax", tmp_path / "hf", case)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []


def test_diff_finds_it_equal_to_a_copied_one(tmp_path: Path) -> None:
    convert(linked(), CASE.hf, tmp_path / "linked")
    convert(compile_case(CASE), CASE.hf, tmp_path / "copied")
    first, second = (diff.open_side(tmp_path / name, 1 << 20) for name in ("linked", "copied"))
    assert diff.compare(first, second, 1 << 20).differences == ()


def test_verify_says_which_arrays_have_no_checksum(source: Path, tmp_path: Path) -> None:
    plan = linked()
    convert(plan, source, tmp_path / "out")
    verified = check_sums(tmp_path / "out" / "0")
    assert set(verified.linked) == {a.name for a in plan.arrays if a.link is not None}
    assert 0 < len(verified.linked) < verified.arrays == len(plan.arrays)


def test_verify_notices_a_source_that_was_changed_in_place(source: Path, tmp_path: Path) -> None:
    convert(linked(), source, tmp_path / "out")
    changed = sorted(source.glob("*.safetensors"))[0]
    with changed.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\1")
    with pytest.raises(InputError) as error:
        check_sums(tmp_path / "out" / "0")
    assert codes(error) == {"linked-changed"} and changed.name in error.value.diagnostics[0].message


@pytest.mark.parametrize("times", ["new", "set back"])
def test_verify_against_the_source_notices_that_it_was_changed_in_place(
    source: Path, tmp_path: Path, times: str
) -> None:
    """The linked file is the source's own: compared bit by bit, it would be equal to itself."""
    convert(linked(), source, tmp_path / "out")
    changed = sorted(source.glob("*.safetensors"))[0]
    before = changed.stat()
    with changed.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\1")
    if times == "set back":
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    (before_it,) = linked().sources
    now = zip(before_it.files, open_checkpoint(source).files, strict=True)
    changed_source = replace(before_it, files=tuple(replace(f, content=c.content) for f, c in now))
    plan = replace(linked(), sources=(changed_source,))
    with pytest.raises(InputError) as error:
        against_source(plan, tmp_path / "out" / "0", source, None, lambda progress: None)
    assert codes(error) == {"linked-changed"} and changed.name in error.value.diagnostics[0].message


def test_verify_does_not_mind_a_source_that_was_replaced(source: Path, tmp_path: Path) -> None:
    convert(linked(), source, tmp_path / "out")
    for file in source.glob("*.safetensors"):
        file.unlink()
        file.write_bytes(b"another")
    check_sums(tmp_path / "out" / "0")
    assert differences(restored(tmp_path / "out"), expected_of(CASE)) == []


# -- files ---------------------------------------------------------------------------------------------------


def test_the_source_is_left_as_it_was(source: Path, tmp_path: Path) -> None:
    before = {p.name: (p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()}
    convert(linked(), source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert {p.name: (p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()} == before


def test_links_of_the_hubs_cache_are_followed_to_its_blobs(source: Path, tmp_path: Path) -> None:
    blobs = source.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(source.glob("*.safetensors"))):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    convert(linked(), source, tmp_path / "out")
    shutil.rmtree(source)
    folder = tmp_path / "out" / "0" / "items" / "linked"
    assert all(not p.is_symlink() and p.stat().st_nlink == 2 for p in folder.iterdir())
    assert differences(restored(tmp_path / "out"), expected_of(CASE)) == []


def test_another_file_system_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one file system")
    output = other / f"ckptc-test-{os.getpid()}"
    try:
        with pytest.raises(InputError) as error:
            convert(linked(), source, output)
        assert codes(error) == {"cannot-link"} and "file system" in str(error.value)
        assert list(output.iterdir()) == []
        convert(compile_case(CASE), source, output)  # nothing is in another plan's way
    finally:
        shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EPERM, "no hard links"), (errno.EOPNOTSUPP, "no hard links"), (errno.EMLINK, "as many names")],
    ids=errno.errorcode.get,
)
def test_what_the_system_refuses_to_link_is_said(
    number: int, said: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which file systems and kernels do is not up to a test."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError) as error:
        convert(linked(), source, tmp_path / "out")
    assert codes(error) == {"cannot-link"} and said in str(error.value)
    assert "--link" in (error.value.diagnostics[0].help or "")


def test_a_file_changed_since_is_refused(source: Path, tmp_path: Path) -> None:
    plan = linked()
    with sorted(source.glob("*.safetensors"))[0].open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match="source-changed"):
        convert(plan, source, tmp_path / "out")


# -- runs that stop and go on --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASE, ALL], ids=lambda case: case.id)
def test_a_stopped_run_goes_on(case: GoldenCase, tmp_path: Path) -> None:
    plan = linked(case)
    digest = json.loads(dumps(plan))["digest"]

    def stop(_: Path) -> None:
        raise InterruptedError("stopped")

    with pytest.raises(InputError):
        run(plan, digest, tmp_path, case.hf, before_commit=stop)
    assert not (tmp_path / "0").exists() and (tmp_path / UNFINISHED).exists()
    report = run(plan, digest, tmp_path, case.hf)
    assert report.read_bytes == 0  # what was copied is kept
    assert differences(restored(tmp_path), expected_of(case)) == []
    assert check_sums(tmp_path / "0").arrays == len(plan.arrays)


def test_a_run_that_was_killed_after_it_named_its_output_is_done(tmp_path: Path) -> None:
    plan = linked(ALL)
    assert plan.totals.linked_bytes == plan.totals.write_bytes  # no journal tells of it
    unfinished = tmp_path / UNFINISHED
    digest = json.loads(dumps(plan))["digest"]
    run(plan, digest, tmp_path, ALL.hf, before_commit=lambda _: shutil.copytree(unfinished, tmp_path / "kept") and None)
    (tmp_path / "kept").rename(unfinished)
    shutil.rmtree(unfinished / "checkpoint")
    run(plan, digest, tmp_path, ALL.hf)
    assert not unfinished.exists()


def test_an_output_is_replaced_by_force_only(tmp_path: Path) -> None:
    convert(linked(), CASE.hf, tmp_path)
    with pytest.raises(InputError, match="output-exists"):
        convert(linked(), CASE.hf, tmp_path)
    convert(linked(), CASE.hf, tmp_path, force=True)
    assert differences(restored(tmp_path), expected_of(CASE)) == []
