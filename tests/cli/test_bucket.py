"""Conversions of what is in a bucket, by the real program, from an emulator of Google Cloud Storage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorstore as ts

from ckptc.cli.main import run
from emulated import BUCKET, clear, emulator, objects, put
from golden import golden_cases

CASE = next(c for c in golden_cases() if c.hf.parent.name == "qwen3_moe")
MODEL = ["--model", CASE.model, "--set", f"padded_vocab={CASE.vocab}"]
URL = f"gs://{BUCKET}/models/tiny"


pytestmark = pytest.mark.skipif(
    "byte_range" not in (ts.KvStore.read.__doc__ or ""), reason="this TensorStore reads objects whole"
)


@pytest.fixture(autouse=True, scope="module")
def gcs() -> Iterator[None]:
    with emulator():
        yield


@pytest.fixture(autouse=True)
def source() -> Iterator[None]:
    for path in CASE.hf.iterdir():
        put(f"{URL}/{path.name}", path.read_bytes())
    put(f"gs://{BUCKET}/models/tiny2/model.safetensors", b"another's")
    put(f"{URL}/step/model.safetensors", b"further below")
    yield
    clear()


def ckptc(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "ckptc", *arguments]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is converted from the directory."""
    output = tmp_path_factory.mktemp("local") / "out"
    assert run(["convert", *MODEL, "--source", str(CASE.hf), "--output", str(output), "--quiet"]) == 0
    return output


def same(first: Path, second: Path) -> bool:
    return run(["diff", str(first), str(second)]) == 0


def compiled(path: Path) -> Path:
    found = ckptc("compile", *MODEL, "--source", URL, "-o", str(path))
    assert found.returncode == 0, found.stderr
    return path


def shard() -> str:
    return next(p.name for p in sorted(CASE.hf.iterdir()) if p.suffix == ".safetensors")


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_conversion_from_a_bucket_is_that_from_the_directory(tmp_path: Path, local: Path, jobs: str) -> None:
    made = ckptc("convert", *MODEL, "--source", URL, "--output", str(tmp_path / "out"), "--jobs", jobs, "--json")
    assert made.returncode == 0, made.stderr
    assert same(tmp_path / "out", local)
    kept = tmp_path / "out" / "0" / "items" / "hf" / "config.json"
    assert kept.read_bytes() == (CASE.hf / "config.json").read_bytes()


def test_workers_are_forked_for_a_source_in_a_bucket(tmp_path: Path) -> None:
    made = ckptc("convert", *MODEL, "--source", URL, "--output", str(tmp_path / "out"), "--jobs", "2", "--quiet")
    assert made.returncode == 0 and "1 job instead of 2" not in made.stderr


def test_a_plan_records_generations_and_where_the_files_are(tmp_path: Path, local: Path) -> None:
    plan = compiled(tmp_path / "plan.json")
    (named,) = json.loads(plan.read_text())["sources"]
    assert named["name"] == URL
    assert "generation:" in plan.read_text()
    made = ckptc("run", str(plan), "--output", str(tmp_path / "out"), "--verify")
    assert made.returncode == 0, made.stderr
    assert "each bit is what the source gives" in made.stdout
    assert same(tmp_path / "out", local)
    checked = ckptc("verify", str(plan), "--output", str(local), "--source", URL)
    assert checked.returncode == 0, checked.stderr


def test_another_generation_is_another_source_even_with_the_same_bytes(tmp_path: Path) -> None:
    plan = compiled(tmp_path / "plan.json")
    put(f"{URL}/{shard()}", (CASE.hf / shard()).read_bytes())
    made = ckptc("run", str(plan), "--output", str(tmp_path / "out"))
    assert made.returncode == 1 and "error[source-changed]" in made.stderr
    assert not (tmp_path / "out" / "0").exists()


def test_a_plan_of_a_bucket_is_not_run_on_files_that_have_no_generation(tmp_path: Path) -> None:
    made = ckptc(
        "run", str(compiled(tmp_path / "plan.json")), "--source", str(CASE.hf), "--output", str(tmp_path / "out")
    )
    assert made.returncode == 1 and "error[source-changed]" in made.stderr and "which has none" in made.stderr


def test_an_object_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    plan = compiled(tmp_path / "plan.json")
    script = f"""\
import sys
from ckptc.run import runner
from ckptc.cli.main import main
plain = runner.check_source
def check_source(*arguments):
    plain(*arguments)
    import subprocess
    put = "import sys; from pathlib import Path; from emulated import put; put(sys.argv[1], Path(sys.argv[2]).read_bytes())"
    subprocess.run([sys.executable, "-c", put, {f"{URL}/{shard()}"!r}, {str(CASE.hf / shard())!r}], check=True)
runner.check_source = check_source
sys.exit(main(["run", {str(plan)!r}, "--output", {str(tmp_path / "out")!r}, "--jobs", "2"]))
"""
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    made = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert made.returncode == 1 and "error[source-changed]" in made.stderr, made.stderr
    assert not (tmp_path / "out" / "0").exists()


def test_a_killed_run_goes_on(tmp_path: Path, local: Path) -> None:
    plan = compiled(tmp_path / "plan.json")
    script = f"""\
import os, signal, sys
from ckptc.run import runner
from ckptc.cli.main import main
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
runner.finish = die
main(["run", {str(plan)!r}, "--output", {str(tmp_path / "out")!r}, "--jobs", "2"])
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    again = ckptc("run", str(plan), "--output", str(tmp_path / "out"), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["read_bytes"] == 0
    assert same(tmp_path / "out", local)


def test_from_a_bucket_into_a_bucket(tmp_path: Path, local: Path) -> None:
    output = f"gs://{BUCKET}/outputs/one"
    made = ckptc("convert", *MODEL, "--source", f"{URL}/", "--output", output, "--jobs", "2")
    assert made.returncode == 0, made.stderr
    for name, content in objects(output).items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert same(tmp_path / "copy", local)


def test_a_shard_that_was_cut_off_is_refused_by_its_size(tmp_path: Path) -> None:
    whole = (CASE.hf / shard()).read_bytes()
    for cut in (4, 40, len(whole) - 1):
        put(f"{URL}/{shard()}", whole[:cut])
        found = ckptc("compile", *MODEL, "--source", URL)
        assert found.returncode == 1 and "internal" not in found.stderr
        assert f"{cut} bytes" in found.stderr, found.stderr
    put(f"{URL}/{shard()}", whole + b"more")
    found = ckptc("compile", *MODEL, "--source", URL)
    assert found.returncode == 1 and "error[header-trailing-bytes]" in found.stderr, found.stderr


def test_a_path_with_nothing_is_said() -> None:
    found = ckptc("compile", *MODEL, "--source", f"gs://{BUCKET}/models/none")
    assert found.returncode == 1 and "error[bucket-missing]" in found.stderr
