"""A few faults of each kind, for real; and that a result that is not equal is seen."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "faults.py"


def load_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


faults = load_program()

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("faults")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield faults.prepare(folder, 0.02, "1MiB")


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_run_that_was_disturbed_goes_on_to_the_same_arrays(name: str, bench: Any) -> None:
    results = list(faults.FAULTS[name](bench, random.Random(1), 3 if name == "kills" else 1))
    assert [(r.fault, r.wrong) for r in results if r.wrong] == []
    assert sum(r.disturbed for r in results) >= (3 if name == "kills" else 1)


def test_a_result_with_other_values_is_seen(bench: Any) -> None:
    output = bench.folder / "other"
    assert bench.run(output)[0] == 0
    name = min(bench.expected)
    dtype, shape, data = bench.expected[name]
    bench.expected[name] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])
    try:
        assert faults.judged(bench, output, faults.Result("none")).wrong == f"1 arrays differ, such as {name}"
    finally:
        bench.expected[name] = (dtype, shape, data)
    assert faults.judged(bench, output, faults.Result("none")).wrong == ""
    assert not output.exists()


def test_something_that_only_looks_finished_is_seen(bench: Any) -> None:
    output = bench.folder / "empty"
    (output / "0" / "items").mkdir(parents=True)
    assert "cannot be restored" in faults.judged(bench, output, faults.Result("none")).wrong


def test_the_exit_code_says_whether_anything_is_wrong(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "prepare", lambda *_: bench)
    for wrong, code in (("", 0), ("2 arrays differ", 1)):
        made = [faults.Result("a fault", 1, "disk-full", wrong)]
        monkeypatch.setattr(faults, "FAULTS", {"room": lambda *_, made=made: iter(made)})
        assert faults.main(["room"]) == code
        assert (wrong or "goes on, and is equal") in capsys.readouterr().out


def test_a_shard_is_cut_and_comes_back(bench: Any) -> None:
    shard = min(bench.source.glob("*.safetensors"))
    whole, times = shard.read_bytes(), shard.stat().st_mtime_ns
    with faults.cut(shard):
        assert shard.stat().st_size == len(whole) // 2
    assert (shard.read_bytes(), shard.stat().st_mtime_ns) == (whole, times)
    with faults.moved(bench.source):
        assert not bench.source.exists()
    assert subprocess.run(["ls", str(bench.source)], capture_output=True).returncode == 0
