"""What the user chose for one compilation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptc.compile.mesh import Mesh
from ckptc.compile.stacking import SCAN_AXIS, Pipeline
from ckptc.spec.mapping import Value
from ckptc.spec.target import Rules

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    layout: str = "scanned"  # or "unscanned"
    dtype: str = "bfloat16"  # of stored floating arrays, where a rule does not say otherwise
    multimodal: bool = False  # whether vision and audio towers are converted
    set: Mapping[str, Value] = field(default_factory=dict)  # dims by name, from --set
    shards: int = 16  # storage shards of an array, along the first axis they divide, else the second
    mesh: Mesh = ()  # the device mesh that arrays are sharded for instead; () for none
    rules: Rules = ()  # for the mesh
    compression: str = "none"  # of chunks: as `ckptc.plan.model.Choices` has it
    memory: int = 512 * MIB  # bytes of buffers a run may hold
    link: bool = False  # whether what lies in source files as it is stays there
    scan_axis: int = SCAN_AXIS  # the axis that stacked layers are: MaxText's `param_scan_axis`
    pipeline: Pipeline | None = None  # how layers are divided into stages, if they are
