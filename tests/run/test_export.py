"""There and back: what an export writes is the original, bit for bit where the plan says so, and within the stated
bound elsewhere.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
from safetensors import safe_open

from ckptc.compile.compiler import layouts
from ckptc.compile.export import compile_export
from ckptc.compile.reading import ExportOptions
from ckptc.compile.scope import matches
from ckptc.diagnostics import InputError
from ckptc.plan.model import Plan, Safetensors
from ckptc.plan.order import Unit
from ckptc.run.export import export
from ckptc.run.worker import Loaded, Worker
from ckptc.spec import mapping as spec
from ckptc.storage.checkpoint.companions import open_original
from ckptc.storage.checkpoint.orbax_reader import open_saved
from golden import compile_case, evaluate, known_cases, source_tensors
from reference import DATA, GoldenCase
from roundtrip import EXACT, broken_promises, converted, export_plan, exported, kinds

CASES = {case.name: case for case in known_cases()}
BOTH = [(name, layout) for name, case in CASES.items() for layout in layouts(*spec.find_model(case.model))]
# Tensors of which MaxText keeps less than there is: its vocabulary ends where text tokens end.
CUT = {"gemma3": "language_model.model.embed_tokens.weight", "gemma3_mm": "language_model.model.embed_tokens.weight"}

pytestmark = [
    pytest.mark.usefixtures("jax_with_64_bits"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:.*donated"),
]


def ignored(case: GoldenCase) -> tuple[str, ...]:
    """Patterns of tensors that the conversion leaves out; a plan shows several of one entry as their template."""
    return tuple(re.sub(r"\{\{.*?\}\}", "*", x.pattern) for x in compile_case(case).left_out)


@pytest.mark.parametrize(("name", "layout"), BOTH)
def test_there_and_back(name: str, layout: str, tmp_path: Path) -> None:
    case = CASES[name]
    saved = converted(case, tmp_path / "orbax", layout=layout)
    plan = export_plan(case, saved)
    assert plan.choices.layout == layout
    found, report = exported(plan, saved, tmp_path / "hf", case)
    original = plain(case, plan)
    if name in CUT:
        rows = found[CUT[name]].shape[0]
        assert rows < original[CUT[name]].shape[0]
        original[CUT[name]] = original[CUT[name]][:rows]
    assert broken_promises(plan, found, original) == []
    left = [n for n in original if n not in found]
    assert [n for n in left if not matches(n, *ignored(case))] == []
    assert report.warnings == ()
    assert (report.checksums, report.without_checksum) == (plan.totals.tensors, 0)


def plain(case: GoldenCase, plan: Plan) -> dict[str, Any]:
    """The original's tensors; those stored as codes as the numbers they stand for, in the dtype of the export."""
    tensors = dict(source_tensors(case.hf))
    scales = {n for n in tensors if n.endswith(("_scale_inv", ".scale", "_scales"))}
    dtypes = {n: k.dtype for n, k in kinds(plan).items()}
    for name, values in list(tensors.items()):
        if values.dtype != ml_dtypes.float8_e4m3fn or dtypes.get(name) == "float8_e4m3fn":
            continue
        scale = next(s for s in (f"{name}_scale_inv", name.removesuffix(".weight") + ".scale") if s in scales)
        blocks = tensors.pop(scale).astype(np.float32)
        config = json.loads((case.hf / "config.json").read_text("utf-8"))
        block = config["quantization_config"].get("weight_block_size", [128, 128])
        for axis, size in enumerate(block):
            blocks = blocks.repeat(size, axis).take(range(values.shape[axis]), axis)
        tensors[name] = (values.astype(np.float32) * blocks).astype(dtypes.get(name, "float32"))
    return tensors


