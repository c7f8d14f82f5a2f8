"""Outputs in an object store: what Orbax restores from there, and that it never looks finished before it is."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from msgspec.structs import replace
from orbax.checkpoint import utils as ocp_utils

from ckptc.diagnostics import InputError
from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Plan
from ckptc.run import runner
from ckptc.run.output import largest_chunk
from ckptc.run.remote import RemoteOutput
from ckptc.run.runner import Settings
from emulated import BUCKET, clear, emulator, objects, put, store
from golden import compile_case, differences, expected_of, known_cases
from restoring import Arrays, by_path, jax_with_64_bits
from waiting import SECONDS, wait_for

CASE = next(case for case in known_cases() if case.id == "qwen3_moe.scan")
MEMORY = 1 << 17  # some twenty objects

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def gcs() -> Iterator[None]:
    with emulator():
        yield


@pytest.fixture
def url() -> Iterator[str]:
    """An output of this test alone."""
    yield f"gs://{BUCKET}/outputs/one"
    clear()


@pytest.fixture(scope="module")
def plan() -> Plan:
    made = compile_case(CASE, memory=MEMORY // 4)  # units that several workers have room for
    return replace(made, choices=replace(made.choices, memory=MEMORY))


@pytest.fixture(scope="module")
def local(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in a directory."""
    output = tmp_path_factory.mktemp("local") / "out"
    here(plan, output)
    return output


def here(plan: Plan, output: Path | str, **settings: Any) -> runner.Report:
    """A run in this process, with one job: TensorStore has threads here, so it cannot be forked."""
    text = dumps(plan)
    return runner.run(loads(text), json.loads(text)["digest"], output, CASE.hf, settings=Settings(1, **settings))


def there(plan_file: Path, output: str, *options: str, patch: str = "", shown: str = "--json") -> subprocess.Popen[str]:
    """`ckptc run` in a process group of its own; `patch` is run before."""
    command = ["run", str(plan_file), "--source", str(CASE.hf), "--output", output, shown, *options]
    script = f"""\
import os, signal, time
from ckptc.cli.main import main
from ckptc.storage.sink import bucket as objects
from ckptc.run import distributed, remote, runner, work, worker
from ckptc.run import coordinator as peers
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def after(module, name):
    plain = getattr(module, name)
    setattr(module, name, lambda *a, **k: (plain(*a, **k), die()))
{patch}
main({command!r})
"""
    pipe, argv = subprocess.PIPE, [sys.executable, "-c", script]
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr without what TensorStore logs."""
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, re.sub(r"^[IWE]\d{4} .*\n", "", err, flags=re.MULTILINE)


def done(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The report of a run that has done its work."""
    code, out, err = ended(process)
    assert (code, err) == (0, "")
    report: dict[str, Any] = json.loads(out)
    return report


def restored(url: str) -> Arrays:
    """What plain Orbax restores from the store."""
    with jax_with_64_bits():
        return by_path(ocp.StandardCheckpointer().restore(f"{url}/0/items")["params"])


def sums(metadata: bytes) -> Any:
    return json.loads(metadata)["custom_metadata"]["ckptc"]["checksums"]


def assert_whole(url: str, local: Path) -> None:
    """The checkpoint is there, finished, right, and alone: with every object that it is made of, and no other."""
    found = objects(url)
    assert {name.split("/")[0] for name in found} == {"0"}
    for name in ("_METADATA", "_sharding", "array_metadatas/process_0"):
        assert found[f"0/items/{name}"] == (local / "0" / "items" / name).read_bytes()
    assert sums(found["0/_CHECKPOINT_METADATA"]) == sums((local / "0" / "_CHECKPOINT_METADATA").read_bytes())
    assert ocp_utils.checkpoint_steps(url) == [0]
    # Every object of data holds chunks, but for one of each writer, its index.
    data, chunks = data_objects(found), chunk_objects(url)
    assert chunks < set(data)
    writers = [name for name in found if re.fullmatch(r"0/items/ocdbt\.process_\d+/manifest\.ocdbt", name)]
    assert len(data) - len(chunks) == len(writers)
    with TemporaryDirectory() as copy:
        assert database(downloaded(url, Path(copy))) == database(local)


