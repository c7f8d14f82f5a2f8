"""`ckptc.load`: a checkpoint straight into sharded `jax.Array`s, with no checkpoint in between.

For each addressable device the box of its shard is made from the bytes that it needs, by the same loops and the same
arithmetic as a chunk of `ckptc.run`: equal bit for bit. A box that several devices of this process hold is made once. On
CPU devices the memory that was filled is the array's own; on others, a shard's memory goes back once it is transferred.
Every process of a `jax.distributed` job makes the same call; none waits for another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ckptc.api.compilation import find
from ckptc.api.functions import Rules, _mesh, compile
from ckptc.api.like import Like, bare, matched, selected, unlike
from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ops.types import is_float, itemsize
from ckptc.plan.model import Array, Box, Orbax, Plan, tabulated

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, Sharding

    from ckptc.run.work import Progress
    from ckptc.storage.source.base import Source

Devices = Mapping[Any, Box]  # of an array, the box of each device of this process


def _nothing(_: object) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did, in this process."""

    arrays: int
    read_bytes: int  # of the source's files
    made_bytes: int  # of shards; one that several devices hold counts once
    seconds: float


def load(
    plan_or_model: Plan | str,
    source: str | Path | Source | None = None,
    *,
    mesh: Mesh | str | Mapping[str, int] | None = None,
    rules: str | Path | Rules | None = None,
    like: Any = None,
    dtype: str | None = None,
    memory: int | None = None,
    jobs: int | None = None,
    select: Sequence[str] | None = None,
    on_progress: Callable[[Progress], None] = _nothing,
    on_report: Callable[[LoadReport], None] = _nothing,
    **options: Any,
) -> Any:
    """A checkpoint's weights as `jax.Array`s on their devices: a pytree.

    `plan_or_model`: a conversion's plan, or a model's name, which is compiled here. `source`: safetensors files, in a
    directory or on the Hub. `options`: of `ckptc.compile`: `scan`, `mapping`, `set`, `multimodal`, `scan_axis`.

    `like`: a pytree of `jax.ShapeDtypeStruct`s or arrays, an abstract `nnx.State` or `nnx.Module`, a Linen dict or
    `FrozenDict`. What comes back has its structure, shapes, dtypes and shardings. Without it: dicts as the target's tree
    has them. Where `like` says no sharding, and without `like`: sharded over `mesh`, a `jax.sharding.Mesh` or
    `"fsdp=2,tensor=2"` over this program's devices, by `rules` as in `ckptc.compile`; without a mesh, on the first local
    device. `dtype`: of floating arrays, bfloat16 by default. `select`: patterns of paths (`decoder/layers/*`); only those
    are loaded, and other leaves of `like` come back as they are.

    `memory`: bytes of buffers beside the arrays, 512 MiB by default; `jobs`: threads, by default the cores. `on_report` is
    given a `LoadReport`.

    Raises InputError before a byte of weights is read where something does not match: `tree-mismatch`, `leaf-mismatch`,
    `bad-mesh`, and what `ckptc.compile` raises; `source-changed` and what reading raises, later. Nothing half filled is
    ever returned.
    """
    started = time.perf_counter()
    wanted = None if like is None else Like.of(like)
    plan = _plan(plan_or_model, source, wanted, dtype, memory, options)
    chosen = selected(plan, select)
    pairs = matched(wanted, plan, chosen, every=select is None) if wanted else {}
    if wanted:
        plan = _typed(plan, plan_or_model, source, wanted, pairs, memory, options)
    shardings = _shardings(
        plan, chosen, {n: wanted.leaves[at].sharding for at, n in pairs.items()} if wanted else {}, mesh, rules, options
    )
    devices = {n: _devices(plan.arrays[n], s) for n, s in shardings.items()}
    _check(plan, chosen)
    made, read = _make(plan, source, devices, jobs, memory, on_progress)
    arrays = {n: _assembled(plan.arrays[n], s, devices[n], made[n]) for n, s in shardings.items()}
    sizes = (prod(high - low for low, high in box) * itemsize(plan.arrays[n].dtype) for n in made for box in made[n])
    on_report(LoadReport(len(arrays), read, sum(sizes), time.perf_counter() - started))
    if wanted is None:
        return _tree({plan.arrays[n].path: array for n, array in arrays.items()})
    return wanted.fill([arrays[pairs[at]] if at in pairs else leaf.value for at, leaf in enumerate(wanted.leaves)])


