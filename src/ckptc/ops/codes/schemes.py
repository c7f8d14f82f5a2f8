"""What `quantization_config` says that several codes need, and what of it none of them may guess.

Keys are those of compressed-tensors 0.20 (`config_groups`, `targets`, `weights`) and of transformers' configurations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckptc.ops.codes.base import RefusedError

ROTATIONS = ("transform_config", "rotation", "rotation_config", "spin_config", "online_rotation")
BITS = (8, 4, 2)  # of whole numbers: those that fill bytes


def check(config: Mapping[str, Any]) -> None:
    """Raises RefusedError for what changes weights in ways that no code here undoes."""
    for key in ROTATIONS:
        if config.get(key):
            raise RefusedError(key, "rotates weights; what they were before is not in the tensors alone")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") not in ("dense", None):
        raise RefusedError("sparsity_config.format", f"is {sparsity['format']!r}: sparse tensors are not read")
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        raise RefusedError("load_in_8bit", "is true: of bitsandbytes, four bits are read")


def weights(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The `weights` of the group of `config_groups` that a module is of. Raises RefusedError where there is none."""
    groups = config.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    named = [g for g in found if any(_names(str(t), module) for t in g.get("targets") or ())]
    among = named or [g for g in found if "Linear" in (g.get("targets") or ())]
    for group in among:
        if isinstance(scheme := group.get("weights"), Mapping):
            return scheme
    raise RefusedError("config_groups", f"has no group with `weights` for the module {module}")


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], module) is not None
        except re.error:
            raise RefusedError("targets", f"has {target!r}, which is no regular expression") from None
    return target == module


def integer_bits(scheme: Mapping[str, Any]) -> int:
    """How many bits a whole number has. Raises RefusedError for other numbers than those that fill bytes."""
    if scheme.get("type", "int") != "int":
        raise RefusedError("type", f"is {scheme['type']!r} where the tensors hold whole numbers")
    return bits(scheme, "num_bits")


def bits(config: Mapping[str, Any], key: str) -> int:
    """As `integer_bits`, of that key."""
    found = config.get(key)
    if found not in BITS or isinstance(found, bool):
        raise RefusedError(key, f"is {found!r}: whole numbers of {', '.join(map(str, BITS))} bits are read")
    return int(found)


def group_size(scheme: Mapping[str, Any]) -> int:
    """Elements of a group. Raises RefusedError where it is no number of elements."""
    found = scheme.get("group_size")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise RefusedError("group_size", f"is {found!r} where there is a scale for each group")
    return found


def method(config: Mapping[str, Any]) -> str:
    """What `quant_method` says; "" where it says nothing."""
    return str(config.get("quant_method") or "")