def data_objects(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: text for name, text in found.items() if re.match(r"0/items/ocdbt\.process_\d+/d/", name)}


def chunk_objects(url: str) -> set[str]:
    """The objects that the checkpoint's index refers to."""
    kv = ts.KvStore.open({"driver": "gcs", "bucket": BUCKET, "path": f"{in_bucket(url)}/0/items/"}).result()
    used, todo = set(), [ts.ocdbt.dump(kv).result()["versions"][-1]["root"]["location"]]
    while todo:
        for entry in ts.ocdbt.dump(kv, todo.pop()).result()["entries"]:
            if "indirect_value" in entry:  # value:<base>:<file>:<offset>:<length>
                _, base, file, _, _ = entry["indirect_value"].split(":")
                used.add(f"0/items/{base}{file}")
            elif "location" in entry:
                todo.append(entry["location"])
    return used


def database(output: Path) -> dict[bytes, bytes]:
    """What the index of a checkpoint leads to: zarr's metadata, and each chunk as it is stored."""
    kv = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{output}/0/items/"}}).result()
    return {key: kv.read(key).result().value for key in kv.list().result()}


def downloaded(url: str, to: Path) -> Path:
    """A copy of all objects in a directory."""
    for name, content in objects(url).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


def in_bucket(url: str) -> str:
    return url.removeprefix(f"gs://{BUCKET}/")


def assert_unfinished(url: str) -> None:
    """Nothing that Orbax would take for a checkpoint."""
    assert ocp_utils.checkpoint_steps(url) == []
    with pytest.raises((ValueError, FileNotFoundError)):
        ocp.StandardCheckpointer().restore(f"{url}/0/items")


def noted_units(url: str) -> int:
    """Units that the journals speak of."""
    return sum(len(json.loads(text)["units"]) for name, text in objects(url).items() if "/journal." in name)


SLOW = """\
made = worker.Worker._make
worker.Worker._make = lambda *a: (time.sleep(0.03), made(*a))[1]
"""


# --- what is there at the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_orbax_restores_from_the_store_what_it_restores_from_a_directory(
    plan_file: Path, local: Path, jobs: str, url: str
) -> None:
    report = done(there(plan_file, url, "--jobs", jobs))
    assert report["output"] == f"{url}/0"
    assert_whole(url, local)
    assert differences(restored(url), expected_of(CASE)) == []
    found = objects(url)
    names = {re.sub("[0-9a-f]{32}", "*", name) for name in found}
    writers = {match[0] for name in names if (match := re.search(r"ocdbt\.process_\d", name))}
    assert len(writers) <= int(jobs)
    assert {re.sub(r"process_\d", "process_0", name) for name in names} == {
        re.sub("[0-9a-f]{32}", "*", path.relative_to(local).as_posix()) for path in local.rglob("*") if path.is_file()
    }
    data = sum(map(len, data_objects(found).values()))
    assert data * 0.9 < report["stored_bytes"] < data * 1.1


@pytest.mark.parametrize(
    "options",
    [{"compression": "zstd:1"}, {"compression": "blosc-lz4"}, {"mesh": (("fsdp", 2), ("tensor", 2))}],
    ids=str,
)
def test_compressed_and_sharded_checkpoints_are_restored(options: dict[str, Any], url: str, tmp_path: Path) -> None:
    if "mesh" in options:
        from ckptc.spec.target import target_tree

        options = {**options, "rules": target_tree("maxtext").rules}
    made = compile_case(CASE, memory=MEMORY, **options)
    file = tmp_path / "plan.json"
    file.write_text(dumps(made), "utf-8")
    here(made, tmp_path / "out")
    done(there(file, url, "--jobs", "2"))
    found = objects(url)
    for name in ("_METADATA", "_sharding", "array_metadatas/process_0"):
        assert found[f"0/items/{name}"] == (tmp_path / "out" / "0" / "items" / name).read_bytes()
    assert database(downloaded(url, tmp_path / "copy")) == database(tmp_path / "out")
    if "mesh" not in options:  # which needs as many devices, if it is restored without a target
        assert differences(restored(url), expected_of(CASE)) == []


def test_objects_have_the_size_that_memory_allows(plan: Plan, local: Path, url: str) -> None:
    here(plan, url)
    found, chunks = objects(url), chunk_objects(url)
    sizes = sorted(len(found[name]) for name in chunks)
    assert sizes[-1] <= max(MEMORY // 16, largest_chunk(plan)) and sizes[len(sizes) // 2] > MEMORY // 32


# --- killed and going on ----------------------------------------------------------------------------------------------


def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(plan_file: Path, local: Path, url: str) -> None:
    """With another number of workers each time, and what was noted once is not made again."""
    rng, kills, noted = random.Random(7), 0, 0
    while kills < 3:
        process = there(plan_file, url, "--jobs", str(rng.choice([1, 2, 3])), patch=SLOW.replace("0.03", "0.15"))
        wait_for(lambda: process.poll() is not None or noted_units(url) > noted)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if ended(process)[0] == 0:
            break
        kills += 1
        assert_unfinished(url)
        assert noted_units(url) > noted
        noted = noted_units(url)
    assert kills >= 2
    done(there(plan_file, url, "--jobs", "2"))
    assert_whole(url, local)


STEPS = [
    "after(objects.ObjectStore, 'probe')",
    "after(objects.ObjectStore, 'write')",  # of the plan
    "after(objects.ObjectData, '_send')",
    "after(objects.ObjectData, '_settle')",
    "after(remote._Journal, '_note')",
    "after(remote._Journal, 'flush')",
    "after(objects.ObjectData, 'close')",
    "after(work.ItemsWriter, 'close')",
    "objects.ObjectStore.supersede = die",
    "after(objects.ObjectStore, 'supersede')",
]


@pytest.mark.parametrize("patch", STEPS)
def test_a_run_killed_at_any_step_of_the_way_is_finished_by_the_same_command(
    plan: Plan, plan_file: Path, local: Path, patch: str, url: str
) -> None:
    assert (
        ended(there(plan_file, url, "--jobs", "1", patch=patch))[0] != 0
    )  # in a child, as far as workers are still to be forked
    assert_unfinished(url)
    here(plan, url)
    assert_whole(url, local)


@pytest.mark.parametrize("count", [0, 3, 5, 7, 9])
def test_a_run_killed_between_two_objects_of_the_commit_is_not_finished(
    plan: Plan, plan_file: Path, local: Path, count: int, url: str
) -> None:
    """Each of the index, the metadata, the files beside them and the markers in turn is the last that was written. Only with the last of all the
    output is a checkpoint, and only with the marker of its items can they be restored without it."""
    patch = f"""\
supersede, write, left = objects.ObjectStore.supersede, objects.ObjectStore.write, [None]
def begin(*a):
    supersede(*a)
    left[0] = {count}
def count(*a):
    write(*a)
    if left[0] is not None:
        left[0] -= 1
        if left[0] < 0:
            die()
objects.ObjectStore.supersede, objects.ObjectStore.write = begin, count
"""
    assert ended(there(plan_file, url, "--jobs", "1", patch=patch))[0] == -signal.SIGKILL
    assert ocp_utils.checkpoint_steps(url) == ([0] if count == 9 else [])
    if count < 7:
        assert_unfinished(url)
    else:
        assert differences(restored(url), expected_of(CASE)) == []
    here(plan, url)
    assert_whole(url, local)


def test_a_run_killed_while_it_tidies_up_has_its_output(plan: Plan, plan_file: Path, local: Path, url: str) -> None:
    patch = "remote.RemoteUnfinished.forget = die"
    assert ended(there(plan_file, url, "--jobs", "1", patch=patch))[0] == -signal.SIGKILL
    assert ocp_utils.checkpoint_steps(url) == [0]
    before = objects(url)
    report = here(plan, url)
    assert report.read_bytes == 0
    assert_whole(url, local)
    assert before["0/items/manifest.ocdbt"] == objects(url)["0/items/manifest.ocdbt"]
    with pytest.raises(InputError, match="output-exists"):
        here(plan, url)


def test_units_that_are_noted_are_not_made_again(plan: Plan, plan_file: Path, local: Path, url: str) -> None:
    patch = "made = worker.Worker._make\nworker.Worker._make = lambda s, k, u, x: die() if k == 9 else made(s, k, u, x)"
    code, _, err = ended(there(plan_file, url, "--jobs", "2", patch=patch))
    assert code == 1 and "error[worker-died]" in err and "Traceback" not in err
    noted = noted_units(url)
    assert noted > 0
    made = "import sys\nplain = worker.Worker._make\n"
    made += "worker.Worker._make = lambda *a: (print('unit', file=sys.stderr), plain(*a))[1]"
    code, _, err = ended(there(plan_file, url, "--jobs", "1", patch=made))
    units = sum(len(list(a.units())) for a in plan.arrays)
    assert code == 0 and err.count("unit") == units - noted
    assert_whole(url, local)


# --- what is there before ---------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_there_is_refused_and_kept(plan: Plan, url: str) -> None:
    put(f"{url}/0/mine", b"mine")
    with pytest.raises(InputError, match=f"output-exists: there is a checkpoint at {url}/0 already"):
        here(plan, url)
    assert objects(url) == {"0/mine": b"mine"}


def test_neighbours_whose_names_begin_alike_are_not_touched(plan: Plan, local: Path, url: str) -> None:
    neighbours = {f"{url}{rest}": b"mine" for rest in ("0", "/00", "-/0/items/x", "/0.d/x", "/.ckptc-unfinishe")}
    for name, content in neighbours.items():
        put(name, content)
    here(plan, url)
    here(plan, url, force=True)
    for name, content in neighbours.items():
        assert store().read(in_bucket(name)).result().value == content
    assert differences(restored(url), expected_of(CASE)) == []


@pytest.mark.parametrize("at", ["runner.finish = die", "objects.ObjectStore.supersede = die", None])
def test_force_replaces_a_checkpoint_only_at_the_end(
    plan: Plan, plan_file: Path, local: Path, at: str | None, url: str
) -> None:
    here(compile_case(CASE, memory=MEMORY, shards=4), url)
    put(f"{url}/0/items/more", b"of the older one")
    older = objects(url)
    if at is not None:
        assert ended(there(plan_file, url, "--jobs", "2", "--force", patch=at))[0] == -signal.SIGKILL
        assert {name: text for name, text in objects(url).items() if name in older and "process_" not in name} == {
            name: text for name, text in older.items() if "process_" not in name
        }
        assert differences(restored(url), expected_of(CASE)) == []  # the older one
        with pytest.raises(InputError, match="output-exists"):
            here(plan, url)
    here(plan, url, force=True)
    assert_whole(url, local)


def test_another_plan_is_refused_until_it_is_told_to_restart(
    plan: Plan, plan_file: Path, local: Path, url: str, tmp_path: Path
) -> None:
    other = compile_case(CASE, memory=MEMORY, shards=4)
    (tmp_path / "other.json").write_text(dumps(other), "utf-8")
    process = there(tmp_path / "other.json", url, "--jobs", "1", patch="runner.finish = die")
    assert ended(process)[0] == -signal.SIGKILL
    with pytest.raises(InputError, match=f"other-plan: an unfinished run of another plan is in {url}"):
        here(plan, url)
    here(plan, url, restart=True)
    assert_whole(url, local)


def test_of_two_runs_the_later_one_goes_on_and_the_earlier_fails(
    plan: Plan, plan_file: Path, local: Path, url: str
) -> None:
    process = there(plan_file, url, "--jobs", "1", patch=SLOW)
    wait_for(lambda: noted_units(url) or process.poll() is not None)
    here(plan, url)
    code, _, err = ended(process)
    assert code == 1 and f"error[output-busy]: another run has begun to write to {url}" in err
    assert differences(restored(url), expected_of(CASE)) == []
    assert sums(objects(url)["0/_CHECKPOINT_METADATA"]) == sums((local / "0" / "_CHECKPOINT_METADATA").read_bytes())


def paused(plan_file: Path, url: str, at: str, signs: Path) -> subprocess.Popen[str]:
    """A run that stops before it writes one of its last objects; it goes on once `go` is among the `signs`."""
    patch = f"""\
from pathlib import Path
write, signs = objects.ObjectStore.write, Path({str(signs)!r})
def pausing(self, name, *parts):
    if name == {at!r}:
        (signs / "there").touch()
        while not (signs / "go").exists():
            time.sleep(0.01)
    write(self, name, *parts)
objects.ObjectStore.write = pausing
"""
    process = there(plan_file, url, "--jobs", "1", patch=patch)
    wait_for(lambda: (signs / "there").exists() or process.poll() is not None)
    return process


def open_and_die(plan_file: Path, url: str) -> None:
    patch = "after(remote.RemoteOutput, 'open')"
    assert ended(there(plan_file, url, "--jobs", "1", patch=patch))[0] == -signal.SIGKILL


def test_a_run_that_is_overtaken_while_it_finishes_commits_nothing(
    plan: Plan, plan_file: Path, local: Path, url: str, tmp_path: Path
) -> None:
    process = paused(plan_file, url, "items/array_metadatas/process_0", tmp_path)
    open_and_die(plan_file, url)
    unfinished = {name: text for name, text in objects(url).items() if "unfinished" in name}
    (tmp_path / "go").touch()
    code, _, err = ended(process)
    assert code == 1 and f"error[output-busy]: another run has begun to write to {url}" in err
    assert_unfinished(url)
    assert {name: text for name, text in objects(url).items() if "unfinished" in name} == unfinished
    assert here(plan, url).read_bytes == 0  # all was noted
    assert_whole(url, local)


def test_a_run_that_is_overtaken_at_its_last_object_leaves_a_checkpoint_and_the_other_s_work(
    plan: Plan, plan_file: Path, local: Path, url: str, tmp_path: Path
) -> None:
    process = paused(plan_file, url, "commit_success.txt", tmp_path)
    open_and_die(plan_file, url)
    unfinished = {name: text for name, text in objects(url).items() if "unfinished" in name}
    (tmp_path / "go").touch()
    done(process)
    assert differences(restored(url), expected_of(CASE)) == []
    assert {name: text for name, text in objects(url).items() if "unfinished" in name} == unfinished
    here(plan, url)
    assert_whole(url, local)


# --- several processes ------------------------------------------------------------------------------------------------


def test_several_processes_write_one_checkpoint_and_a_rerun_of_another_number_goes_on(
    plan: Plan, plan_file: Path, local: Path, url: str
) -> None:
    def started(patch: str = "") -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        options = ["--coordinator", place, "--num-processes", "2", "--jobs", "1"]
        return [there(plan_file, url, *options, "--process-id", str(k), patch=patch) for k in range(2)]

    said = [ended(process) for process in started("runner.finish = die")]
    assert said[0][0] == -signal.SIGKILL and said[1][0] == 1 and "error[process-failed]" in said[1][2]
    assert_unfinished(url)
    assert noted_units(url) == sum(len(list(a.units())) for a in plan.arrays)
    reports = [done(process) for process in started()]
    assert [(r["process"], r["processes"]) for r in reports] == [(0, 2), (1, 2)]
    assert reports[0]["stored_bytes"] and reports[1]["stored_bytes"] is None  # which need not ask
    assert_whole(url, local)
    assert {name.split("/")[2] for name in objects(url) if "process_" in name and "array" not in name} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }


