"""What a journal of an unfinished run says, as far as it can be trusted. (`ckptc.run.journal` writes it.)"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from ckptc.regular import open_file
from ckptc.storage.checkpoint.orbax_writer import LARGE_FILE, Entry
from ckptc.storage.formats import checksum


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


class Lines:
    """What a journal says, up to the first line that is not whole or speaks of data that is not there."""

    def __init__(self, checkpoint: Path, process: int, path: Path) -> None:
        self.file: str | None = None
        self.units: list[int] = []
        self.entries: list[Entry] = []
        self.sums: defaultdict[int, int] = defaultdict(int)  # of arrays, as positions in the plan
        with open_file(path) as journal:
            first, *lines = journal.read().split(b"\n")
        file = first.decode("ascii", "replace")
        data = checkpoint / "items" / f"ocdbt.process_{process}" / "d" / file
        if not lines or not re.fullmatch("[0-9a-f]{32}", file):
            return
        # A writer that has closed has no data file if all it wrote were pieces of large chunks.
        size, large_size = _size(data), _size(checkpoint / "items" / LARGE_FILE)
        if size < 0 and large_size < 0:
            return
        self.file, self.length = file, len(first) + 1
        for line in lines[:-1]:  # the piece after the last newline is a line cut short
            try:
                record = json.loads(line)
                entries = [Entry(str(key), int(offset), int(length)) for key, offset, length in record["chunks"]]
                large = int(record.get("large", 0))
                units, sums = list(map(int, record["units"])), [(int(a), int(s)) for a, s in record["sums"]]
            except (ValueError, TypeError, KeyError):
                return
            if large > max(0, large_size) or any(e.offset < 0 or e.offset + e.length > size for e in entries):
                return
            self.units += units
            self.entries += entries
            for array, value in sums:
                self.sums[array] = checksum.add(self.sums[array], value)
            self.length += len(line) + 1
