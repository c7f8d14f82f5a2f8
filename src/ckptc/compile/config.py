"""config: the config.json beside exported tensors: the original's, but for what the tensors no longer are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptc.ir.source import DTYPE_KEYS, PLAIN, stated_dtype
from ckptc.spec.mapping import Family

QUANTIZATION = ("quantization_config", "compression_config", "expert_dtype")  # the last: DeepSeek V4's fp4 experts


def adapt(
    config: Mapping[str, Any],
    mapping: Family,
    dims: Mapping[str, Any],
    cut: Mapping[str, tuple[int, int]],
    dtype: str,
    whole: bool,
    codes: bool,
    cast: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """The config, and what was changed, for people.

    `cut`: dims of which tensors have less than the original: (was, is). `dtype`: of most tensors. `whole`: whether
    `config` is an original's; else it is the numbers that a mapping ships. `codes`: whether tensors are quantised.
    `cast`: whether every floating tensor is of that dtype, whatever the original's was.
    """
    out, notes = _without(config, () if codes else QUANTIZATION)
    if notes:
        notes = [
            "the tensors are plain numbers: config.json is written without " + " and ".join(f"`{n}`" for n in notes)
        ]
    for name, (was, now) in cut.items():
        path = config_path(mapping, dims, config, name)
        if path is not None and _at(out, path) in (was, None):
            _set(out, path, now)
            notes.append(f"config.json says {'.'.join(path)}={now}, the rows there are; the original had {was}")
        else:
            notes.append(f"the config must say that `{name}` is {now}, no longer {was}")
    stated = stated_dtype(config)
    for place, before in _set_dtype(out, dtype, lambda found: cast or found == stated):
        notes.append(f"config.json says {place}={dtype}; the original had {before}")
    if not whole and not any(key in out for key in DTYPE_KEYS):
        out["dtype"] = dtype
    if not whole:
        notes.append(
            "config.json holds the model's numbers alone; `--config-from ORIGINAL` writes all of the original's"
        )
    return out, notes


def _set_dtype(
    config: dict[str, Any], dtype: str, wanted: Callable[[str], bool], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Sets what the config and its sections say of the dtype of their tensors; yields where they said another, and
    which.
    """
    for key, value in config.items():
        if key in DTYPE_KEYS and value in PLAIN and value != dtype and wanted(value):
            config[key] = dtype
            yield ".".join((*prefix, key)), value
        elif isinstance(value, dict) and key not in QUANTIZATION:
            yield from _set_dtype(value, dtype, wanted, (*prefix, key))


def _without(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """A copy without the entries of these names, at any depth, and the names of those there were."""
    out: dict[str, Any] = {}
    found = []
    for key, value in config.items():
        if key in keys:
            found.append(key)
        elif isinstance(value, Mapping):
            out[key], inner = _without(value, keys)
            found += inner
        else:
            out[key] = value
    return out, list(dict.fromkeys(found))


def config_path(
    mapping: Family, dims: Mapping[str, Any], config: Mapping[str, Any], name: str
) -> tuple[str, ...] | None:
    """Where in the config a dim's number stands: `config.text_config.vocab_size`, or a key of a dim that is a
    section.
    """
    match = re.match(r"\s*(\w+)((?:\.\w+)+)\s*(?:\||$)", str(mapping.dims.get(name, "")))
    if match is None:
        return None
    keys = tuple(match[2].split(".")[1:])
    if match[1] == "config":
        return keys
    section = dims.get(match[1])
    prefix = _find(config, section) if isinstance(section, Mapping) else None
    return None if prefix is None else (*prefix, *keys)


def _find(config: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[str, ...] | None:
    if config is section:
        return ()
    for key, value in config.items():
        if isinstance(value, Mapping) and (inner := _find(value, section)) is not None:
            return (key, *inner)
    return None


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _set(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value
