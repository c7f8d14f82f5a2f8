"""A few hundred broken inputs with a fixed seed; and that the fuzzer sees what it is there to see."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
COUNT = 150


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        import fuzz

        return fuzz
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(autouse=True)
def _where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer changes both."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", ""))
    monkeypatch.chdir(Path.cwd())


def test_broken_inputs_end_with_a_diagnostic(fuzz: ModuleType) -> None:
    # In a process of its own: one that has run threads of TensorStore cannot be forked and go on.
    program = (
        f"import fuzz, json; from dataclasses import asdict; found = fuzz.fuzz(list(fuzz.KINDS), {COUNT}, 0, 600, 2)"
    )
    program += "; print(json.dumps([asdict(o) for o in found]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=TOOLS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = [fuzz.Outcome(**record) for record in json.loads(done.stdout)]
    assert [(o.kind, o.number, o.wrong, o.lies) for o in outcomes if o.wrong] == []
    assert Counter(o.kind for o in outcomes) == dict.fromkeys(fuzz.KINDS, COUNT // 3)
    refused = [o for o in outcomes if o.code == 1]
    assert len(refused) > COUNT // 2, "most inputs are broken"
    codes = {code for o in refused for code in o.said}
    assert len(codes) > 20, "they are broken in many ways"
    assert {"invalid-plan", "missing-tensor", "header-size-mismatch", "invalid-expression"} <= codes


def test_the_number_and_the_seed_decide_an_input(fuzz: ModuleType, tmp_path: Path) -> None:
    for kind in ("headers", "mappings"):
        one, again, other = (fuzz.make(kind, seed, 3, tmp_path) for seed in (5, 5, 6))
        assert (one.argv, one.files, one.lies) == (again.argv, again.files, again.lies)
        assert one.files != other.files


FAULTY = {
    "code": ("return 2", "exit code 2"),
    "escape": ("raise KeyError('x')", "KeyError escaped"),
    "internal": ("print('internal error: x', file=sys.stderr); return 1", "internal error"),
    "traceback": ("print('Traceback (most recent call last)'); return 0", "traceback"),
    "silent": ("return 1", "without a diagnostic"),
    "contrary": ("print('error[x-y]: z'); return 0", "with exit code 0"),
    "writes": ("open('../outside/new', 'w').close(); return 0", "outside of the output"),
    "removes": ("os.remove('../outside/precious.txt'); return 0", "outside of the output"),
    "changes": ("os.system('echo >> ../outside/precious.txt'); return 0", "touched outside"),
    "slow": ("busy(); return 0", "took"),
    "fine": ("open('out', 'w').close(); print('error[x-y]: z', file=sys.stderr); return 1", None),
}


@pytest.mark.parametrize("name", FAULTY)
def test_each_broken_promise_is_seen(
    name: str, fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, expected = FAULTY[name]
    names: dict[str, object] = {"sys": sys, "os": os, "busy": busy}
    exec(f"def run(argv):\n    {body}", names)
    monkeypatch.setattr("ckptc.cli.main.run", names["run"])
    monkeypatch.setattr(fuzz, "LIMIT", 0.05 if name == "slow" else 60.0)
    outcome = fuzz.attempt("mappings", 0, 1, tmp_path, tmp_path / "box")
    if expected is None:
        assert outcome.wrong is None
    else:
        assert outcome.wrong is not None and expected in outcome.wrong


def busy() -> None:
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.parametrize("end", ["hang", "die", "eat"])
def test_an_input_that_takes_its_process_along_is_named_and_the_others_go_on(
    end: str, fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def run(argv: list[str]) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            if end == "hang":
                signal.pause()
            elif end == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            bytearray(1 << 40)
        print("error[x-y]: z", file=sys.stderr)
        return 1

    monkeypatch.setattr("ckptc.cli.main.run", run)
    monkeypatch.setattr(fuzz, "HANGS", 2.0)
    outcomes = list(fuzz.fuzz(["mappings"], 4, seed=0, seconds=600, jobs=1))
    assert [o.number for o in outcomes] == [0, 1, 2, 3]
    seen = {"hang": "hangs", "die": "status 9", "eat": "MemoryError"}[end]
    # A process that is replaced begins to count again, and meets its second input.
    assert outcomes[0].wrong is None and seen in outcomes[1].wrong


def test_values_that_no_one_expects_are_of_every_type(fuzz: ModuleType) -> None:
    import fuzz_values

    rng = random.Random(0)
    kinds = {type(fuzz_values.hostile(rng)) for _ in range(1000)}
    assert {int, float, str, bool, list, dict, type(None)} <= kinds
    body = {"a": [1, {"b": "c"}], "d": 2.5}
    assert any(fuzz_values.shake(rng, body) for _ in range(20)) and body != {"a": [1, {"b": "c"}], "d": 2.5}
