"""`ckptc plan`, `ckptc explain MODEL TENSOR`, and the page to explore a plan, in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ckptc.cli.main import run

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    assert run(["compile", "--model", "gemma2-2b", "-o", str(file)]) == 0
    return file


def test_equal_plans_do_the_same(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "diff", str(plan), str(plan)]) == 0
    assert capsys.readouterr().out == "the plans do the same\n"


def test_what_differs_is_said(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    assert run(["compile", "--model", "gemma2-2b", "--dtype", "float32", "-o", str(other)]) == 0
    capsys.readouterr()
    assert run(["plan", "diff", "--json", str(plan), str(other)]) == 1
    found = {one["what"]: (one["first"], one["second"]) for one in json.loads(capsys.readouterr().out)}
    assert found["choices.dtype"] == ("bfloat16", "float32")
    assert found["params/params/token_embedder/embedding, dtype"] == ("bfloat16", "float32")


def test_a_tensor_is_followed_to_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "gemma2-2b", "model.layers.3.self_attn.q_proj.weight", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["array"].endswith("self_attention_global/query/kernel")
    assert any(op.startswith("scale 0.0625") for op in found["ops"]) and re.search(r"\.yaml:\d+:\d+$", found["place"])
    assert [(p["reads"], p["becomes"]) for p in found["pieces"]] == [("[:, :]", "[:, 1, :, :]")]


def test_an_array_is_followed_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "gemma2-2b", "*token_embedder/embedding"]) == 0
    said = capsys.readouterr().out
    assert "model.embed_tokens.weight" in said and "scale" in said


def test_a_name_that_nothing_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "gemma2-2b", "model.layers.3.self_attn.q_porj.weight"]) == 1
    said = capsys.readouterr().err
    assert "error[no-match]" in said and "did you mean `model.layers.3.self_attn.q_proj.weight`?" in said


def test_a_page_is_not_written_over_a_file(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    page.write_text("mine")
    assert run(["plan", "show", str(plan), "--html", str(page)]) == 1
    assert "error[output-exists]" in capsys.readouterr().err and page.read_text() == "mine"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_shows_the_plan_in_a_browser(plan: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert run(["plan", "show", str(plan), "--html", str(page)]) == 0
    probe = "<script>addEventListener('load', () => { targets.choose(0); document.title = 'done'; });</script></body>"
    page.write_text(page.read_text().replace("</body>", probe))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>done</title>" in shown
    detail = shown[shown.index('id="detail"') :]
    assert "params/params/decoder/decoder_norm/scale" in detail and "model.norm.weight" in detail
    assert re.search(r"288 tensors|\d+ tensors", shown)