def _plan(
    given: Plan | str, source: Any, like: Like | None, dtype: str | None, memory: int | None, options: Mapping[str, Any]
) -> Plan:
    if isinstance(given, Plan):
        if options or dtype is not None:
            name = next(iter(options), "dtype")
            raise fail("unused-option", f"`{name}` decides a plan, and this one is made", help="leave it out")
        if not isinstance(given.layout, Orbax):
            raise fail("unused-option", "an export's plan makes files, not arrays", help="give a conversion's plan")
        return given
    if source is None:
        source = f"hf://{find(given, options.get('mapping'))[1].repo}"
    return compile(given, source, dtype=dtype or _most(like) or "bfloat16", memory=memory, **options)


def _most(like: Like | None) -> str | None:
    """The floating dtype that most bytes of a tree have."""
    sizes: dict[str, int] = {}
    for leaf in like.leaves if like else ():
        if is_float(leaf.dtype):
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + prod(leaf.shape)
    return max(sizes, key=lambda d: sizes[d], default=None)


def _typed(
    plan: Plan, given: Plan | str, source: Any, like: Like, pairs: Mapping[int, int], memory: int | None, options: Any
) -> Plan:
    """The plan whose arrays have the dtypes of `like`. Those that a mapping keeps in one dtype are rounded once more, which
    is once: what they are kept in is wider than what is stored."""
    wanted = {n: like.leaves[at].dtype for at, n in pairs.items()}
    other = {n: d for n, d in wanted.items() if d != plan.arrays[n].dtype}
    problems = []
    for n, d in other.items():
        a = plan.arrays[n]
        if isinstance(given, Plan) or not (is_float(d) and is_float(a.dtype)):
            help = (
                "compile the plan with this dtype"
                if isinstance(given, Plan)
                else "numbers and integers are not one another"
            )
            problems.append(unlike(a, d, a.dtype, help))
    if problems:
        raise InputError(problems)
    if not other:
        return plan
    plans = {d: _plan(given, source, None, d, memory, options) for d in sorted(set(other.values()))}
    arrays = list(plan.arrays)
    for n, d in other.items():
        array = plans[d].arrays[n]
        assert array.name == arrays[n].name and plans[d].tensors == plan.tensors
        arrays[n] = array if array.dtype == d else _cast(array, d)
    kinds, outputs = tabulated(arrays)
    peak = max(p.totals.peak_memory_bytes for p in (plan, *plans.values()))
    return replace(plan, kinds=kinds, outputs=outputs, totals=replace(plan.totals, peak_memory_bytes=peak))


def _cast(array: Array, dtype: str) -> Array:
    parts = tuple(replace(p, math=(*p.math, ("cast", dtype))) for p in array.kind.parts)
    return replace(array, kind=replace(array.kind, dtype=dtype, parts=parts))