def test_codes_that_a_checkpoint_holds_stay_codes_and_the_config_says_so(tmp_path: Path) -> None:
    """Whether or not the original is at hand to tell."""
    case = CASES["qwen3_5_fp8"]
    saved = converted(case, tmp_path / "orbax", layout="unscanned")
    plan = export_plan(case, saved)
    config = json.loads((case.hf / "config.json").read_text("utf-8"))
    assert (
        isinstance(plan.layout, Safetensors)
        and plan.layout.config["quantization_config"] == config["quantization_config"]
    )
    assert {n: k.dtype for n, k in kinds(plan).items()}.items() >= {
        (n, "float8_e4m3fn") for n, a in source_tensors(case.hf).items() if a.dtype == ml_dtypes.float8_e4m3fn
    }
    sizes = {n: v for n, v in plan.choices.dims.items() if isinstance(v, int | float)}
    alone = export_plan(case, saved, original=False, set=sizes)
    assert {n: k.dtype for n, k in kinds(alone).items()} == {n: k.dtype for n, k in kinds(plan).items()}
    decoded = converted(case, tmp_path / "decoded", layout="unscanned", dtype="bfloat16")
    plan = export_plan(case, decoded)
    assert isinstance(plan.layout, Safetensors) and "quantization_config" not in plan.layout.config
    assert {k.dtype for k in kinds(plan).values()} <= {"bfloat16", "float32"}
    found, _ = exported(plan, decoded, tmp_path / "hf", case)
    assert broken_promises(plan, found, plain(case, plan)) == []


@pytest.mark.parametrize("name", ["qwen3_moe", "llama3_1", "deepseek2"])
def test_memory_changes_units_and_nothing_else(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    saved = converted(case, tmp_path / "orbax", layout="scanned", memory=8 << 10)  # in small chunks
    usual, small = export_plan(case, saved), export_plan(case, saved, memory=24 << 10)
    assert [k.unit for k in kinds(small).values()] != [k.unit for k in kinds(usual).values()]
    assert small.totals.peak_memory_bytes <= 24 << 10
    found, _ = exported(usual, saved, tmp_path / "usual", case)
    again, _ = exported(small, saved, tmp_path / "small", case)
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in again.items()}


def test_buffers_are_as_large_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mixtral"]
    saved = converted(case, tmp_path / "orbax", layout="scanned", memory=8 << 10)
    plan = export_plan(case, saved, memory=24 << 10)
    held: list[int] = []
    made = Worker._make

    def watched(self: Worker, key: int, unit: Unit, loaded: Callable[[], Loaded]) -> tuple[int, int]:
        done = made(self, key, unit, loaded)
        held.append(self.held_bytes)
        return done

    monkeypatch.setattr(Worker, "_make", watched)
    export(plan, tmp_path / "hf", saved, case.hf)
    assert max(held) <= plan.totals.peak_memory_bytes <= 24 << 10


def test_maxtexts_own_checkpoint(tmp_path: Path) -> None:
    case = CASES["qwen3_moe"]
    saved = DATA / "golden/qwen3_moe/orbax/scan.dev16"
    plan = export_plan(case, saved)
    found, _ = exported(plan, saved, tmp_path / "hf", case)
    assert {k.exactness for k in kinds(plan).values()} == {EXACT}
    assert broken_promises(plan, found, source_tensors(case.hf)) == []
    assert found.keys() == source_tensors(case.hf).keys()


# --- what training leaves behind --------------------------------------------------------------------------------------


def nested(arrays: dict[str, Any], leaf: bool = False) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, last = path.split("/")
        at = tree
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = {"value": array} if leaf else array
    return tree


def trained(case: GoldenCase, dtype: str | None = None, **changes: Any) -> dict[str, Any]:
    arrays = evaluate(compile_case(case, **changes), case.hf)
    return {n: np.asarray(a.astype(dtype) if dtype else a) for n, a in arrays.items()}


