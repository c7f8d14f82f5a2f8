"""What the user chose for one compilation."""

from __future__ import annotations

from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, field

from ckptc.spec.mapping import Value

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    layout: str = "scanned"  # or "unscanned"
    dtype: str = "bfloat16"  # of stored floating arrays, where a rule does not say otherwise
    multimodal: bool = False  # whether vision and audio towers are converted
    set: MappingOf[str, Value] = field(default_factory=dict)  # dims by name, from --set
    shards: int = 16  # storage shards of an array, along the first axis they divide, else the second
    memory: int = 256 * MIB  # bytes of buffers a run may hold
