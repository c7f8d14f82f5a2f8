"""A checkpoint keeps what its export needs: the original's config, tokenizer, and its tensors' names and dtypes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1

from ckptc.cli.main import run
from ckptc.storage.checkpoint.companions import TENSORS
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from ckptc.storage.checkpoint.steps import find_step
from golden import known_cases
from reference import GoldenCase
from roundtrip import converted

CASES = {case.name: case for case in known_cases()}
TOKENIZER = {"tokenizer.json": '{"version": "1.0"}', "generation_config.json": "{}", "pytorch_model.bin": "weights"}

pytestmark = [
    pytest.mark.usefixtures("jax_with_64_bits"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:.*donated", "ignore:os.fork"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def with_tokenizer(case: GoldenCase, directory: Path) -> GoldenCase:
    """The case, with files beside its weights."""
    shutil.copytree(case.hf, directory)
    for name, text in TOKENIZER.items():
        (directory / name).write_text(text, "utf-8")
    return replace(case, hf=directory)


def without_weights(case: GoldenCase, directory: Path) -> None:
    """The case's files but for its weights, from which tensors would be copied that the target has no place for."""
    shutil.copytree(case.hf, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    dtypes: dict[str, list[str]] = {}
    for name, tensor in open_checkpoint(case.hf).tensors.items():
        dtypes.setdefault(tensor.dtype, []).append(name)
    (directory / TENSORS).write_text(json.dumps({"dtypes": dtypes}), "utf-8")


def files(directory: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(directory.iterdir()):
        yield path.name, path.read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_an_export_without_the_original_is_the_one_with_it(name: str, tmp_path: Path) -> None:
    """Every byte of every file, config.json and tokenizer included; the model is known, too."""
    case = with_tokenizer(CASES[name], tmp_path / "original")
    converted(case, tmp_path / "out")
    mm = ["--multimodal"] if case.multimodal else []
    options = ["--model", case.model, "--config-from", "original", *mm]
    without_weights(case, Path("files"))
    options[options.index("original")] = "files"
    assert run(["export", "--source", "out", "--output", "with", "--quiet", *options]) == 0
    shutil.rmtree("original")
    shutil.rmtree("files")
    assert run(["export", "--source", "out", "--output", "without", "--quiet"]) == 0
    found = dict(files(Path("without")))
    assert found == dict(files(Path("with")))
    assert found["tokenizer.json"].decode() == TOKENIZER["tokenizer.json"]
    assert "pytorch_model.bin" not in found and TENSORS not in found


def test_a_dim_that_was_set_is_kept(tmp_path: Path) -> None:
    """As a fine-tune's, whose config says something else."""
    case = with_tokenizer(CASES["llama3_1"], tmp_path / "original")
    config = json.loads(Path("original/config.json").read_text("utf-8"))
    layers = config["num_hidden_layers"]
    Path("original/config.json").write_text(json.dumps({**config, "num_hidden_layers": 99}), "utf-8")
    converted(case, tmp_path / "out", set={"layers": layers})
    noted = json.loads(Path("out/0/_CHECKPOINT_METADATA").read_text("utf-8"))["custom_metadata"]["ckptc"]
    assert (noted["dims"]["layers"], noted["model"]) == (layers, case.model)
    assert run(["export", "--source", "out", "--output", "hf", "--quiet"]) == 0


def test_what_was_trained_from_it_takes_the_files_from_it(tmp_path: Path) -> None:
    case = with_tokenizer(CASES["llama3_1"], tmp_path / "original")
    converted(case, tmp_path / "out")
    tree = ocp.PyTreeCheckpointHandler().restore(find_step(tmp_path / "out").items)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "run/checkpoints/5/items", ocp.args.PyTreeSave(tree))
    options = ["--model", case.model, "--config-from", "out", "--quiet"]
    assert run(["export", "--source", "run", "--output", "trained", *options]) == 0
    assert run(["export", "--source", "out", "--output", "hf", "--quiet"]) == 0
    assert dict(files(Path("trained"))) == dict(files(Path("hf")))


def test_a_plan_finds_the_kept_files_where_nobody_remembers_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = with_tokenizer(CASES["llama3_1"], tmp_path / "original")
    converted(case, tmp_path / "out")
    export = ["--export", "--model", case.model, "--source", "out", "--config-from", "original"]
    assert run(["compile", *export, "-o", "plan.json"]) == 0
    shutil.rmtree("original")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert run(["run", "plan.json", "--source", "out", "--output", "hf", "--quiet"]) == 0
    assert Path("hf/tokenizer.json").read_text("utf-8") == TOKENIZER["tokenizer.json"]


def test_kept_files_that_are_damaged_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(CASES["llama3_1"], tmp_path / "out")
    Path("out/0/items/hf", TENSORS).write_text("[]", "utf-8")
    assert run(["export", "--source", "out", "--output", "hf", "--quiet"]) == 1
    assert "error[orbax-json]" in capsys.readouterr().err


def test_orbax_restores_a_step_with_kept_files(tmp_path: Path) -> None:
    """Both interfaces, also where they are asked for everything that is in the step: a directory beside `items` would
    be an item to them.
    """
    case = with_tokenizer(CASES["llama3_1"], tmp_path / "original")
    out = converted(case, tmp_path / "out").resolve()
    count = len(jax.tree.leaves(ocp.PyTreeCheckpointer().restore(out / "0" / "items")))
    with ocp.CheckpointManager(out, {"items": ocp.PyTreeCheckpointer()}) as manager:
        assert len(jax.tree.leaves(manager.restore(0)["items"])) == count
    found = v1.load_checkpointables(out / "0")
    assert list(found) == ["items"] and len(jax.tree.leaves(found["items"])) == count
