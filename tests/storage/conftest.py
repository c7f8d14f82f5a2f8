"""Files that look like shards, and what refusing one says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.source import SourceFile
from ckptc.storage.source.files import header_digest

SIZE = 5000


@pytest.fixture
def files(tmp_path: Path) -> list[SourceFile]:
    """Eight files of random bytes after a header of 16 bytes."""
    made = []
    for number in range(8):
        head = (8).to_bytes(8, "little") + b"{}      "
        (tmp_path / f"{number}.safetensors").write_bytes(head + random.Random(number).randbytes(SIZE - 16))
        made.append(SourceFile(f"{number}.safetensors", SIZE, header_digest(head)))
    return made


def refusal(action: Any, *arguments: Any) -> Diagnostic:
    with pytest.raises(InputError) as caught:
        action(*arguments)
    (only,) = caught.value.diagnostics
    assert only.help and [note.split(":")[0] for note in only.notes[:2]] == ["expected", "found"]
    return only