# --- what the store refuses -------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_said(plan_file: Path, url: str) -> None:
    code, _, err = ended(there(plan_file, "gs://no-such-bucket/x", "--jobs", "2"))
    assert code == 1 and "Traceback" not in err
    assert "error[output-store]: cannot write to gs://no-such-bucket/x: NOT_FOUND: Not Found" in err
    assert "create the bucket, or correct its name" in err


def test_a_store_that_cannot_be_reached_is_said(plan_file: Path, url: str) -> None:
    patch = "objects.RETRIES = 1\nos.environ['TENSORSTORE_GCS_HTTP_URL'] = 'http://127.0.0.1:9'"
    code, _, err = ended(there(plan_file, url, "--jobs", "2", patch=patch))
    assert code == 1 and "Traceback" not in err
    assert f"error[output-store]: cannot write to {url}: ABORTED: All 1 retry attempts failed: CURL error" in err


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_store_that_fails_on_the_way_leaves_a_state_to_go_on_from(
    plan: Plan, plan_file: Path, local: Path, jobs: str, url: str
) -> None:
    patch = """\
start, count = objects.ObjectStore.start, [0]
def fail(self, name, value):
    count[0] += 1
    return start(self, name, value) if count[0] < 10 else start(objects.ObjectStore(
        {"driver": "gcs", "bucket": "no-such-bucket", "path": ""}, "", 1), name, value)
objects.ObjectStore.start = fail
"""
    code, _, err = ended(there(plan_file, url, "--jobs", jobs, patch=patch))
    assert code == 1 and "error[output-store]: cannot write " in err and "Traceback" not in err
    assert "the same command goes on from there" in err
    assert noted_units(url) > 0
    assert_unfinished(url)
    here(plan, url)
    assert_whole(url, local)


