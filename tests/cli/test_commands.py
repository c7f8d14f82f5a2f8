"""The commands: what they print where, what they write, and their exit codes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ckptc.cli import commands
from ckptc.plan.json import loads
from ckptc.spec.mapping import shipped

from .conftest import Command

PLAN = ("compile", "--model", "tiny", "--mapping", "mapping.yaml", "--source", "checkpoint")
ABSTRACT = PLAN[:-2]
CONVERT = ("convert", *PLAN[1:])


def arrays(text: str) -> dict[str, list[int]]:
    body = json.loads(text)
    return {name: body["kinds"][kind]["shape"] for name, kind, *_ in body["outputs"]}


# -- models --------------------------------------------------------------------------------------------------


def test_models_lists_every_shipped_model(ckptc: Command) -> None:
    done = ckptc("models")
    heading, *rows = done.out.splitlines()
    assert (done.code, done.err, heading.split()) == (0, "", ["MODEL", "FAMILY", "REPOSITORY", "LAYOUTS"])
    known = [(model, mapping) for mapping in shipped() for model in mapping.models.values()]
    assert [row.split()[:2] for row in rows] == [[model.name, mapping.family] for model, mapping in known]
    assert all(model.repo in row for (model, _), row in zip(known, rows, strict=True))


def test_models_json_has_the_same_rows_with_their_fields(ckptc: Command) -> None:
    rows = json.loads(ckptc("models", "--json").out)
    assert len(rows) > 30
    for row in rows:
        assert list(row) == ["name", "family", "repo", "layouts", "multimodal"]
        assert row["layouts"] and set(row["layouts"]) <= {"scanned", "unscanned"}
        assert type(row["multimodal"]) is bool
    assert {"name": "llama3.1-8b", "family": "llama3.1", "repo": "meta-llama/Llama-3.1-8B"}.items() <= next(
        r for r in rows if r["name"] == "llama3.1-8b"
    ).items()


def test_models_of_another_mapping(ckptc: Command, mapping: str) -> None:
    rows = json.loads(ckptc("models", "--mapping", mapping, "--json").out)
    assert [row["name"] for row in rows] == ["tiny", "tiny-tied"]


def test_one_model_is_shown_whole(ckptc: Command, mapping: str) -> None:
    done = ckptc("models", "tiny", "--mapping", mapping)
    assert (done.code, done.err) == (0, "")
    for word in ("tiny: Two matrices", "example/tiny", "scanned, unscanned", "padded_vocab=8", "80 parameters"):
        assert word in done.out
    assert "embed mlp -> mlp embed; stack 2 layers at axis 1" in done.out


def test_one_model_as_json(ckptc: Command, mapping: str) -> None:
    record = json.loads(ckptc("models", "tiny", "--mapping", mapping, "--json").out)
    wanted = [
        "name",
        "family",
        "repo",
        "layouts",
        "multimodal",
        "title",
        "decodes",
        "dims",
        "tensors",
        "arrays",
        "parameters",
    ]
    assert list(record) == [*wanted, "write_bytes", "rules", "ignored"]
    assert (record["parameters"], record["write_bytes"]) == (80, 160)
    assert [r["rule"] for r in record["rules"]] == ["decoder: mlp/wo/kernel", "token_embedder/embedding"]
    assert list(record["rules"][0]) == ["rule", "arrays", "tensors", "shape", "dtype", "ops", "write_bytes"]


@pytest.mark.parametrize("command", [("models",), ("compile", "--model")])
def test_an_unknown_model_suggests_the_nearest(command: tuple[str, ...], ckptc: Command) -> None:
    done = ckptc(*command, "llama3.1-8B")
    assert (done.code, done.out) == (1, "")
    assert "error[unknown-model]: there is no model `llama3.1-8B`" in done.err
    assert "help: did you mean `llama3.1-8b`?" in done.err


# -- compile -------------------------------------------------------------------------------------------------


def test_dump_plan_prints_the_plan_and_nothing_else(ckptc: Command, mapping: str, source: str) -> None:
    done = ckptc(*PLAN, "--dump-plan")
    assert (done.code, done.err) == (0, "")
    body = json.loads(done.out)  # which refuses anything before or after
    assert list(body["totals"]) == ["arrays", "tensors", "parameters", "read_bytes", "write_bytes", "peak_memory_bytes"]
    names = [name for name, *_ in body["outputs"]]
    assert names and names == sorted(names)
    assert all({"rule", "shape", "dtype"} <= kind.keys() for kind in body["kinds"])
    assert loads(done.out).made.model == "tiny"


def test_dump_plan_and_o_give_the_same_bytes_again_and_again(ckptc: Command, mapping: str, source: str) -> None:
    once = ckptc(*PLAN, "--dump-plan", "-o", "plan.json")
    again = ckptc(*PLAN, "--dump-plan")
    assert once.out == again.out == Path("plan.json").read_text("utf-8")


def test_summary(ckptc: Command, mapping: str, source: str) -> None:
    done = ckptc(*PLAN, "-o", "plan.json")
    assert (done.code, done.err) == (0, "")
    assert "tiny (tiny), scanned, bfloat16" in done.out
    assert "reads   160 B of 3 tensors" in done.out
    assert "writes  160 B in 2 arrays, 80 parameters" in done.out
    assert "within a budget of 537 MB" in done.out
    for rule in ("decoder: mlp/wo/kernel", "token_embedder/embedding"):
        assert sum(line.startswith(rule + " ") for line in done.out.splitlines()) == 1, "one line for each rule"
    assert "`ckptc run plan.json --output DIR` executes it" in done.out


def test_a_plan_made_without_a_checkpoint_is_not_said_to_run(ckptc: Command, mapping: str) -> None:
    done = ckptc(*ABSTRACT, "-o", "plan.json")
    assert done.code == 0
    assert "compile with --source" in done.out
    assert "plan written to plan.json" in done.out
    assert "executes it" not in done.out
    assert ckptc("run", "plan.json", "--output", "out").code == 1


def test_compile_json(ckptc: Command, mapping: str, source: str) -> None:
    record = json.loads(ckptc(*PLAN, "--json").out)
    assert list(record) == ["made", "choices", "layout", "totals", "left_out", "decoded", "rules", "proved"]
    assert record["totals"]["write_bytes"] == sum(r["write_bytes"] for r in record["rules"]) == 160


def test_scan_is_the_default_and_no_scan_keeps_layers_apart(ckptc: Command, mapping: str) -> None:
    embedding = {"params/params/token_embedder/embedding": [8, 4]}
    scanned = {"params/params/decoder/layers/mlp/wo/kernel": [6, 2, 4], **embedding}
    apart = {f"params/params/decoder/layers_{n}/mlp/wo/kernel": [6, 4] for n in range(2)}
    assert arrays(ckptc(*ABSTRACT, "--dump-plan").out) == scanned
    assert arrays(ckptc(*ABSTRACT, "--dump-plan", "--scan").out) == scanned
    assert arrays(ckptc(*ABSTRACT, "--dump-plan", "--no-scan").out) == {**apart, **embedding}


def test_dtype_shards_and_memory_reach_the_plan(ckptc: Command, mapping: str) -> None:
    body = json.loads(ckptc(*ABSTRACT, "--dump-plan", "--dtype", "float32", "--shards", "2", "--memory", "1MiB").out)
    assert {kind["dtype"] for kind in body["kinds"]} == {"float32"}
    assert body["choices"]["memory"] == 1 << 20
    assert [kind["shards"] for kind in body["kinds"]] == [[2, 1, 1], [2, 1]]


def test_set_wins_and_may_be_an_expression(ckptc: Command, mapping: str, source: str) -> None:
    path = "params/params/token_embedder/embedding"
    assert arrays(ckptc(*PLAN, "--dump-plan", "--set", "padded_vocab=10").out)[path] == [10, 4]
    assert arrays(ckptc(*PLAN, "--dump-plan", "--set", "padded_vocab=vocab + mlp").out)[path] == [14, 4]
    twice = ("--set", "padded_vocab=10", "--set", "padded_vocab=12")
    assert arrays(ckptc(*PLAN, "--dump-plan", *twice).out)[path] == [12, 4], "the last one counts"


def test_without_a_source_the_models_numbers_count(ckptc: Command, mapping: str) -> None:
    assert arrays(ckptc(*ABSTRACT, "--dump-plan").out)["params/params/token_embedder/embedding"] == [8, 4]


# -- writing plans -------------------------------------------------------------------------------------------


def test_o_replaces_a_plan(ckptc: Command, mapping: str, source: str) -> None:
    assert ckptc(*PLAN, "-o", "plan.json").code == 0
    assert ckptc(*PLAN, "-o", "plan.json", "--set", "padded_vocab=10").code == 0
    assert arrays(Path("plan.json").read_text())["params/params/token_embedder/embedding"] == [10, 4]


@pytest.mark.parametrize("content", [b"", b"hello", b"{}", b'{"format": 1}', b"\xff\xfe"])
def test_o_refuses_to_replace_anything_else_without_force(
    content: bytes, ckptc: Command, mapping: str, source: str
) -> None:
    Path("mine").write_bytes(content)
    done = ckptc(*PLAN, "-o", "mine")
    assert (done.code, done.out) == (1, "")
    assert "error[output-exists]: mine exists and is not a plan" in done.err
    assert Path("mine").read_bytes() == content
    assert ckptc(*PLAN, "-o", "mine", "--force").code == 0
    assert loads(Path("mine").read_bytes()).made.model == "tiny"


def test_o_replaces_no_device_or_directory_whatever_is_said(ckptc: Command, mapping: str, source: str) -> None:
    os.mkfifo("pipe")
    for name, what in (("pipe", "not a regular file"), ("checkpoint", "a directory")):
        done = ckptc(*PLAN, "-o", name, "--force")
        assert (done.code, f"error[output-exists]: {name} is {what}" in done.err) == (1, True)
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_o_replaces_what_a_link_points_at(ckptc: Command, mapping: str, source: str) -> None:
    os.mkdir("plans")
    os.symlink("plans/real.json", "plan.json")
    for _ in range(2):
        assert ckptc(*PLAN, "-o", "plan.json").code == 0
    assert Path("plan.json").is_symlink()
    assert loads(Path("plans/real.json").read_bytes()).made.model == "tiny"
    assert os.listdir("plans") == ["real.json"]


def test_a_plan_appears_whole_or_not_at_all(
    ckptc: Command, mapping: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ckptc(*PLAN, "-o", "plan.json").code == 0
    before = Path("plan.json").read_bytes()

    def fail(*_: object) -> None:
        assert Path("plan.json").read_bytes() == before, "written elsewhere first"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ckptc.plan.on_disk.os.replace", fail)
    done = ckptc(*PLAN, "-o", "plan.json", "--set", "padded_vocab=10")
    assert (done.code, done.out) == (1, "")
    assert "error[unwritable-output]: cannot write plan.json: No space left on device" in done.err
    assert Path("plan.json").read_bytes() == before
    assert [n for n in os.listdir() if "plan" in n] == ["plan.json"], "nothing is left beside it"


def test_a_new_plan_has_the_permissions_of_the_umask(ckptc: Command, mapping: str, source: str) -> None:
    old = os.umask(0o027)
    try:
        assert ckptc(*PLAN, "-o", "plan.json").code == 0
        assert os.umask(0o027) == 0o027, "and the umask is as it was"
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat("plan.json").st_mode) == 0o640


@pytest.mark.parametrize("name", ["absent/plan.json", "mapping.yaml/plan.json", "x" * 300])
def test_a_plan_that_cannot_be_written_is_no_internal_error(
    name: str, ckptc: Command, mapping: str, source: str
) -> None:
    done = ckptc(*PLAN, "-o", name)
    assert (done.code, f"error[unwritable-output]: cannot write {name}: " in done.err) == (1, True)


# -- run and convert -----------------------------------------------------------------------------------------


def test_run_finds_the_source_it_was_compiled_from(ckptc: Command, mapping: str, source: str) -> None:
    assert ckptc(*PLAN, "-o", "plan.json").code == 0
    done = ckptc("run", "plan.json", "--output", "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("tiny: 2 arrays, 160 B written to out/0 in ") and done.out.count("\n") == 1
    assert Path("out/0/items").is_dir()


def test_run_with_a_source_that_has_moved(ckptc: Command, mapping: str, source: str) -> None:
    assert ckptc(*PLAN, "-o", "plan.json").code == 0
    os.rename("checkpoint", "moved")
    assert "error[unknown-source]" in ckptc("run", "plan.json", "--output", "out").err
    assert ckptc("run", "plan.json", "--source", "moved", "--output", "out").code == 0


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_convert_says_one_line_where_there_is_no_terminal(
    quiet: tuple[str, ...], ckptc: Command, mapping: str, source: str
) -> None:
    done = ckptc(*CONVERT, "--output", "out", *quiet)
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    for word in ("160 B written to out/0", "160 B read", " s (", "/s)", "peak memory "):
        assert word in done.out


def test_convert_json(ckptc: Command, mapping: str, source: str) -> None:
    done = ckptc(*CONVERT, "--output", "out", "--json")
    record: dict[str, Any] = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert record.keys() >= {"output", "read_bytes", "write_bytes", "seconds", "peak_resident_bytes"}
    assert record.keys() >= {"model", "arrays", "plan"}
    assert (record["output"], record["read_bytes"], record["write_bytes"]) == ("out/0", 160, 160)
    assert record["plan"] == json.loads(ckptc(*PLAN, "--dump-plan").out)["digest"]


def test_an_existing_output_is_refused_and_kept(ckptc: Command, mapping: str, source: str) -> None:
    assert ckptc(*CONVERT, "--output", "out").code == 0
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")}
    done = ckptc(*CONVERT, "--output", "out")
    assert (done.code, done.out, "error[output-exists]" in done.err) == (1, "", True)
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")} == before


# -- exit codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("complie",), "invalid choice: 'complie'"),
        (("compile",), "the following arguments are required: --model"),
        (("convert", "--model", "tiny", "--source", "x"), "the following arguments are required: --output"),
        (("run", "--output", "out"), "the following arguments are required: PLAN"),
        ((*ABSTRACT, "--set", "vocab"), "argument --set: `vocab` is not DIM=VALUE"),
        ((*ABSTRACT, "--memory", "lots"), "argument --memory: `lots` is not a size such as 256MiB"),
        ((*ABSTRACT, "--memory", "9" * 400), "is not a size such as 256MiB"),
        ((*ABSTRACT, "--memory", "1kB"), "argument --memory: 1kB is too little memory; 1MiB is the least"),
        ((*ABSTRACT, "--shards", "0"), "argument --shards: `0` is not a whole number above 0"),
        ((*ABSTRACT, "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        ((*ABSTRACT, "--dump-plan", "--json"), "argument --json: not allowed with argument --dump-plan"),
    ],
)
def test_a_wrong_command_line_exits_2_and_says_why(argv: tuple[str, ...], said: str, ckptc: Command) -> None:
    done = ckptc(*argv)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.startswith("usage: ckptc")


@pytest.mark.parametrize(
    "argv",
    [
        ("models", "no-such-model"),
        ("compile", "--model", "tiny", "--mapping", "absent.yaml"),
        ("compile", "--model", "tiny", "--mapping", "mapping.yaml", "--source", "absent"),
        (*PLAN, "--set", "no_such_dim=3"),
        ("run", "absent.json", "--output", "out"),
        ("run", "mapping.yaml", "--output", "out"),
    ],
)
def test_an_input_at_fault_exits_1_with_the_diagnostics_on_stderr(
    argv: tuple[str, ...], ckptc: Command, mapping: str, source: str
) -> None:
    done = ckptc(*argv)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error[") and done.err.endswith("1 error\n")


def test_a_bug_exits_2_without_a_traceback(ckptc: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def models(_: object) -> None:
        raise AssertionError("parts cover 3 of 4 elements")

    monkeypatch.setattr(commands, "models", models)
    done = ckptc("models")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("internal error: AssertionError: parts cover 3 of 4 elements\nThis is a bug in ckptc.")
    assert "Traceback" not in done.err
    monkeypatch.setenv("CKPTC_TRACEBACK", "1")
    done = ckptc("models")
    assert (done.code, "Traceback" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(5, "Input/output error", "/mnt/a"), "system-refused", "Input/output error: '/mnt/a'"),
        (MemoryError(), "out-of-memory", "the system has no more memory for this command"),
    ],
)
def test_a_refusal_of_the_system_is_not_called_a_bug(
    error: Exception, code: str, words: str, ckptc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def models(_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "models", models)
    done = ckptc("models")
    assert (done.code, words in done.err, "bug" in done.err) == (1, True, False)
    assert json.loads(ckptc("models", "--format", "json").err)[0]["code"] == code


@pytest.mark.parametrize(
    "argv", [(*CONVERT, "--output", ""), ("verify", ""), ("compile", "--model", "tiny", "--source", "")]
)
def test_an_empty_value_is_not_the_directory_one_is_in(argv: tuple[str, ...], ckptc: Command) -> None:
    done = ckptc(*argv)
    assert (done.code, done.out) == (2, "")
    assert "expected a value, not an empty one" in done.err
    assert os.listdir() == []


def test_a_machine_without_memory_is_an_error_with_advice(
    ckptc: Command, mapping: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("ckptc.run.worker.Worker._make", make)
    done = ckptc(*CONVERT, "--output", "out", "--jobs", "1")
    assert (done.code, done.out) == (1, "")
    assert "error[out-of-memory]" in done.err and "--memory" in done.err
    assert not Path("out/0").exists()


def test_an_interrupt_exits_130(ckptc: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def models(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "models", models)
    done = ckptc("models")
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")


# -- help ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("models",), ("compile",), ("run",), ("convert",)])
def test_help_exits_0_and_describes_every_option(command: tuple[str, ...], ckptc: Command) -> None:
    done = ckptc(*command, "--help")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("  -")]
    for i in options:
        described = "  " in lines[i].strip() or (i + 1 < len(lines) and lines[i + 1].startswith(" " * 20))
        assert described, lines[i]


def test_top_help_lists_the_commands_and_the_exit_codes(ckptc: Command) -> None:
    out = ckptc("--help").out
    for word in (
        "models",
        "compile",
        "run",
        "convert",
        "exit codes: 0 done; 1 the input is at fault, or diff found differences; 2 usage or internal error;",
    ):
        assert word in out


@pytest.mark.parametrize("command", ["compile", "convert"])
def test_help_says_what_memory_counts(command: str, ckptc: Command) -> None:
    out = " ".join(ckptc(command, "--help").out.split())
    assert "--memory SIZE budget for buffers: source bytes read and target bytes made, of all units in flight" in out
    assert "(default: 512MiB)" in out
    assert "are not counted" in out


def test_version(ckptc: Command) -> None:
    import ckptc as package

    assert ckptc("--version").out == f"ckptc {package.__version__}\n"


# -- links ---------------------------------------------------------------------------------------------------


def test_links_are_told_of_before_and_after(ckptc: Command, mapping: str, source: str) -> None:
    said = ckptc(*PLAN, "--link", "--set", "padded_vocab=12").out
    assert "writes  32 B of 192 B" in said  # the padding
    assert "hard links" in said and "in place" in said and "LINKED" in said
    assert "LINKED" not in ckptc(*PLAN).out
    done = ckptc(*CONVERT, "--link", "--output", "out", "--quiet")
    assert (done.code, done.err) == (0, "") and "160 B linked" in done.out
    assert json.loads(ckptc("verify", "out", "--json").out) == {
        "arrays": 2,
        "bytes": 160,
        "against": "checksums",
        "linked_arrays": ["params/params/decoder/layers/mlp/wo/kernel", "params/params/token_embedder/embedding"],
        "linked_bytes": 160,
    }
    assert "linked, without checksums: 2 arrays, 160 B" in ckptc("verify", "out").out
    os.utime("checkpoint/model.safetensors", (0, 0))
    assert "error[linked-changed]" in ckptc("verify", "out").err


def test_exports_do_not_link(ckptc: Command, mapping: str, source: str) -> None:
    assert "error[cannot-link]" in ckptc(*PLAN, "--link", "--export").err
