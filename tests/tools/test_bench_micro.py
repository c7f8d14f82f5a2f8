"""The micro-benchmarks do the work whose rate they print, and have a row for each case."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.ops.codes.decoding import placed
from tests.ops.evaluate import same
from tests.tools.test_bench import TOOLS, module, run

from ckptc.ops.codes import Code
from ckptc.ops.codes.fp8 import Fp8
from ckptc.ops.codes.mxfp4 import Mxfp4
from ckptc.ops.types import numpy_dtype
from ckptc.plan.json import loads

# Forked, to measure with what is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
kernels, compiling = module("bench_kernels"), module("bench_compile")


def test_every_kernel_has_a_row(tmp_path: Path) -> None:
    report, said = run(tmp_path, "bench_kernels.py", "--rounds", "1", "--seconds", "0.001", "--processes", "1")
    assert [row["kernel"] for row in report["kernels"]] == [case.name for case in kernels.CASES]
    for row in report["kernels"]:
        for rates in (row["one"], row["all"]):
            assert rates["gb_per_s"] > 0 and rates["of_memcpy"] > 0 and len(rates["rounds_gb_per_s"]) == 1
        assert f"| {row['kernel']} | " in said
    assert report["kernels"][0]["kernel"] == "memcpy" and report["kernels"][0]["one"]["of_memcpy"] == 1


def test_the_rate_of_several_processes_is_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "rate", lambda *_: 2.0)
    cases = [kernels.Case("memcpy", lambda: (lambda: None, 1.0)), kernels.Case("other", lambda: (lambda: None, 1.0))]
    assert kernels.measured(cases, 2, 3, 0.0) == {"memcpy": [(2.0, 6.0)] * 2, "other": [(2.0, 6.0)] * 2}


@pytest.mark.parametrize(
    ("shape", "order", "options"),
    [
        ((6, 8), (1, 0), {"chunks": 4}),
        ((4, 2, 3, 8), kernels.ROPE, {"chunks": 2}),
        ((3, 5, 4), (2, 0, 1), {"chunks": 4, "source": "float32"}),
        ((6, 5), (0, 1), {"chunks": 1, "gap": 2}),
        ((6, 5), (0, 1), {"chunks": 1, "math": (("scale", 2.0),), "target": "float32"}),
    ],
)
def test_a_rearrangement_is_what_its_name_says(
    shape: tuple[int, ...], order: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[np.ndarray[Any, Any]] = []
    read: list[np.ndarray[Any, Any]] = []

    class Recording(kernels.Kernel):  # type: ignore[name-defined,misc]
        def copy(self, source: Any, start: int, target: Any, *rest: Any) -> None:
            super().copy(source, start, target, *rest)
            read[:] = [source]
            made.append(target.astype(np.float32))

    monkeypatch.setattr(kernels, "Kernel", Recording)
    once, size = kernels.rearranged(shape, order, **options)
    once()
    source = read[0].astype(np.float32)[:: options.get("gap", 1)].reshape(shape)
    expected = source.transpose(order).reshape(-1) * (2 if "math" in options else 1)
    found = np.concatenate(made)
    assert len(made) == options["chunks"]
    if options.get("source") == "float32":  # rounded to bfloat16
        np.testing.assert_allclose(found, expected, rtol=2**-8)
    else:
        np.testing.assert_array_equal(found, expected)
    wide = sum("float32" in (options.get(side),) for side in ("source", "target"))
    assert size == prod(shape) * (2 + wide)


@pytest.mark.parametrize(("code", "shape"), [(Fp8((4, 8)), (8, 16)), (Mxfp4(True), (1, 64, 3))], ids=str)
def test_what_is_decoded_is_the_whole_weight(
    code: Code, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Recording(kernels.Decoder):  # type: ignore[name-defined,misc]
        def decode(self, how: Any, rows: Any, codes: Any, beside: Any, out: Any) -> None:
            super().decode(how, rows, codes, beside, out)
            seen[:] = [how.dtype, codes, beside[0].data, out]

    monkeypatch.setattr(kernels, "Decoder", Recording)
    once, size = kernels.decoded(code, shape)
    once()
    dtype, codes, scales, out = seen
    stored = codes.view(numpy_dtype(dtype)).reshape(code.stored(shape))
    with np.errstate(all="ignore"):
        expected = code.forward([stored, scales.reshape(code.layout(shape).beside[0].shape)], shape)
    assert same(placed(code, shape, out), expected)
    assert size == (codes.nbytes + scales.nbytes + 4 * prod(shape)) / 2


def test_compiling_has_a_row_for_each_layout_or_the_reason_why_not(tmp_path: Path) -> None:
    options = (str(tmp_path), "--model", "qwen3-0.6b", "--model", "mixtral-8x7b", "--runs", "1")
    compiling.write_hollow(tmp_path / "mixtral-8x7b", "mixtral-8x7b")
    min((tmp_path / "mixtral-8x7b").glob("*.safetensors")).unlink()
    report, said = run(tmp_path, "bench_compile.py", *options)
    cases = [(row["model"], row["layout"]) for row in report["compilations"]]
    assert cases == [(m, layout) for m in ("qwen3-0.6b", "mixtral-8x7b") for layout in ("scanned", "unscanned")]
    for row in report["compilations"][:2]:
        plan = loads((tmp_path / f"qwen3-0.6b.{row['layout']}.json").read_bytes())
        assert (plan.choices.layout, row["tensors"]) == (row["layout"], len(plan.tensors))
        assert plan.source is not None, "headers were read"
        assert row["failed"] is None and row["runs"] == 1
        assert all(row[key] > 0 for key in ("compile_seconds", "compile_cpu_seconds", "compile_peak_mb", "plan_bytes"))
        assert all(row[key] > 0 for key in ("load_seconds", "load_peak_mb"))
    for row in report["compilations"][2:]:
        assert row["failed"].startswith("error[") and "compile_seconds" not in row
        assert f"failed: {row['failed']}" in said
    disk = sum(file.stat().st_blocks * 512 for file in (tmp_path / "qwen3-0.6b").iterdir())
    assert disk < 1_000_000, "weights are holes"


def test_streaming_is_measured_beside_a_download(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "bench_hub.py"), str(tmp_path), "--gigabytes", "0.01", "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["way", "hf download", "ckptc, streaming", "hf download, then ckptc"]