LOST = """\
spec = objects.ObjectStore.spec
objects.ObjectStore.spec = lambda self, below: {{
    **spec(self, below), **({{"bucket": "no-such-bucket"}} if below == "{below}" else {{}})}}
"""


def test_a_store_that_fails_when_indexes_are_read_back_is_said(
    plan: Plan, plan_file: Path, local: Path, url: str
) -> None:
    lost = LOST.format(below="items/ocdbt.process_0/")
    code, _, err = ended(there(plan_file, url, "--jobs", "1", patch=lost))
    assert code == 1 and f"error[output-store]: cannot read {url}/0/items/ocdbt.process_0/: " in err
    assert_unfinished(url)
    here(plan, url)
    assert_whole(url, local)


def test_a_run_that_has_committed_does_not_fail_for_want_of_a_size(url: str, tmp_path: Path) -> None:
    packed = compile_case(CASE, memory=MEMORY, compression="zstd:1")
    (tmp_path / "plan.json").write_text(dumps(packed), "utf-8")
    lost = LOST.format(below="items/")
    assert done(there(tmp_path / "plan.json", url, "--jobs", "1", patch=lost))["stored_bytes"] is None
    assert differences(restored(url), expected_of(CASE)) == []
    again = there(tmp_path / "plan.json", url, "--jobs", "1", "--force", patch=lost, shown="--quiet")
    assert f" written as an unknown size to {url}/0 " in ended(again)[1]


def test_buffers_count_as_memory(plan: Plan) -> None:
    large = replace(plan, choices=replace(plan.choices, memory=512 << 20))
    assert RemoteOutput("gs://b/x", large).held() == 64 << 20
    narrow = replace(large, totals=replace(plan.totals, peak_memory_bytes=500 << 20))
    with pytest.raises(InputError, match="small-memory"):
        here(narrow, f"gs://{BUCKET}/x")


@pytest.mark.parametrize("url", ["gs://", "gs:///x", "gs://b//x", "file://x", "s3://b/x"])
def test_what_is_no_url_of_a_bucket_is_refused(plan: Plan, url: str) -> None:
    with pytest.raises(InputError, match="unsupported-url"):
        here(plan, url)
