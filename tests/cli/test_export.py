"""`ckptc export`, `diff`, `compile --export`, and `run` of an export's plan."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from tests.cli.conftest import Command

from ckptc.plan.model import Exactness
from ckptc.storage.checkpoint import orbax_reader
from reference import DATA

GOLDEN = DATA / "golden/qwen3_moe"
SAVED, ORIGINAL, MODEL = str(GOLDEN / "orbax/scan.dev16"), str(GOLDEN / "hf"), "qwen3-30b-a3b"


def test_an_export_is_the_original(ckptc: Command) -> None:
    done = ckptc("export", "--model", MODEL, "--source", SAVED, "--output", "out", "--config-from", ORIGINAL)
    assert done.code == 0, done.err
    assert "every tensor that was not trained since it was converted comes back bit for bit" in done.out
    assert "66 tensors, 176 kB written to out" in done.out
    same = ckptc("diff", "out", ORIGINAL)
    assert (same.code, same.out) == (0, "66 of 66 arrays that both have are equal bit for bit, 176 kB compared\n")


def test_the_report_as_json(ckptc: Command) -> None:
    done = ckptc("export", "--model", MODEL, "--source", SAVED, "--output", "out", "--config-from", ORIGINAL, "--json")
    record = json.loads(done.out)
    assert (record["tensors"], record["exact"], record["warnings"]) == (66, 66, [])


def test_a_plan_is_compiled_and_run_apart(ckptc: Command) -> None:
    """The same bytes each time; `run` finds the checkpoint where it was compiled from."""
    options = ("--export", "--model", MODEL, "--source", SAVED, "--config-from", ORIGINAL, "--max-shard-size", "50KB")
    first = ckptc("compile", *options, "-o", "plan.json")
    assert first.code == 0, first.err
    dumped = ckptc("compile", *options, "--dump-plan").out
    assert Path("plan.json").read_text("utf-8") == dumped
    assert ckptc("run", "plan.json", "--output", "out").code == 0
    assert (Path("out") / "model.safetensors.index.json").exists()
    assert ckptc("diff", "out", ORIGINAL).code == 0
    again = ckptc("run", "plan.json", "--output", "out")
    assert again.code == 1 and "error[output-exists]" in again.err
    assert ckptc("run", "plan.json", "--output", "out", "--force").code == 0


def test_only_what_reads_chunks_lists_them(ckptc: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(items: Path) -> None:
        raise RuntimeError("listed")

    import_module("ckptc.run.export")  # or it would be loaded meanwhile, and keep what is put in place here
    monkeypatch.setattr(orbax_reader, "list_plain", listed)
    options = ("--model", MODEL, "--source", SAVED, "--config-from", ORIGINAL)
    export = ("export", *options, "--output", "out")
    assert ckptc("compile", "--export", *options).code == 0
    assert ckptc(*export, "--dump-plan").code == 0
    executed = ckptc(*export)
    assert executed.code == 2 and "listed" in executed.err


def test_a_conversion_is_not_taken_for_an_export(ckptc: Command) -> None:
    """`compile` without --export reads safetensors, with it Orbax."""
    assert ckptc("compile", "--model", MODEL, "--source", ORIGINAL).code == 0
    wrong = ckptc("compile", "--export", "--model", MODEL, "--source", ORIGINAL)
    assert wrong.code == 1 and "error[no-checkpoint]" in wrong.err


def test_a_contradicting_option_is_an_error(ckptc: Command) -> None:
    wrong = ckptc(
        "export", "--model", MODEL, "--source", SAVED, "--output", "out", "--config-from", ORIGINAL, "--no-scan"
    )
    assert wrong.code == 1 and "error[layout-mismatch]" in wrong.err and not Path("out").exists()


def test_without_the_original_a_tiny_model_does_not_fit(ckptc: Command) -> None:
    wrong = ckptc("export", "--model", MODEL, "--source", SAVED, "--output", "out")
    assert wrong.code == 1 and "error[array-mismatch]" in wrong.err and "--config-from" in wrong.err


def test_companions_are_copied(ckptc: Command) -> None:
    config = Path("original")
    config.mkdir()
    (config / "config.json").write_bytes((GOLDEN / "hf" / "config.json").read_bytes())
    (config / "tokenizer.json").write_text("{}", "utf-8")
    (config / "pytorch_model.bin").write_bytes(b"weights")
    options = ("--model", MODEL, "--source", SAVED, "--config-from", "original", "--output", "out", "-o", "plan.json")
    assert ckptc("export", *options).code == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    (config / "tokenizer.json").write_text("{} ", "utf-8")
    changed = ckptc("run", "plan.json", "--output", "other")
    assert changed.code == 1 and "error[source-changed]" in changed.err


def test_differences_are_told_and_counted(ckptc: Command) -> None:
    ckptc(
        "export",
        "--model",
        MODEL,
        "--source",
        SAVED,
        "--output",
        "out",
        "--config-from",
        ORIGINAL,
        "--dtype",
        "float32",
    )
    found = ckptc("diff", "out", ORIGINAL)
    assert found.code == 1 and "float32[48], bfloat16[48]: the same numbers" in found.out
    record = json.loads(ckptc("diff", "out", ORIGINAL, "--json").out)
    assert (record["arrays"], record["equal"], len(record["differences"])) == (66, 0, 66)
    other = ckptc("diff", SAVED, ORIGINAL, "--json")
    assert other.code == 1 and {d["kind"] for d in json.loads(other.out)["differences"]} == {"missing", "extra"}


def saved(directory: Path, step: int, weight: float) -> None:
    """A training state, as Orbax saves it."""
    tree = {"params": {"key": np.full(4, weight)}, "opt_state": {"mu": np.full(4, weight)}, "step": step}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory.resolve(), ocp.args.PyTreeSave(tree))


def test_parameters_are_compared_and_the_rest_on_request(ckptc: Command) -> None:
    saved(Path("a/0/items"), 0, 1.0)
    saved(Path("b/0/items"), 5, 1.0)
    same = ckptc("diff", "a", "b")
    assert (same.code, same.out) == (0, "1 of 1 arrays that both have are equal bit for bit, 32 B compared\n")
    everything = json.loads(ckptc("diff", "a", "b", "--all", "--json").out)
    assert everything["arrays"] == 3 and [d["name"] for d in everything["differences"]] == ["step"]


def test_of_several_steps_it_is_said_which_is_read(ckptc: Command) -> None:
    for step in (1, 2):
        saved(Path(f"run/checkpoints/{step}/items"), step, float(step))
    found = ckptc("diff", "run", "run/checkpoints/2")
    assert (found.code, found.err) == (
        0,
        "note: run: reads step 2, the last of 2 steps\n"
        "note: run: the checkpoint has no checksums to compare\n"
        "note: run/checkpoints/2: the checkpoint has no checksums to compare\n",
    )
    assert ckptc("diff", "run", "run/checkpoints/1/items").code == 1
    for step in (7, 11):
        shutil.copytree(Path(SAVED, "0"), f"trained/checkpoints/step_{step:08}")
    done = ckptc("export", "--model", MODEL, "--source", "trained", "--output", "out", "--config-from", ORIGINAL)
    assert done.code == 0 and "note: trained: reads step step_00000011, the last of 2 steps" in done.err


def test_a_step_of_several_is_verified_by_name(ckptc: Command, mapping: str, source: str) -> None:
    convert = ("convert", "--mapping", mapping, "--model", "tiny", "--source", source)
    assert ckptc(*convert, "--output", "out").code == 0
    for given in ("out", "out/0", "out/0/items"):
        assert ckptc("verify", given).code == 0
    shutil.copytree("out/0", "out/step_3")
    said = ckptc("verify", "out")
    assert (said.code, said.err) == (0, "note: out: reads step step_3, the last of 2 steps\n")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Exactness(), "exact"),
        (Exactness(None, 0.0078, 0.0), "within 0.0078 relative"),
        (Exactness(3.06e-5, 0.0039, 6e-8), "exact above 3.06e-05, else within 0.0039 relative + 6e-08 absolute"),
    ],
)
def test_exactness_in_words(given: Exactness, text: str) -> None:
    from ckptc.cli.export import exactness

    assert exactness(given) == text


# Each unit takes a moment, so that both workers have some; one of them is killed if the test says so.
WORKERS = """
import os, signal, sys, time
from ckptc.cli.main import main
from ckptc.run.worker import Worker
make, parent = Worker._make, os.getpid()
def slowly(self, key, unit, loaded):
    assert os.getpid() != parent, "made by workers"
    time.sleep(0.02)
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if os.path.exists("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    return make(self, key, unit, loaded)
Worker._make = slowly
main()
"""


def by_workers() -> subprocess.CompletedProcess[str]:
    argv = ["export", "--model", MODEL, "--source", SAVED, "--output", "out", "--config-from", ORIGINAL, "--jobs", "2"]
    command = [sys.executable, "-c", WORKERS, *argv, "--quiet"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_workers_make_the_same(ckptc: Command) -> None:
    done = by_workers()
    assert done.returncode == 0, done.stderr
    assert len(set(Path("pids").read_text("utf-8").split())) == 2
    assert ckptc("diff", "out", ORIGINAL).code == 0


def test_a_killed_worker_ends_the_export_and_the_same_command_goes_on(ckptc: Command) -> None:
    Path("kill").touch()
    done = by_workers()
    assert done.returncode == 1 and "error[worker-died]" in done.stderr, done.stderr
    assert "goes on from there" in done.stderr and not Path("out").exists(), "nothing was done yet"
    Path("kill").unlink()
    assert by_workers().returncode == 0


TRAINED = DATA / "trained"


def test_layers_go_where_maxtext_has_them_and_come_back(ckptc: Command) -> None:
    """The options of a conversion, what its summary says of them, and an export that is told nothing."""
    original = str(TRAINED / "hf")
    given = ["--model", "llama2-7b", "--source", original]
    pipeline = ["--param-scan-axis", "0", "--pipeline", "stages=2,layers=4"]
    compiled = ckptc("compile", *given, *pipeline, "-o", "plan.json")
    assert "scanned, param_scan_axis 0, pipeline of stages=2,layers=4, bfloat16" in compiled.out
    assert ckptc("run", "plan.json", "--output", "out", "--quiet").code == 0
    assert ckptc("verify", "plan.json", "--output", "out").code == 0
    back = ckptc("export", "--model", "llama2-7b", "--source", "out", "--output", "hf", "--config-from", original)
    assert "scanned, param_scan_axis 0, pipeline of stages=2,layers=4, to bfloat16" in back.out
    assert ckptc("diff", original, "hf").code == 0


@pytest.mark.parametrize("option", ["--verify", "--check-source=auto", "--mapping=nowhere.yaml"])
def test_options_of_conversions_are_refused_with_an_exports_plan(option: str, ckptc: Command) -> None:
    options = ("--export", "--model", MODEL, "--source", SAVED, "--config-from", ORIGINAL)
    assert ckptc("compile", *options, "-o", "plan.json").code == 0
    done = ckptc("run", "plan.json", "--output", "out", option)
    assert done.code == 1 and "error[unused-option]" in done.err and not Path("out").exists()


@pytest.mark.parametrize("option", ["--shards=4", "--shards=16", "--compression=zstd", "--compression=none"])
def test_options_of_conversions_are_refused_when_an_export_is_compiled(option: str, ckptc: Command) -> None:
    done = ckptc("compile", "--export", "--model", MODEL, "--source", SAVED, "--config-from", ORIGINAL, option)
    assert done.code == 1 and "error[unused-option]" in done.err


@pytest.mark.parametrize("option", ["--config-from=.", "--max-shard-size=1GB", "--max-shard-size=5GB"])
def test_options_of_exports_are_refused_when_a_conversion_is_compiled(option: str, ckptc: Command) -> None:
    done = ckptc("compile", "--model", MODEL, option)
    assert done.code == 1 and "error[unused-option]" in done.err


def test_an_option_of_exports_is_refused_with_a_conversions_plan(ckptc: Command, mapping: str, source: str) -> None:
    compiling = ("compile", "--mapping", mapping, "--model", "tiny", "--source", source)
    assert ckptc(*compiling, "-o", "plan.json").code == 0
    done = ckptc("run", "plan.json", "--output", "out", "--config-from", ".")
    assert done.code == 1 and "error[unused-option]" in done.err and not Path("out").exists()


def test_a_restart_is_taken_with_an_exports_plan(ckptc: Command) -> None:
    options = ("--export", "--model", MODEL, "--source", SAVED, "--config-from", ORIGINAL)
    assert ckptc("compile", *options, "-o", "plan.json").code == 0
    assert ckptc("run", "plan.json", "--output", "out", "--config-from", ORIGINAL, "--restart", "--quiet").code == 0
    assert ckptc("diff", "out", ORIGINAL).code == 0


def test_a_mapping_to_verify_with_is_refused_without_verify(ckptc: Command, mapping: str, source: str) -> None:
    assert ckptc("compile", "--mapping", mapping, "--model", "tiny", "--source", source, "-o", "plan.json").code == 0
    done = ckptc("run", "plan.json", "--output", "out", "--mapping", mapping)
    assert done.code == 1 and "error[unused-option]" in done.err and not Path("out").exists()
    assert ckptc("run", "plan.json", "--output", "out", "--mapping", mapping, "--verify").code == 0


@pytest.mark.parametrize("axis", ["0", "1"])
def test_an_axis_of_stacked_layers_is_refused_where_none_are_stacked(
    axis: str, ckptc: Command, mapping: str, source: str
) -> None:
    compiling = ("compile", "--mapping", mapping, "--model", "tiny", "--source", source, "--param-scan-axis", axis)
    assert ckptc(*compiling).code == 0
    done = ckptc(*compiling, "--no-scan")
    assert done.code == 1 and "error[unused-option]" in done.err


def test_what_nobody_has_given_is_the_default(ckptc: Command, mapping: str, source: str) -> None:
    compiling = ("compile", "--mapping", mapping, "--model", "tiny", "--source", source, "--dump-plan")
    assert ckptc(*compiling).out == ckptc(*compiling, "--shards", "16", "--compression", "none").out
