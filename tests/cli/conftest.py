"""A tiny checkpoint, a mapping of its own, and the command line in this process or in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptc.cli.main import run

MAPPING = """\
family: tiny
title: Two matrices
target: maxtext
extra: true
dims:
  layers: config.num_hidden_layers
  embed: config.hidden_size
  mlp: config.intermediate_size
  vocab: config.vocab_size
  padded_vocab: vocab
models:
  tiny: { repo: example/tiny, config: { num_hidden_layers: 2, hidden_size: 4, intermediate_size: 6, vocab_size: 8 } }
  tiny-tied: { repo: example/tiny-tied, like: tiny }
tensors:
  token_embedder/embedding: { from: model.embed.weight, as: vocab embed, ops: [{ pad: { vocab: padded_vocab } }] }
blocks:
  decoder:
    source: model.layers.{{ layer }}
    scanned: [{ at: decoder/layers, stack: { layer: layers } }]
    unscanned: [{ at: "decoder/layers_{{ layer }}", for: { layer: layers } }]
    tensors:
      mlp/wo/kernel: { from: down.weight, as: embed mlp -> mlp embed }
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory to work in, and no notes of where checkpoints lie but the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CKPTC_TRACEBACK", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ckptc(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line here; a usage error's exit is its code."""

    def command(*argv: str) -> Result:
        capsys.readouterr()
        try:
            code = run(list(map(str, argv)))
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        return Result(code, *capsys.readouterr())

    return command


@pytest.fixture
def mapping(tmp_path: Path) -> str:
    (tmp_path / "mapping.yaml").write_text(MAPPING, "utf-8")
    return "mapping.yaml"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A checkpoint of the mapping, with 160 bytes of tensors."""
    write_checkpoint(tmp_path / "checkpoint", layers=2, embed=4, mlp=6, vocab=8)
    return "checkpoint"


def write_checkpoint(directory: Path, layers: int, embed: int, mlp: int, vocab: int) -> None:
    """All zeros, in a file with holes."""
    directory.mkdir()
    config = {"num_hidden_layers": layers, "hidden_size": embed, "intermediate_size": mlp, "vocab_size": vocab}
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    shapes = {"model.embed.weight": [vocab, embed]}
    shapes |= {f"model.layers.{layer}.down.weight": [embed, mlp] for layer in range(layers)}
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)


def python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """This Python in another process, with the package and without the test runner."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )
