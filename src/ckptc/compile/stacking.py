"""stacking: where layers lie in the target's tree, by settings of MaxText's that change no numbers.

`param_scan_axis` says which axis of an array scanned layers are. Pipeline parallelism divides layers into stages, which
lie below a place of their own, stacked by repeats and stages; layers that are left over lie outside of it.

Before: `decoder/layers/mlp/wo/kernel` [mlp, layer=8, embed].
After, of 2 stages with 2 layers each: `decoder/pipeline_module/layers/layers_{0,1}/mlp/wo/kernel` [repeat=2, stage=2,
mlp, embed]. Layer (repeat * 2 + stage) * 2 + i is at [repeat, stage] of `layers_{i}`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ckptc.diagnostics import did_you_mean, fail
from ckptc.ops.types import Axis
from ckptc.spec.target import Pipelined

SCAN_AXIS = 1  # MaxText's own setting
SCAN_AXES = range(4)  # of the largest arrays of layers, which have three axes of their own
_HELP = "write it as `--pipeline stages=4,layers_per_stage=2`"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """MaxText's settings of pipeline parallelism, as far as the tree depends on them."""

    stages: int  # ici_pipeline_parallelism * dcn_pipeline_parallelism
    layers_per_stage: int = 1  # num_layers_per_pipeline_stage
    scan_layers_per_stage: int = 0  # 1: the layers of a stage are stacked too
    layers: int = 0  # pipeline_parallel_layers; 0: all there are

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        return ",".join(f"{n}={v}" for n, v in shown.items() if n == "stages" or v != (n == "layers_per_stage"))


def read_pipeline(text: str) -> Pipeline:
    """The settings of `stages=4,layers_per_stage=2`. Raises InputError `bad-pipeline`."""
    known = [f.name for f in fields(Pipeline)]
    found: dict[str, int] = {}
    for item in text.split(","):
        name, equals, size = (part.strip() for part in item.partition("="))
        if name == "scan_layers_per_stage" and size in ("", "true", "false"):
            size = str(int(size != "false"))
        elif not (name and equals and re.fullmatch(r"[0-9]{1,6}", size)):
            raise fail("bad-pipeline", f"`{item}` in --pipeline is not a setting and its number", help=_HELP)
        if name not in known:
            notes = (f"settings: {', '.join(known)}",)
            raise fail("bad-pipeline", f"a pipeline has no `{name}`", notes=notes, help=did_you_mean(name, known))
        if name in found:
            raise fail("bad-pipeline", f"--pipeline has `{name}` twice", help=_HELP)
        found[name] = int(size)
    if found.get("stages", 0) < 2 or found.get("layers_per_stage", 1) < 1:
        raise fail("bad-pipeline", "a pipeline has 2 stages or more, and layers in each", help=_HELP)
    return Pipeline(**found)


@dataclass(frozen=True, slots=True)
class Share:
    """Layers that become one array of each rule."""

    at: str  # the place
    layers: tuple[int, ...]  # positions in the list, row-major over the grid
    grid: tuple[Axis, ...]
    lead: int  # how many axes of the grid lead the finished array, instead of lying at the scan axis


def shares(pipeline: Pipeline, where: Pipelined, at: str, layer: Axis, scanned: bool) -> list[Share]:
    """What becomes of the stack of layers at a place `at`. Raises InputError `bad-pipeline`."""
    rest = at.split("/")[len(where.at) :]
    inner = pipeline.layers or layer.size
    per_repeat = pipeline.stages * pipeline.layers_per_stage
    if inner > layer.size or inner % per_repeat:
        raise fail(
            "bad-pipeline",
            f"{pipeline.stages} stages with {pipeline.layers_per_stage} layers each do not divide {inner} layers"
            if inner <= layer.size
            else f"there are {layer.size} layers, not {inner}, at `{at}`",
            help="`layers` says how many of the layers are pipelined, as MaxText's `pipeline_parallel_layers` does",
        )
    outer = layer.size - inner
    first = outer if where.outside_first else 0
    repeats = inner // per_repeat
    lead = (Axis("repeat", repeats),) if repeats > 1 else ()
    lead = (*lead, Axis("stage", pipeline.stages))
    place, count = [*where.inside], pipeline.layers_per_stage
    layers = tuple(range(first, first + inner))
    if count == 1:
        out = [Share("/".join([*place, *rest]), layers, lead, len(lead))]
    elif pipeline.scan_layers_per_stage:
        name = "/".join([*place, "scanned_layers", *rest])
        out = [Share(name, layers, (*lead, Axis(layer.name, count)), len(lead))]
    else:
        out = [Share("/".join([*place, f"layers_{i}", *rest]), layers[i::count], lead, len(lead)) for i in range(count)]
    left = tuple(n for n in range(layer.size) if n not in layers)
    name = "/".join(where.outside)
    if left and scanned:
        out.append(Share("/".join([name, *rest]), left, (Axis(layer.name, outer),), 0))
    elif left:
        out += [Share("/".join([f"{name}_{i}", *rest]), (n,), (), 0) for i, n in enumerate(left)]
    return out


def scan_positions(axis: int, own: int, stacked: int) -> list[int]:
    """Where axes of stacked layers go in an array with `own` axes besides, in the order in which they are put there:
    the innermost first. As MaxText stacks them: at the axis, or in front where an array has none so far back.
    """
    return [axis if own + n + 1 > axis else 0 for n in range(stacked)]


def guesses(paths: Sequence[tuple[str, ...]], shapes: Sequence[tuple[int, ...]]) -> list[Pipeline]:
    """Settings with which a saved tree may have been pipelined, by the paths of its arrays below the pipeline, counted
    from there, and their shapes. Which one it is, the arrays' shapes decide.
    """
    numbers = {int(m[1]) for path in paths if (m := re.fullmatch(r"layers_(\d+)", path[0]))}
    scanned = any(path[0] == "scanned_layers" for path in paths)
    small = min(shapes, key=len)
    counts = sorted({*small[1:]}) if scanned else [max(numbers, default=0) + 1]
    out = []
    for count in counts:
        for repeats, stages in ((small[0], small[1]), (1, small[0])):
            if stages > 1 and repeats * stages * count <= 1 << 16:
                out.append(Pipeline(stages, count, int(scanned), repeats * stages * count))
    return out