def _shardings(
    plan: Plan,
    chosen: Sequence[int],
    given: Mapping[int, Sharding | None],
    mesh: Mesh | str | Mapping[str, int] | None,
    rules: Any,
    options: Mapping[str, Any],
) -> dict[int, Sharding]:
    """Each array's sharding: its own, or by the mesh's rules, or one device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

    from ckptc.compile.mesh import partition

    if mesh is None:
        if rules is not None:
            raise fail("bad-mesh", "rules say how a mesh shards, and there is none", help="give `mesh`")
        one = SingleDeviceSharding(jax.local_devices()[0])
        return {n: given.get(n) or one for n in chosen}
    family = find(plan.made.model, options.get("mapping"))[0]
    sizes: str | Mapping[str, int] = mesh if isinstance(mesh, str | Mapping) else dict(mesh.shape)
    axes, over = _mesh(sizes, rules, family)
    devices = mesh if isinstance(mesh, jax.sharding.Mesh) else _device_mesh(dict(axes))
    out: dict[int, Sharding] = {}
    for n in chosen:
        a = plan.arrays[n]
        spec = partition(a.axes, a.shape, axes, over).spec
        out[n] = given.get(n) or NamedSharding(devices, PartitionSpec(*(names or None for names in spec)))  # type: ignore[no-untyped-call]
    return out


def _device_mesh(sizes: Mapping[str, int]) -> Mesh:
    import jax

    count = prod(sizes.values())
    if count > len(jax.devices()):
        notes = (f"expected: {count} devices", f"found:    {len(jax.devices())}")
        raise fail("bad-mesh", "the mesh has more devices than this program", notes=notes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count])


def _devices(array: Array, sharding: Sharding) -> Devices:
    """The box of each device of this process. Raises `leaf-mismatch` for a sharding that does not fit the array."""
    try:
        indices = sharding.addressable_devices_indices_map(array.shape)
    except ValueError as error:
        raise fail(
            "leaf-mismatch", f"`{'/'.join(bare(array.path))}` cannot be sharded so: {str(error).splitlines()[0]}"
        ) from None
    boxes = {}
    for device, index in indices.items():
        spans = [s.indices(n) for s, n in zip(index or (), array.shape, strict=False)]
        spans += [(0, n, 1) for n in array.shape[len(spans) :]]
        boxes[device] = tuple((low, high) for low, high, _ in spans)
    return boxes


def _check(plan: Plan, chosen: Sequence[int]) -> None:
    """JAX halves wide numbers unless it is told not to."""
    import jax

    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        return
    wide = [plan.arrays[n] for n in chosen if itemsize(plan.arrays[n].dtype) > 4]
    if wide:
        help = 'jax.config.update("jax_enable_x64", True)'
        raise InputError(
            Diagnostic(
                "leaf-mismatch", f"`{'/'.join(bare(a.path))}` is {a.dtype}, which JAX has switched off", None, (), help
            )
            for a in wide
        )


def _make(
    plan: Plan,
    source: Any,
    devices: Mapping[int, Devices],
    jobs: int | None,
    memory: int | None,
    on_progress: Callable[[Progress], None],
) -> tuple[dict[int, dict[Box, dict[Any, jax.Array]]], int]:
    """Of each array and box, what each device holds; and the bytes read."""
    import jax

    from ckptc.ir.source import SourceFile
    from ckptc.run.boxes import Filling, Values
    from ckptc.run.pool import cores
    from ckptc.run.preflight import check_source
    from ckptc.run.readers import Place
    from ckptc.run.runner import find_source
    from ckptc.run.sources import Sighting
    from ckptc.storage.source.base import opened

    found = find_source(plan, opened(source) if isinstance(source, str | Path) else source)
    files = [SourceFile(f.name, f.size, f.header, f.content) for f in plan.sources[0].files]
    seen = Sighting.of(found, files)
    check_source(plan, found, files)
    made: dict[int, dict[Box, dict[Any, jax.Array]]] = {n: {} for n in devices}
    wanted = {n: list(dict.fromkeys(boxes.values())) for n, boxes in devices.items()}
    lock = Lock()

    def place(number: int, box: Box, values: Values) -> None:
        there = [d for d, held in devices[number].items() if held == box]
        first = jax.device_put(values, there[0])
        # One copy from this host; from there, device to device. CPU devices take the same memory.
        arrays = {
            d: first if d is there[0] else jax.device_put(values if d.platform == "cpu" else first, d) for d in there
        }
        if there[0].platform != "cpu":
            jax.block_until_ready(list(arrays.values()))  # type: ignore[no-untyped-call]  # before the memory is given back
        with lock:
            made[number][box] = arrays

    if memory is not None:
        plan = replace(plan, choices=replace(plan.choices, memory=memory))
    read = Filling(plan, Place(found), wanted, place, jobs or cores()).run(on_progress)
    seen.check_undisturbed()
    return made, read


def _assembled(array: Array, sharding: Sharding, devices: Devices, made: Mapping[Box, Mapping[Any, Any]]) -> jax.Array:
    import jax

    return jax.make_array_from_single_device_arrays(array.shape, sharding, [made[box][d] for d, box in devices.items()])


def _tree(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in leaves.items():
        at = out
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = value
    return out
