"""A proof's case: one tiny configuration of a model, said to transformers as a config and to the target as settings.

The config is the model's shipped one with small sizes, all different, and with what `mappings/proofs/FAMILY.yaml` says
of things that are no sizes (rotary bases, activations). The target's settings follow from the mapping's dims, which
are evaluated over that config: `mappings/proofs/targets/maxtext.yaml`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptc.compile.compiler import layouts
from ckptc.compile.dims import evaluate_dims
from ckptc.diagnostics import fail
from ckptc.spec.document import load
from ckptc.spec.expressions import ExpressionError, evaluate, names
from ckptc.spec.mapping import Family, Model
from ckptc.spec.resources import shipped_file
from ckptc.spec.schema import check

LAYOUT_WORDS = {"scanned": "scan", "unscanned": "unscan"}


@dataclass(frozen=True)
class Case:
    """What both sides are told."""

    model: str
    class_: str  # in transformers
    config: Mapping[str, Any]  # of that class
    maxtext_model: str  # MaxText's `model_name`
    maxtext: Mapping[str, Any]  # MaxText's other settings
    set: Mapping[str, Any]  # dims, as with --set
    layouts: tuple[str, ...]  # that the target has: scan, unscan
    rename: tuple[tuple[str, str], ...] = ()  # from what `save_pretrained` writes to the Hub's names
    transpose: str = ""  # a pattern of names whose last two axes the Hub has the other way round
    batch: int = 2
    length: int = 32
    note: str = ""  # where the configuration is not the published one
    deviation: str = ""  # how the target's model is known to differ all the same
    sources: tuple[Path, ...] = field(default=(), repr=False)  # files that say so

    @property
    def tokens(self) -> int:
        """Token ids are below this."""
        text = self.config.get("text_config", self.config)
        return min(int(text.get("vocab_size", 150)), 150)

    @property
    def seed(self) -> int:
        return zlib.crc32(self.model.encode())


def proof_data(family: Family, mapping: Path | None) -> tuple[dict[str, Any], Path | None]:
    """What is written down of a family's proofs: `proofs/FAMILY.yaml` beside its file, or the shipped one. Else nothing."""
    name = f"{family.family}.yaml"
    beside = [mapping.parent / "proofs" / name] if mapping else []
    for path in [*beside, shipped_file("proofs", name)]:
        if path.is_file():
            document = load(path)
            check(document, "proof")
            return dict(document.data), path
    return {}, None


def make_case(family: Family, model: Model, mapping: Path | None, source: Mapping[str, Any] | None = None) -> Case:
    """The case of a model. `source`: the config.json of real weights, which is then taken as it is.

    Raises InputError `no-proof-data` where nothing says which class in transformers the model has.
    """
    data, path = proof_data(family, mapping)
    own = data.get("models", {}).get(model.name, {})
    data = {**data, **own, **{key: {**data.get(key, {}), **own.get(key, {})} for key in ("config", "maxtext", "set")}}
    class_ = data.get("class") or next(iter((source or {}).get("architectures", ())), None)
    if class_ is None:
        beside = mapping.parent / "proofs" if mapping else Path("proofs")
        raise fail(
            "no-proof-data",
            f"nothing says which class of transformers `{model.name}` has",
            help=f"write `class: NAME` into {beside / f'{family.family}.yaml'}, with what a tiny configuration needs",
        )
    shared = load(shipped_file("proofs", "targets", "maxtext.yaml")).data
    config = dict(source) if source is not None else tiny(model.config, data["config"], shared["sizes"])
    dims = evaluate_dims(family, model, config, data["set"])
    return Case(
        model=model.name,
        class_=class_,
        config=config,
        maxtext_model=data.get("runs_as", model.name),
        maxtext={**settings(shared["settings"], dims, config), **data["maxtext"]},
        set=data["set"],
        layouts=tuple(data.get("layouts", [LAYOUT_WORDS[name] for name in layouts(family, model)])),
        rename=tuple((a, b) for a, b in data.get("rename", ())),
        transpose=data.get("transpose", ""),
        length=data.get("length", 32),
        note=data.get("note", ""),
        deviation=data.get("deviation", ""),
        sources=(path,) if path else (),
    )


def tiny(shipped: Mapping[str, Any], own: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The shipped config with small sizes where it has sizes, and what the family says of itself on top; null removes.

    A text model within a larger one (`text_config`) gets the sizes there.
    """
    nested = "text_config" in shipped or "text_config" in own
    inner = dict(shipped.get("text_config", {})) if nested else dict(shipped)
    always = sizes["always"]
    small = {key: value for key, value in {**always, **sizes["present"]}.items() if key in always or key in inner}
    inner |= small
    said = dict(own.get("text_config", {})) if nested else dict(own)
    inner = {key: value for key, value in {**inner, **said}.items() if value is not None or key in KEEP_NULL}
    if not nested:
        return inner
    outer = {key: value for key, value in shipped.items() if not key.endswith("_config")}
    return {**outer, **{key: value for key, value in own.items() if key != "text_config"}, "text_config": inner}


KEEP_NULL = ("sliding_window", "rope_parameters", "q_lora_rank")  # where null means that the model has none


def settings(table: Mapping[str, Any], dims: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The target's settings: each an expression over dims and config, left out where the model has no such thing."""
    text = config.get("text_config", config)
    known = {**dims, "config": config, "text": text}
    out: dict[str, Any] = {}
    for name, written in table.items():
        for expression in written if isinstance(written, list) else [written]:
            if not names(expression) <= known.keys():
                continue
            try:
                value = evaluate(expression, known)
            except ExpressionError:  # a key that this model's config does not have
                continue
            if value is not None:
                out[name] = str(value).lower() if isinstance(value, bool) else value
                break
    return out