def save(directory: Path, tree: Any, **options: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(directory.resolve(), tree)
    return directory


STORED = [
    {"use_ocdbt": True, "use_zarr3": True},
    {"use_ocdbt": True, "use_zarr3": False},
    {"use_ocdbt": False, "use_zarr3": True},
    {"use_ocdbt": False, "use_zarr3": False},
]


@pytest.mark.parametrize("options", STORED, ids=str)
@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_a_train_state_in_float32(options: dict[str, bool], layout: str, tmp_path: Path) -> None:
    """Optimizer state is passed over, the layout is read from the paths, numbers are rounded to the original's
    dtype.
    """
    case = CASES["qwen3_moe"]
    params = trained(case, "float32", layout=layout)
    tree = nested(params)
    moments = nested({f"mu/{n}": a for n, a in params.items()})
    saved = save(
        tmp_path / "3" / "default", {"step": 3, **tree, "opt_state": [moments, {"count": np.int32(3)}]}, **options
    )
    plan = export_plan(case, saved.parents[1])
    assert plan.choices.layout == layout
    assert [x.pattern for x in plan.left_out if x.tensors] == ["opt_state/*"]
    found, _ = exported(plan, saved.parents[1], tmp_path / "hf", case)
    assert {k.exactness for k in kinds(plan).values()} == {EXACT}
    assert broken_promises(plan, found, source_tensors(case.hf)) == []


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_a_checkpoint_that_the_new_interface_saved(layout: str, tmp_path: Path) -> None:
    """A step of Orbax v1, whose custom metadata says what the layout is."""
    case = CASES["llama3_1"]
    tree = {"step": 7, **nested(trained(case, layout=layout)), "opt_state": {}}
    leaves = jax.tree.map(jax.numpy.asarray, tree)
    ocp_v1.save_checkpointables(
        (tmp_path / "7").resolve(), {"items": leaves}, custom_metadata={"scan_layers": layout == "scanned"}
    )
    plan = export_plan(case, tmp_path)
    assert plan.choices.layout == layout
    found, _ = exported(plan, tmp_path, tmp_path / "hf", case)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []


def test_wide_storage_makes_scaled_tensors_exact(tmp_path: Path) -> None:
    """Scaled queries and embeddings stored in float32 come back bit for bit, and the plan knows."""
    case = CASES["gemma2"]
    saved = converted(case, tmp_path / "orbax", layout="scanned", dtype="float32")
    plan = export_plan(case, saved)
    promises = {n: k.exactness for n, k in kinds(plan).items()}
    assert promises["model.embed_tokens.weight"] == promises["model.layers.0.self_attn.q_proj.weight"] == EXACT
    found, _ = exported(plan, saved, tmp_path / "hf", case)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []


def test_an_nnx_tree_with_lists(tmp_path: Path) -> None:
    case = CASES["llama3_1"]
    params = trained(case, layout="unscanned")
    arrays = {n.removeprefix("params/params/").replace("layers_", "layers/"): a for n, a in params.items()}
    tree = {"model": nested(arrays, leaf=True), "optimizer": nested(arrays, leaf=True)}
    saved = save(tmp_path / "items", tree)
    plan = export_plan(case, saved)
    found, _ = exported(plan, saved, tmp_path / "hf", case)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []
    assert [x.pattern for x in plan.left_out if x.tensors] == ["opt_state/*"]


def test_a_vocabulary_that_training_padded_otherwise(tmp_path: Path) -> None:
    """Sizes of padding are the checkpoint's own affair; rows that training changed are counted, not exported."""
    case = CASES["gemma2"]
    params = trained(case, layout="scanned", set={"padded_vocab": 176})
    table = params["params/params/token_embedder/embedding"]
    table[160:163] = 1
    saved = save(tmp_path / "items", nested(params))
    plan = export_plan(case, saved)
    found, report = exported(plan, saved, tmp_path / "hf", case)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []
    vocab = found["model.embed_tokens.weight"].shape[0]
    assert report.warnings == (
        f"3 of the {176 - vocab} rows of padding of `params/params/token_embedder/embedding` carry trained values "
        "(they should be 0): no tensor has a place for them, they are left out",
    )


@pytest.mark.parametrize("option", ["scanned", "unscanned"])
def test_an_option_that_contradicts_the_checkpoint(option: str, tmp_path: Path) -> None:
    case = CASES["qwen3_moe"]
    other = "unscanned" if option == "scanned" else "scanned"
    by_metadata = converted(case, tmp_path / "orbax", layout=other)
    by_paths = save(tmp_path / "items", nested(trained(case, layout=other)))
    for saved, why in ((by_metadata, "its metadata says so"), (by_paths, "its arrays are so")):
        with pytest.raises(InputError) as caught:
            export_plan(case, saved, layout=option)
        (found,) = caught.value.diagnostics
        assert found.code == "layout-mismatch" and why in found.message


def test_missing_and_unknown_arrays_are_named(tmp_path: Path) -> None:
    case = CASES["qwen3_moe"]
    params = trained(case, layout="scanned")
    params["params/params/decoder/final_norm/scale"] = params.pop("params/params/decoder/decoder_norm/scale")
    with pytest.raises(InputError) as caught:
        export_plan(case, save(tmp_path / "items", nested(params)))
    assert [d.code for d in caught.value.diagnostics] == ["missing-array", "unknown-array"]
    assert "decoder_norm/scale" in caught.value.diagnostics[0].message


# --- what is written --------------------------------------------------------------------------------------------------


def test_files_are_what_transformers_writes(tmp_path: Path) -> None:
    case = CASES["qwen3_moe"]
    saved = DATA / "golden/qwen3_moe/orbax/scan.dev16"
    plan = export_plan(case, saved, max_shard=40_000)
    found, _ = exported(plan, saved, tmp_path / "hf", case)
    files = sorted(p.name for p in (tmp_path / "hf").iterdir())
    shards = [n for n in files if n.startswith("model-")]
    assert len(shards) > 2 and files == sorted(["config.json", "model.safetensors.index.json", *shards])
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in found.values())
    for name in shards:
        with safe_open(tmp_path / "hf" / name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert {t for t, f in index["weight_map"].items() if f == name} == set(file.keys())
        assert (tmp_path / "hf" / name).stat().st_size <= 40_000 + 20_000
    assert json.loads((tmp_path / "hf" / "config.json").read_text("utf-8")) == json.loads(
        (case.hf / "config.json").read_text("utf-8")
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EIO, "the disk is gone"), "unwritable-output"),
        (OSError(errno.ENOSPC, "the disk is full"), "disk-full"),
        (MemoryError(), "out-of-memory"),
    ],
)
def test_a_failed_export_leaves_nothing_that_a_reader_takes_for_weights(
    error: Exception, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["qwen3_moe"]
    saved = DATA / "golden/qwen3_moe/orbax/scan.dev16"
    plan = export_plan(case, saved)
    failing = {"after": 0}
    made = Worker._make

    def broken(self: Worker, key: int, unit: Unit, loaded: Callable[[], Loaded]) -> tuple[int, int]:
        if key >= failing["after"]:
            raise error
        return made(self, key, unit, loaded)

    monkeypatch.setattr(Worker, "_make", broken)
    for after in (0, 1):
        failing["after"] = after
        with pytest.raises(InputError) as caught:
            export(plan, tmp_path / "hf", saved, case.hf)
        assert [d.code for d in caught.value.diagnostics] == [code]
        if not after:
            assert not (tmp_path / "hf").exists(), "nothing was done, nothing is kept"
    assert all(name.startswith(".") for name in os.listdir(tmp_path / "hf"))
    monkeypatch.undo()
    found, _ = exported(plan, saved, tmp_path / "hf", case, whole=False)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []
    assert not [name for name in os.listdir(tmp_path / "hf") if name.startswith(".")]


def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["qwen3_moe"]
    saved = DATA / "golden/qwen3_moe/orbax/scan.dev16"
    plan = export_plan(case, saved)
    full = os.statvfs_result((4096, 4096, 1000, 9, 9, 9, 9, 9, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: full)
        with pytest.raises(InputError, match="disk-full"):
            export(plan, tmp_path / "hf", saved, case.hf)
    assert not (tmp_path / "hf").exists()


def test_an_existing_checkpoint_is_replaced_only_when_told(tmp_path: Path) -> None:
    case = CASES["qwen3_moe"]
    saved = DATA / "golden/qwen3_moe/orbax/scan.dev16"
    output = tmp_path / "hf"
    export(export_plan(case, saved, max_shard=40_000), output, saved, case.hf)
    plan = export_plan(case, saved)
    with pytest.raises(InputError) as caught:
        export(plan, output, saved, case.hf)
    assert caught.value.diagnostics[0].code == "output-exists"
    export(plan, output, saved, case.hf, force=True)
    assert sorted(os.listdir(output)) == ["config.json", "model.safetensors"]


def test_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    case = CASES["qwen3_moe"]
    saved = converted(case, tmp_path / "orbax", layout="scanned")
    plan = export_plan(case, saved)
    other = converted(case, tmp_path / "other", layout="scanned", shards=1)
    with pytest.raises(InputError) as caught:
        export(plan, tmp_path / "hf", other, case.hf)
    assert {d.code for d in caught.value.diagnostics} == {"source-changed"}


def test_chunks_larger_than_the_budget_are_refused_with_a_number_that_does(tmp_path: Path) -> None:
    case = CASES["qwen3_moe"]
    saved = DATA / "golden/qwen3_moe/orbax/scan.dev16"
    with pytest.raises(InputError) as caught:
        export_plan(case, saved, memory=4096)
    (found,) = caught.value.diagnostics
    assert found.code == "too-little-memory" and found.help == "use --memory 1MiB"
    export_plan(case, saved, memory=1 << 20)


def test_without_the_original_names_and_config_are_the_mappings(tmp_path: Path) -> None:
    case = CASES["qwen3_moe"]
    config = json.loads((case.hf / "config.json").read_text("utf-8"))
    mapping, _ = spec.find_model(case.model)
    sizes = {
        n: v for n, v in compile_case(case).choices.dims.items() if isinstance(v, int | float) and n in mapping.dims
    }
    saved = DATA / "golden/qwen3_moe/orbax/scan.dev16"
    plan = export_plan(case, saved, original=False, set=sizes)
    assert kinds(plan).keys() == source_tensors(case.hf).keys()
    export(plan, tmp_path / "hf", saved)
    written = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))
    assert written["dtype"] == "bfloat16" and config
    assert any("--config-from" in note for note in plan.notes)


def test_the_section_of_the_text_model_says_the_dtype_whoever_reads_it(tmp_path: Path) -> None:
    """With an index at hand, and without one: of two readers, one looked no deeper than the top of config.json."""
    case = CASES["gemma3"]
    saved = converted(case, tmp_path / "orbax")
    config = json.loads((case.hf / "config.json").read_text("utf-8"))
    for place in (config, config["text_config"]):
        place.pop("torch_dtype", None)
        place.pop("dtype", None)
    config["text_config"]["dtype"] = "float32"
    mapping, model = spec.find_model(case.model)
    found = []
    for name in ("with an index", "without"):
        (directory := tmp_path / name).mkdir()
        (directory / "config.json").write_text(json.dumps(config), "utf-8")
        if name != "without":
            shutil.copy(case.hf / "model.safetensors.index.json", directory)
        plan = compile_export(mapping, model, ExportOptions(), open_saved(saved)[0], open_original(directory))
        found.append({kind.dtype for kind in plan.kinds})
    assert found == [{"float32"}, {"float32"}]
