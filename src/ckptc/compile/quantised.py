"""quantised: which tensors of a checkpoint are codes, and of which weights. What rules then see are plain weights.

Before: `X.weight_packed` int32, `X.weight_scale` bfloat16, and a `quantization_config` in config.json.
After: a weight `X.weight`, decoded by a code (`ckptc.ops.codes`) from these two. A mapping says nothing of it.

The headers decide which weights are codes, by the names of their tensors; `quantization_config` says what the headers
cannot, such as the size of groups.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from ckptc.compile.scope import matches
from ckptc.diagnostics import InputError, fail
from ckptc.ir.saved import Original
from ckptc.ir.source import SourceTensor
from ckptc.ops.codes import CODES, Code, Found, OpError, RefusedError, Upload
from ckptc.ops.codes.schemes import check

KEY = "quantization_config"
# Scales of what a model computes on the way, by the ends of their names: they say nothing of weights.
ACTIVATIONS = (
    "input_scale", "input_global_scale", "input_zero_point", "output_scale", "activation_scale", "k_scale", "v_scale",
    "q_scale", "prob_output_scale", "kv_cache_scale",
)  # fmt: skip
REASON = "scales of activations, or shapes; the weights are decoded without them"


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that is stored as codes."""

    code: Code
    stored: str  # the tensor of codes
    beside: tuple[str, ...]  # in the order of the code's layout


@dataclass
class Quantised:
    """The weights that are stored as codes, by their logical names."""

    weights: dict[str, Weight] = field(default_factory=dict)
    logical: dict[str, str] = field(default_factory=dict)  # of each stored tensor of such a weight
    unused: tuple[str, ...] = ()  # tensors beside them that nothing needs

    def describe(self) -> list[tuple[str, int]]:
        """Each code as people say it, and how many weights are stored so."""
        found: defaultdict[str, int] = defaultdict(int)
        for weight in self.weights.values():
            found[weight.code.describe()] += 1
        return sorted(found.items())

    def ignored(self, name: str, patterns: tuple[str, ...]) -> bool:
        """Whether one of the patterns fits a stored tensor, or the weight that it is of."""
        return matches(name, *patterns) or (name in self.logical and matches(self.logical[name], *patterns))


def find(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> Quantised:
    """What of a checkpoint is stored as codes. Raises InputError `unsupported-quantization`, naming the key."""
    settings = quantization_of(config)
    out, unused, known = Quantised(), [], dict[object, Code | None]()
    try:
        check(settings)
        for name, tensor in tensors.items():
            for code, upload in _uploads(tensor.dtype):
                if (weight := _weight(code, upload, name, tensors, settings, known)) is None:
                    continue
                stem = name.removesuffix(upload.codes)
                logical = stem + upload.weight
                out.weights[logical] = weight
                out.logical |= dict.fromkeys((name, *weight.beside), logical)
                unused += [n for suffix in upload.unused if (n := stem + suffix) in tensors]
                break
    except RefusedError as error:
        raise _refused(error, settings) from None
    if settings and not out.weights:
        _check_method(settings)
    if out.weights or settings:
        unused += [n for n in tensors if n.rpartition(".")[2] in ACTIVATIONS]
    out.unused = tuple(unused)
    out.logical |= {n: n.rpartition(".")[0] + ".weight" for n in unused if n not in out.logical}
    return out


def plain(original: Original | None) -> tuple[Original | None, list[tuple[str, int]]]:
    """The original with the weights that it stores as codes as if they were numbers, and how many are stored as what.

    Its weights are written in bfloat16 then; float32 stays float32. Names and dtypes decide: nothing is decoded.
    """
    if original is None or not original.dtypes:
        return original, []
    dtypes, method = original.dtypes, str(quantization_of(original.config).get("quant_method") or "")
    logical, codes = dict[str, str](), set[str]()  # the code of each weight, and the tensors that it is stored in
    for name, dtype in dtypes.items():
        for code, upload in _uploads(dtype):
            stem = name.removesuffix(upload.codes)
            stored = {name, *(stem + suffix for suffix in upload.beside.values())}
            if name.endswith(upload.codes) and stored <= dtypes.keys() and (not method or method in code.methods):
                logical[stem + upload.weight] = code.name
                codes |= stored
                break
    if not logical:
        return original, []
    known = {n: "bfloat16" if d == "float16" else d for n, d in dtypes.items() if n not in codes}
    counts = sorted(Counter(logical.values()).items())
    return replace(original, dtypes={**known, **dict.fromkeys(logical, "bfloat16")}), counts


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json, or its section of the text model, says of quantisation; empty where it says nothing."""
    section = config.get("text_config")
    for place in (config, section if isinstance(section, Mapping) else {}):
        for key in (KEY, "compression_config"):
            if isinstance(found := place.get(key), Mapping):
                return found
    return {}


@cache
def _uploads(dtype: str) -> tuple[tuple[type[Code], Upload], ...]:
    """The forms of upload whose codes may have this dtype, those of the most tensors first."""
    forms = [(code, upload) for code in CODES.values() if dtype in code.dtypes for upload in code.uploads]
    return tuple(sorted(forms, key=lambda form: -len(form[1].beside)))


def _weight(
    kind: type[Code],
    upload: Upload,
    name: str,
    tensors: Mapping[str, SourceTensor],
    config: Mapping[str, Any],
    known: dict[object, Code | None],
) -> Weight | None:
    """The weight whose codes are the tensor of this name, if what stands beside it is as this upload has it."""
    if not name.endswith(upload.codes):
        return None
    stem = name.removesuffix(upload.codes)
    beside = {role: stem + suffix for role, suffix in upload.beside.items()}
    if any(n not in tensors for n in beside.values()):
        return None
    found = {role: Found(tensors[n].dtype, tensors[n].shape) for role, n in {"": name, **beside}.items()}
    # Modules of one kind have equal headers; which group of the configuration is theirs, the name may say.
    module = stem.removesuffix(".weight")
    key = (kind, tuple(found.items()), module if config.get("config_groups") and _by_name(config) else None)
    if key not in known:
        try:
            known[key] = kind.read(config, module, found)
        except (OpError, ValueError, IndexError, ZeroDivisionError) as error:
            if isinstance(error, RefusedError):
                raise
            raise fail(
                "unsupported-quantization",
                f"`{name}` {found[''].dtype}{list(found[''].shape)} is none of {kind.name}: {error}",
                notes=tuple(f"beside it: `{n}` {tensors[n].dtype}{list(tensors[n].shape)}" for n in beside.values()),
            ) from None
    code = known[key]
    return None if code is None else Weight(code, name, tuple(beside.values()))


def _by_name(config: Mapping[str, Any]) -> bool:
    groups = config["config_groups"]
    return not isinstance(groups, Mapping) or len(groups) > 1


def _check_method(config: Mapping[str, Any]) -> None:
    """Nothing is stored as codes, as far as is known here: fine where that may be, an error for unknown methods."""
    method = str(config.get("quant_method") or "")
    if method and method not in METHODS:
        raise _refused(RefusedError("quant_method", f"is {method!r}: {', '.join(METHODS)} are read"), config)


METHODS = tuple(sorted({method for code in CODES.values() for method in code.methods}))


def _refused(error: RefusedError, config: Mapping[str, Any]) -> InputError:
    return fail(
        "unsupported-quantization",
        f"{KEY}: {error}",
        notes=(f"quant_method: {config.get('quant_method')}",) if config.get("quant_method") else (),
        help="convert an upload in bfloat16, or dequantise this one with the library that wrote it",
    )
