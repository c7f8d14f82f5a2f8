"""Several processes that run one plan, for real, on this machine: the output of one, or no output and a clear text."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptc.cli.main import run as command
from ckptc.diagnostics import InputError
from ckptc.plan.json import dumps
from ckptc.plan.model import Plan
from ckptc.run.journal import LOCK, UNFINISHED, flock, open_unfinished
from golden import compile_case, differences, expected_of, known_cases
from restoring import restored
from waiting import SECONDS, wait_for

CASE = next(case for case in known_cases() if case.id == "qwen3_moe.scan")
SLOW = """\
made = worker.Worker._make
worker.Worker._make = lambda *a: (time.sleep(0.02), made(*a))[1]
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Hundreds of units."""
    return compile_case(CASE, memory=2048)


@pytest.fixture(scope="module")
def alone(plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert command(["run", str(plan_file), "--source", str(CASE.hf), "--output", str(output), "--quiet"]) == 0
    return output


class Run:
    """The processes of one run, each as a user starts it; `patch` is Python that runs in each before."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.started: list[subprocess.Popen[str]] = []

    def start(self, plan: Path, output: Path, process: int, processes: int, *options: str, patch: str = "") -> None:
        argv = ["run", str(plan), "--source", str(CASE.hf), "--output", str(output), "--json", "--jobs", "1"]
        argv += ["--coordinator", f"127.0.0.1:{self.port}", "--num-processes", str(processes)]
        argv += ["--process-id", str(process), *options]
        script = f"""\
import os, time
from ckptc.cli.main import main
from ckptc.run import distributed, journal, worker
from ckptc.run import coordinator as peers
journal.SYNC_SECONDS = 0.0
os.fsync = os.fdatasync = lambda descriptor: None
{patch}
main({argv!r})
"""
        pipe = subprocess.PIPE
        self.started.append(subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True))

    def ended(self) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each, in the order in which they were started."""
        said = [process.communicate(timeout=SECONDS) for process in self.started]
        return [(process.returncode, *texts) for process, texts in zip(self.started, said, strict=True)]

    def companion(self, number: int) -> int:
        """The process that holds JAX for the one that was started `number`th."""
        children = Path(f"/proc/{self.started[number].pid}/task/{self.started[number].pid}/children")
        return next(
            int(pid)
            for pid in children.read_text().split()
            if "coordinator_process" in Path(f"/proc/{pid}/cmdline").read_text()
        )


@pytest.fixture
def processes() -> Iterator[Run]:
    run = Run()
    yield run
    for process in run.started:
        process.kill()
        process.communicate()


def custom(output: Path) -> Any:
    return json.loads((output / "0" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


def assert_as_alone(output: Path, alone: Path) -> None:
    assert [p.name for p in output.iterdir()] == ["0"]
    assert custom(output) == custom(alone)
    for name in ("items/_METADATA", "items/_sharding", "items/array_metadatas/process_0"):
        assert (output / "0" / name).read_bytes() == (alone / "0" / name).read_bytes()
    assert differences(restored(output), expected_of(CASE)) == []


def done_units(output: Path, process: int) -> int:
    """Units that the journal of a process speaks of."""
    try:
        lines = (output / UNFINISHED / f"journal.{process}").read_bytes().split(b"\n")
    except FileNotFoundError:
        return 0
    return sum(len(json.loads(line)["units"]) for line in lines[1:-1])


@pytest.mark.parametrize("count", [2, 4])
def test_the_output_is_that_of_one_process(
    count: int, processes: Run, plan: Plan, plan_file: Path, alone: Path, tmp_path: Path
) -> None:
    for process in reversed(range(count)):
        processes.start(plan_file, tmp_path / "out", process, count)
    ended = processes.ended()
    assert [(code, err) for code, _, err in ended] == [(0, "")] * count
    *parts, whole = [json.loads(out) for _, out, _ in ended]
    assert (whole["read_bytes"], whole["write_bytes"]) == (plan.totals.read_bytes, plan.totals.write_bytes)
    even = plan.totals.write_bytes / count
    assert all(part["write_bytes"] == pytest.approx(even, rel=0.05) for part in parts)
    written = sorted(p.name for p in (tmp_path / "out" / "0" / "items").glob("ocdbt.process_*"))
    assert written == [f"ocdbt.process_{k}" for k in range(count)]
    assert_as_alone(tmp_path / "out", alone)


@pytest.mark.parametrize(("killed", "more"), [(0, 1), (1, 3)])
def test_a_killed_process_fails_the_run_and_a_rerun_of_any_number_goes_on(
    killed: int, more: int, processes: Run, plan: Plan, plan_file: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for process in range(2):
        processes.start(plan_file, output, process, 2, patch=SLOW)
    wait_for(lambda: done_units(output, 0) > 3 and done_units(output, 1) > 3)
    os.kill(processes.started[killed].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    code, out, err = processes.ended()[1 - killed]
    assert time.monotonic() - killed_at < 45
    assert (code, out) == (1, "")
    assert err.startswith(f"error[process-failed]: process {killed} of 2 has failed: it was killed")
    assert not (output / "0").exists()

    again = Run()
    wait_for(lambda: not held(output))
    for process in range(more):
        again.start(plan_file, output, process, more)
    ended = again.ended()
    assert [(code, err) for code, _, err in ended] == [(0, "")] * more
    assert json.loads(ended[0][1])["read_bytes"] < plan.totals.read_bytes
    assert_as_alone(output, alone)


def held(output: Path) -> bool:
    """Whether a process of the run still lives."""
    try:
        for path in (output / LOCK, *(output / UNFINISHED).glob("process.*")):
            os.close(flock(path, output))
    except InputError:
        return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_machine_that_dies_is_missed(processes: Run, plan_file: Path, tmp_path: Path) -> None:
    """A process and what speaks for it, both at once: nobody is left to say anything."""
    output = tmp_path / "out"
    for process in range(2):
        processes.start(plan_file, output, process, 2, patch=SLOW.replace("0.02", "0.5") + "peers.HEARTBEAT = 3")
    wait_for(lambda: done_units(output, 1) > 0)
    companion = processes.companion(1)
    os.kill(companion, signal.SIGKILL)  # within one look at its pipe
    os.kill(processes.started[1].pid, signal.SIGKILL)
    code, _, err = processes.ended()[0]
    assert code == 1
    assert err.startswith("error[connection-lost]: the connection to the other processes is lost")
    assert "stopped sending heartbeats" in err
    assert not (output / "0").exists()


def test_a_failure_anywhere_is_said_everywhere(processes: Run, plan_file: Path, tmp_path: Path) -> None:
    broken = "def full(*_): raise OSError(28, 'No space left on device')\nworker.Worker._make = full"
    for process in range(3):
        processes.start(plan_file, tmp_path / "out", process, 3, patch=broken if process == 2 else SLOW)
    first, second, third = processes.ended()
    assert [code for code, _, _ in (first, second, third)] == [1, 1, 1]
    assert third[2].startswith("error[disk-full]")
    for _, _, err in (first, second):
        assert err.startswith("error[process-failed]: process 2 of 3 has failed: disk-full: no room")
    assert not (tmp_path / "out" / "0").exists()


def test_a_process_with_another_plan_is_refused(processes: Run, plan_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(dumps(compile_case(CASE, memory=4096)), "utf-8")
    processes.start(plan_file, tmp_path / "out", 0, 2)
    processes.start(other, tmp_path / "out", 1, 2)
    found = processes.ended()
    # Each finds it out, unless it hears first that the other has.
    assert all(code == 1 and "plans-differ" in err for code, _, err in found)
    assert any(err.startswith("error[plans-differ]: process 1 and process 0 have diff") for _, _, err in found)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_shared_is_refused(processes: Run, plan_file: Path, tmp_path: Path) -> None:
    for process in range(2):
        processes.start(plan_file, tmp_path / f"out{process}", process, 2, patch="peers.SHOWN = 0.2")
    (_, _, first), (_, _, second) = processes.ended()
    assert first.startswith("error[process-failed]: process 1 of 2 has failed: output-not-shared")
    assert second.startswith("error[output-not-shared]: process 1 does not see")
    assert not (tmp_path / "out0" / "0").exists()


def test_a_port_in_use_is_said(processes: Run, plan_file: Path, tmp_path: Path) -> None:
    with socket.create_server(("", processes.port)):
        processes.start(plan_file, tmp_path / "out", 0, 2)
        ((code, _, err),) = processes.ended()
    assert code == 1
    assert err.startswith("error[port-in-use]: the coordinator's port is used by another program")
    assert str(processes.port) in err


def test_processes_that_do_not_come_are_missed(processes: Run, plan_file: Path, tmp_path: Path) -> None:
    processes.start(plan_file, tmp_path / "out", 0, 2, "--wait", "1")
    ((code, _, err),) = processes.ended()
    assert code == 1
    assert err.startswith("error[processes-missing]: the processes of the run did not meet")
    assert not (tmp_path / "out").exists()


def test_a_process_that_outlives_its_run_keeps_the_next_one_out(plan: Plan, tmp_path: Path) -> None:
    digest = json.loads(dumps(plan))["digest"]
    (tmp_path / UNFINISHED).mkdir()
    alive = flock(tmp_path / UNFINISHED / "process.3", tmp_path)
    with pytest.raises(InputError, match="output-busy"):
        open_unfinished(tmp_path, tmp_path / "0", digest)
    os.close(alive)
    open_unfinished(tmp_path, tmp_path / "0", digest).release()
