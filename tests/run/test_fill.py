"""What an export copies from the original where the target has no place for it, and what it says where it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ckptc.cli.main import run
from golden import golden_cases, source_tensors

CASES = {
    c.hf.parent.name: c for c in golden_cases() if not c.multimodal and c.hf.parent.name in ("gemma3", "gemma4_e2b")
}


@pytest.fixture(scope="module", params=sorted(CASES))
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A text model with its original's name and files, converted."""
    case, output = CASES[request.param], tmp_path_factory.mktemp(request.param) / "out"
    command = ["convert", "--model", case.model, "--source", str(case.hf), "--output", str(output), "--quiet"]
    command += ["--set", f"padded_vocab={case.vocab}", "--scan" if case.layout == "scan" else "--no-scan"]
    assert run(command) == 0
    return request.param, case.hf, output


def export(output: Path, to: Path, *options: str) -> int:
    return run(["export", "--source", str(output), "--output", str(to), "--quiet", *options])


def test_the_original_comes_back_whole(converted: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, original, output = converted
    assert export(output, tmp_path / "text") == 0
    assert export(output, tmp_path / "hf", "--fill-from", str(original)) == 0
    text, made, wanted = (source_tensors(d) for d in (tmp_path / "text", tmp_path / "hf", original))
    assert made.keys() == wanted.keys() - {"lm_head.weight"} and made.keys() > text.keys()
    for name, array in made.items():
        same = text[name] if name in text else wanted[name]
        assert array.dtype == same.dtype and array.tobytes() == same.tobytes(), name


def test_without_the_original_it_is_said_that_towers_are_missing(
    converted: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, original, output = converted
    towers = [n for n in source_tensors(original) if "vision" in n or "audio" in n]
    config = json.loads((original / "config.json").read_text())
    assert export(output, tmp_path / "hf") == 0
    said = capsys.readouterr().err
    if "vision_config" in config or "audio_config" in config:
        assert "warning:" in said and "random weights" in said and "--fill-from" in said
    assert not set(towers) & set(source_tensors(tmp_path / "hf"))


def test_an_original_at_hand_is_copied_from_unasked(converted: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, original, output = converted
    assert export(output, tmp_path / "hf", "--config-from", str(original)) == 0
    assert len(source_tensors(tmp_path / "hf")) >= len(source_tensors(original)) - 1


def test_a_plan_runs_with_the_weights_it_was_made_from_alone(converted: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, original, output = converted
    copy, plan = tmp_path / "copy", str(tmp_path / "plan.json")
    shutil.copytree(original, copy)
    command = ["export", "--source", str(output), "--output", str(tmp_path / "no"), "--fill-from", str(copy)]
    with open(tmp_path / "dump.json", "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        assert run([*command, "--dump-plan"]) == 0
    shutil.copy(tmp_path / "dump.json", plan)
    assert run(["run", plan, "--output", str(tmp_path / "first"), "--quiet"]) == 0
    tower = next(iter(sorted(copy.glob("*.safetensors"))))
    data = bytearray(tower.read_bytes())
    data[-64:] = bytes(64)
    tower.write_bytes(data)
    assert run(["run", plan, "--output", str(tmp_path / "second"), "--quiet"]) == 1
    assert not (tmp_path / "second").exists() or not list((tmp_path / "second").glob("*.safetensors"))
