"""The golden cases through ckptc: which it knows, how each is compiled, and what its arrays must be.

`reference` reads the data without the package; this module brings the two together, for the tests that compare them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.ir.source import Checkpoint, SourceFile
from ckptc.plan.model import Box, Plan
from ckptc.plan.order import Unit
from ckptc.run.readers import Readers
from ckptc.run.worker import Worker
from ckptc.spec import mapping as spec
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from ckptc.storage.source.ranges import RangeReader
from reference import GoldenCase, expected_arrays, golden_cases, read_safetensors

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]  # by slash-joined path as saved

LAYOUTS = {"scan": "scanned", "unscan": "unscanned"}


@dataclass(frozen=True)
class Kept:
    """Arrays that MaxText rounds on the way and ckptc does not: they keep the source's numbers."""

    case: str  # name of the golden case
    target: str  # regular expression of the paths
    source: str  # regular expression of the tensors' names; numbers in the names order them
    reason: str


# Every difference there may be between a golden and the output, and why. Anything else is a failure.
KEPT = (
    Kept(
        "deepseek3",
        r"params/params/.*/gate/bias",
        r"model\.layers\.\d+\.mlp\.gate\.e_score_correction_bias",
        "MaxText rounds the routing bias to bfloat16; choosing experts compares close numbers, so its float32 is kept",
    ),
    Kept("deepseek4", r"params/params/.*/gate/bias", r"layers\.\d+\.ffn\.gate\.bias", "the same bias"),
    Kept(
        "deepseek4",
        r"params/params/.*/tid2eid",
        r"layers\.\d+\.ffn\.gate\.tid2eid",
        "MaxText stores this table of integers as bfloat16, which cannot count past 256; it keeps its integers",
    ),
)


def known_cases() -> list[GoldenCase]:
    """The golden cases of models that a shipped mapping names."""
    known = {name for mapping in spec.shipped() for name in mapping.models}
    return [case for case in golden_cases() if case.model in known]


def options_of(case: GoldenCase, **changes: Any) -> Options:
    """The options under which MaxText's own result is expected."""
    options = Options(
        layout=LAYOUTS[case.layout],
        dtype=case.dtype,
        multimodal=case.multimodal,
        set={"padded_vocab": case.vocab},
    )
    return replace(options, **changes)


@functools.cache
def checkpoint_of(hf: Path) -> Checkpoint:
    return open_checkpoint(hf)


def compile_case(case: GoldenCase, **changes: Any) -> Plan:
    """The plan of a case by its shipped mapping."""
    mapping, model = spec.find_model(case.model)
    return compile_plan(mapping, model, options_of(case, **changes), checkpoint_of(case.hf))


def evaluate(plan: Plan, source: Path, numbers: Iterable[int] | None = None) -> dict[str, Array]:
    """The plan's arrays, or those of the given numbers, made by the worker in this process, without Orbax."""
    wanted = range(len(plan.arrays)) if numbers is None else numbers
    made: dict[int, Array] = {}

    def sink(number: int, box: Box, chunk: Array) -> None:
        array = plan.arrays[number]
        if number not in made:
            made[number] = np.full(np.prod(array.shape, dtype=int) * chunk.dtype.itemsize, 0xA5, np.uint8)
            made[number] = made[number].view(chunk.dtype).reshape(array.shape)
        made[number][tuple(slice(low, high) for low, high in box)] = chunk

    files = [SourceFile(f.name, f.size, f.header) for f in plan.sources[0].files]
    with RangeReader(source, files) as reader:
        worker = Worker(plan, Readers([reader]), sink, lambda: None)
        for _ in worker.make((0, Unit((number,), box)) for number in wanted for box in plan.arrays[number].units()):
            pass
    return {plan.arrays[number].name: array for number, array in made.items()}


def differences(found: Arrays, expected: Arrays) -> list[str]:
    """What distinguishes two sets of arrays: paths, dtypes, shapes, or bits. Empty where they are the same."""
    out = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    out += [f"{name} is not expected" for name in sorted(found.keys() - expected.keys())]
    return out + [
        d for name in sorted(found.keys() & expected.keys()) if (d := difference(name, found[name], expected[name]))
    ]


def difference(name: str, a: Array, b: Array) -> str | None:
    """What distinguishes two arrays, None where they are the same bit for bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{name} is {a.dtype}{list(a.shape)}, expected {b.dtype}{list(b.shape)}"
    if a.tobytes() != b.tobytes():
        return f"{name} has other values"
    return None


@functools.cache
def expected_of(case: GoldenCase) -> Arrays:
    """What a run must give: MaxText's arrays, and where `KEPT` says so the source's numbers in the golden's shape."""
    expected = dict(expected_arrays(case))
    for kept in (k for k in KEPT if k.case == case.name):
        tensors = source_tensors(case.hf)
        sources = [tensors[n] for n in naturally(n for n in tensors if re.fullmatch(kept.source, n))]
        targets = naturally(n for n in expected if re.fullmatch(kept.target, n))
        # Stacked layers lead in these arrays, so that one after the other they are the sources one after the other.
        numbers = np.concatenate([s.ravel() for s in sources])
        ends = np.cumsum([0, *(expected[t].size for t in targets)]).tolist()
        assert len(numbers) == ends[-1], f"{case.id}: {len(numbers)} elements at the source, {ends[-1]} in the golden"
        for target, (low, high) in zip(targets, pairwise(ends), strict=True):
            exact = numbers[low:high].reshape(expected[target].shape)
            assert not difference(target, exact.astype(expected[target].dtype), expected[target])
            expected[target] = exact
    return expected


def source_tensors(hf: Path) -> dict[str, Array]:
    """Every tensor of a tiny checkpoint."""
    return {name: array for file in sorted(hf.glob("*.safetensors")) for name, array in read_safetensors(file).items()}


def naturally(names: Iterable[str]) -> list[str]:
    """In the order of the numbers in the names: `layers.2` before `layers.10`."""
    return sorted(names, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])
