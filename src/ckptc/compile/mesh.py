"""mesh: how each array lies on the device mesh it will be used on, from its logical axes and the rules for them.

Before: axes (embed, layers, mlp), mesh fsdp=16, tensor=4. After: partition (fsdp,), (), (tensor,): shards 16, 1, 4.

The semantics are those of flax (`logical_to_mesh_axes` of flax.linen.spmd) and of MaxText, which removes mesh axes of
size 1 from the result. A mesh axis that does not divide an array's axis does not shard it here, as MaxText itself has
it for scales of quantised weights (`adjust_pspec_for_indivisible_shapes`); of such a parameter JAX makes no array that
is sharded, so the plan keeps what was left out and its summary says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ckptc.diagnostics import did_you_mean, fail
from ckptc.spec.target import Axes, Rules

Mesh = tuple[tuple[str, int], ...]  # axes and their sizes, in the order of the devices
Spec = tuple[tuple[str, ...], ...]  # of each axis of an array, the mesh axes that shard it

DEVICES_MOST = 1 << 14  # the metadata of each array lists them all
_HELP = "write it as `--mesh fsdp=16,tensor=4`"


def read_mesh(text: str, axes: Sequence[str]) -> Mesh:
    """The mesh of `fsdp=16,tensor=4`, in the order of `axes`, the names there may be, and of MaxText's own mesh.

    Raises InputError `bad-mesh`.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, equals, size = (part.strip() for part in item.partition("="))
        if not (name and equals and re.fullmatch(r"[0-9]{1,9}", size)):
            raise fail("bad-mesh", f"`{item}` in --mesh is not an axis and its size", help=_HELP)
        if name not in axes:
            known = f"axes of the mesh: {', '.join(axes)}"
            raise fail(
                "bad-mesh", f"the mesh cannot have an axis `{name}`", notes=(known,), help=did_you_mean(name, axes)
            )
        if name in sizes:
            raise fail("bad-mesh", f"--mesh has the axis `{name}` twice", help=_HELP)
        if not int(size):
            raise fail("bad-mesh", f"the axis `{name}` of --mesh has no devices", help="the least size of an axis is 1")
        sizes[name] = int(size)
    if prod(sizes.values()) > DEVICES_MOST:
        raise fail(
            "bad-mesh", f"--mesh has {prod(sizes.values())} devices", notes=(f"expected: {DEVICES_MOST} at most",)
        )
    return tuple((name, sizes[name]) for name in axes if name in sizes)


@dataclass(frozen=True, slots=True)
class Partition:
    """How an array is sharded."""

    spec: Spec  # empty where the array's axes are not known: each device has all of it
    indivisible: Spec  # mesh axes that the rules name besides, and that do not divide

    def shards(self, mesh: Mesh, rank: int) -> tuple[int, ...]:
        """Shards along each axis."""
        sizes = dict(mesh)
        return tuple(prod(sizes[name] for name in over) for over in self.spec) if self.spec else (1,) * rank


def partition(axes: Axes, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> Partition:
    """How an array of these logical axes is sharded over the mesh.

    A logical axis takes the first of its rules whose mesh axes are all free: not taken by another axis of the array.
    """
    taken: set[str] = set()
    over: dict[int, tuple[str, ...]] = {}
    for logical, names in rules:
        if logical in axes and (at := axes.index(logical)) not in over and taken.isdisjoint(names):
            over[at] = names
            taken.update(names)
    sizes = dict(mesh)
    spec, left = [], []
    for at, size in enumerate(shape[: len(axes)]):
        there = [name for name in over.get(at, ()) if sizes.get(name, 1) > 1]
        fitting: list[str] = []
        for name in there:
            if size % (prod(sizes[n] for n in fitting) * sizes[name]) == 0:
                fitting.append(name)
        spec.append(tuple(fitting))
        left.append(tuple(name for name in there if name not in fitting))
    return Partition(tuple(spec), tuple(left))
