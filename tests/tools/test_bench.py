"""The benchmark measures what it says, on a tiny checkpoint: a row for every mode, or the reason why there is none."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

TOOLS = Path(__file__).parents[2] / "tools"
FIGURES = {"rate", "best", "worst", "median_seconds", "cpu_s_per_gb", "peak_mb"}
LISTS = {"seconds", "cpu_seconds", "peak_bytes"}


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


def started(home: Path, program: str, *options: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a benchmark."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(home / "cache")}
    return [sys.executable, str(TOOLS / program), *options, "--json", str(home / "report.json")], environment


def run(home: Path, program: str, *options: str) -> tuple[dict[str, Any], str]:
    """What a benchmark wrote as JSON, and what it printed."""
    command, environment = started(home, program, *options)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((home / "report.json").read_text("utf-8"))
    assert {"cores", "processor", "memory_gb", "disk", "system", "versions"} == set(report["machine"])
    assert "none" not in report["machine"]["versions"].values()
    return report, done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def there(home: Path) -> tuple[dict[str, Any], str]:
    """Every mode, one that cannot work, and a MaxText that is not there."""
    python = home / "python"
    python.write_text("#!/bin/sh\necho starting >&2\necho No module named maxtext >&2\nexit 1\n")
    python.chmod(0o755)
    options = ("--gigabytes", "0.002", "--runs", "1", "--maxtext-python", str(python), "--with", "--set nothing=1")
    return run(home, "bench.py", str(home / "work"), *options)


def test_every_mode_has_a_row_of_figures_or_the_reason_why_not(home: Path, there: tuple[dict[str, Any], str]) -> None:
    report, said = there
    (measurement,) = report["measurements"]
    assert (report["direction"], measurement["cache"]) == ("convert", "warm")
    assert measurement["gigabytes"] == pytest.approx(0.002, rel=0.1)
    rows = {row["mode"]: row for row in measurement["modes"]}
    modes = [mode.name for mode in module("bench_modes").modes(["--set nothing=1"], False, "python")]
    assert list(rows) == modes and len(modes) == 11
    failed = {name: row["failed"] for name, row in rows.items() if row["failed"] is not None}
    assert failed.pop("MaxText's converter") == "No module named maxtext"
    assert failed.pop("ckptc --set nothing=1").startswith("error[")
    assert not failed
    for name, row in rows.items():
        if row["failed"] is None:
            assert row["runs"] == 1 and row.keys() >= FIGURES and row["median_seconds"] > 0
            assert all(len(row[key]) == 1 for key in LISTS)
            assert name == "cp + sync" or (row["peak_mb"] > 20 and row["cpu_s_per_gb"] > 0), name  # it ends too soon
            assert f"| {name} | " in said
        else:
            assert not (FIGURES | LISTS) & set(row)
            assert f"| {name} | failed: {row['failed']} |" in said
    assert not list((home / "work").rglob("output"))


def test_the_way_back_is_measured_warm_and_cold(home: Path, there: tuple[dict[str, Any], str]) -> None:
    options = ("--gigabytes", "0.002", "--export", "--cache", "warm,cold", "--runs", "1", "--only", "ckptc export")
    report, said = run(home, "bench.py", str(home / "work"), *options)
    assert report["direction"] == "export"
    assert [m["cache"] for m in report["measurements"]] == ["warm", "cold"]
    for measurement in report["measurements"]:
        assert [(row["mode"], row["failed"]) for row in measurement["modes"]] == [
            ("cp + sync", None),
            ("ckptc export", None),
        ]
    assert all(f"GB, {cache} cache, medians of 1 interleaved runs" in said for cache in ("warm", "cold"))


def test_slow_modes_run_in_the_first_rounds_and_a_failed_one_never_again(tmp_path: Path) -> None:
    bench, modes = module("bench"), module("bench_modes")
    log = tmp_path / "log"

    def mode(name: str, script: str, slow: bool = False) -> Any:
        return modes.Mode(name, lambda place: ["sh", "-c", f"echo {name} >> {log}; {script}"], slow=slow)

    wanted = [mode("base", "true"), mode("slow", "true", slow=True), mode("broken", "echo why; exit 3")]
    wanted.append(modes.Mode("absent", lambda place: ["/no/such/program"]))
    (tmp_path / "source").mkdir()
    results = bench.unmeasured(wanted, ["warm"])
    bench.run_all(modes.Place(tmp_path), wanted, results, 3, 1)
    assert log.read_text().split() == ["base", "slow", "broken", "base", "base"]
    assert {name: (len(r.runs), r.failed) for name, r in results["warm"].items()} == {
        "base": (3, None),
        "slow": (1, None),
        "broken": (0, "why"),
        "absent": (0, "/no/such/program: No such file or directory"),
    }


def test_what_was_running_ends_with_an_interruption(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            module("bench_measure").measure(["sh", "-c", f"sleep 60 & echo $! > {pids}; echo $$ >> {pids}; wait"])
    finally:
        signal.signal(signal.SIGALRM, before)
    running = [psutil.Process(int(pid)) for pid in pids.read_text().split() if psutil.pid_exists(int(pid))]
    _, alive = psutil.wait_procs(running, timeout=10)  # until whoever has adopted them has heard of their end
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_an_interrupted_session_reports_what_it_has(tmp_path: Path) -> None:
    command, environment = started(tmp_path, "bench.py", str(tmp_path), "--gigabytes", "0.002", "--only", "ckptc")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 2, warm: ckptc:"):
            break
    process.terminate()
    said, errors = process.communicate()
    assert process.returncode == 1 and "interrupted" in errors
    assert "| ckptc | " in said
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["interrupted"]
    copied, converted = (row["runs"] for row in report["measurements"][0]["modes"])
    assert copied >= 1 and converted >= 2 and copied + converted < 10  # of 5 rounds
    assert not list(tmp_path.rglob("output"))


def test_memory_of_all_processes_counts_and_time_goes_on_until_the_end() -> None:
    measure = module("bench_measure").measure
    size = 100 << 20
    hold = f"import time; held = b'x' * {size}; time.sleep(0.5)"
    script = f'{sys.executable} -c "{hold}" & {sys.executable} -c "{hold}" & wait'
    found = measure(["sh", "-c", script])
    assert 2 * size < found.peak < 3 * size
    assert found.seconds > 0.5
    assert found.cpu > 0


def test_pages_that_processes_share_count_once() -> None:
    size = 200 << 20
    fork = f"import os, time; held = b'x' * {size}; child = os.fork(); time.sleep(0.5); child and os.wait()"
    assert size < module("bench_measure").measure([sys.executable, "-c", fork]).peak < 1.5 * size


def test_what_uses_up_the_memory_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = module("bench_measure")
    monkeypatch.setattr(measure, "SPARE", 1)  # all of the machine's: there is always less
    with pytest.raises(measure.Failed, match=r"stopped at .* GB: the machine's memory was used up"):
        measure.measure(["sh", "-c", "sleep 60 & sleep 60"])


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo first; echo 'error[a-code]: text'; echo '  = help: x'; exit 1", r"error\[a-code\]: text"),
        ("echo first; echo last; echo; exit 1", "last"),
        ("exit 7", "exit code 7"),
        ("echo said; kill -9 $$", "ended by SIGKILL; said"),
    ],
)
def test_the_reason_of_a_failure_is_a_line(script: str, reason: str) -> None:
    measure = module("bench_measure")
    with pytest.raises(measure.Failed, match=f"^{reason}$"):
        measure.measure(["sh", "-c", script])


@pytest.mark.parametrize("bad", [0, 1, None])
def test_processes_beside_each_other_fail_where_one_does(bad: int | None) -> None:
    measure, modes = module("bench_measure"), module("bench_modes")
    command = modes.beside(2, ["sh", "-c", f'test "$2" != "{bad}" || {{ echo "$1 $2 fails"; exit 1; }}', "sh"])
    if bad is None:
        measure.measure(command)
        return
    with pytest.raises(measure.Failed, match=f"^--process-id {bad} fails$"):
        measure.measure(command)


def cached(path: Path) -> bool:
    """Whether the start of a file is in the page cache."""
    with open(path, "rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError:
            pytest.skip("the file system does not say what is cached")


def test_a_source_is_dropped_from_the_cache_and_read_into_it(tmp_path: Path) -> None:
    measure = module("bench_measure")
    file, other = tmp_path / "below" / "file", tmp_path / "other"
    file.parent.mkdir()
    for one in (file, other):
        one.write_bytes(bytes(1 << 20))
        assert cached(one)
    with open(other, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(other):
        pytest.skip("the file system keeps its files in memory")
    measure.forget(tmp_path)
    assert not cached(file)
    measure.fill(tmp_path)
    assert cached(file)


def test_a_checkpoint_of_the_size_is_used_where_it_lies(tmp_path: Path) -> None:
    bench = module("bench")
    assert bench.place_for(tmp_path, 0.001).home == tmp_path / "0.001gb"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(bytes(1_000_000))
    assert bench.place_for(tmp_path, 0.001).home == tmp_path
    assert bench.place_for(tmp_path, 0.002).home == tmp_path / "0.002gb"


def test_an_unknown_mode_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("bench").arguments(["work", "--only", "ckptc --links"])
    assert "no mode ckptc --links; there are: cp + sync, ckptc, " in capsys.readouterr().err
