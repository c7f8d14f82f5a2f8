"""A plan's links, made before any work: the files they need, and where in them each chunk lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckptc.diagnostics import InputError, fail
from ckptc.ir.source import SourceFile
from ckptc.plan.links import places
from ckptc.plan.model import Plan
from ckptc.run import journal
from ckptc.run.output import Unfinished
from ckptc.storage.checkpoint.links import LinkedChunks, LinkedFile, link_files, record


@dataclass(frozen=True)
class Linked:
    """What a run has linked."""

    files: dict[str, LinkedFile] = field(default_factory=dict)
    chunks: list[LinkedChunks] = field(default_factory=list)

    @property
    def arrays(self) -> set[int]:
        """The arrays, as positions in the plan, that lie in linked files, if not all of them."""
        return {c.array for c in self.chunks}

    def metadata(self, plan: Plan) -> dict[str, Any]:
        """What is kept with the checkpoint: nothing where there are no links."""
        if not self.files:
            return {}
        names = sorted(plan.arrays[n].name for n in self.arrays)
        return {"linked": {"files": record(self.files), "arrays": names}}


def link(plan: Plan, source: Path | None, files: Sequence[SourceFile], unfinished: Unfinished) -> Linked:
    """Makes the links of a plan in its unfinished output.

    Raises `cannot-link`; then what is unfinished is removed if it holds no work yet, so that another plan may begin.
    """
    if not plan.totals.linked_bytes:
        return Linked()
    if source is None:
        raise fail("cannot-link", "the source lies on no disk of this machine", help="compile it without --link")
    assert isinstance(unfinished, journal.Unfinished), "only a local output has links"
    found = places(plan)
    needed = np.unique(np.concatenate([p.files for p in found])).tolist()
    try:
        linked = link_files(source, [files[n] for n in needed], unfinished.checkpoint / "items")
    except InputError:
        if not unfinished.done:
            unfinished.forget()
        raise
    unfinished.note_links()
    return Linked(linked, [LinkedChunks(p.array, p.cells, np.searchsorted(needed, p.files), p.offsets) for p in found])
