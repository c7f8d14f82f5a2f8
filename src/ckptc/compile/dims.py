"""The sizes of a model: dims from the mapping, evaluated over the checkpoint's config.json and what the user set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, Span, did_you_mean
from ckptc.spec.expressions import ExpressionError, evaluate, names
from ckptc.spec.mapping import Family, Model, Value


def evaluate_dims(
    mapping: Family, model: Model | None, config: Mapping[str, Any], given: Mapping[str, Value]
) -> dict[str, Any]:
    """Every dim by name. `given` (from `--set`) wins over the model's `set`, which wins over the mapping.

    Raises InputError with every problem: `unknown-dim`, `missing-config` (a key the checkpoint's config lacks),
    `invalid-expression`, `circular-dims`.
    """
    return _Dims(mapping, model, config, given).all()


class _Dims:
    def __init__(self, mapping: Family, model: Model | None, config: Mapping[str, Any], given: Mapping[str, Value]):
        document = mapping.document
        self.config, self.given, self.problems = config, given, list[Diagnostic]()
        self.values: dict[str, Any] = {}
        self.failed: set[str] = set()
        self.written: dict[str, Value] = dict(mapping.dims)
        self.spans: dict[str, Span | None] = {n: document.span(("dims", n)) for n in mapping.dims}
        for name, value in (model.set if model else {}).items():
            where = document.key_span((*model.where, "set", name)) if model else None
            self._override(name, value, where, f"there is no dim `{name}`")
        for name, value in given.items():
            self._override(name, value, None, f"`--set {name}`: there is no dim `{name}` in {document.name}")

    def _override(self, name: str, value: Value, span: Span | None, complaint: str) -> None:
        if name not in self.written:
            known = f"dims: {', '.join(self.written)}"
            self.problems.append(Diagnostic("unknown-dim", complaint, span, (known,), did_you_mean(name, self.written)))
        self.written[name], self.spans[name] = value, span

    def all(self) -> dict[str, Any]:
        for name in self.written:
            self._resolve(name, ())
        for name, value in self.values.items():
            sized = isinstance(value, int | float | str | list | Mapping)  # a mapping is a section of the config
            if name in self.given and value == 0 and not isinstance(value, bool):
                self._complain("invalid-expression", name, f"is {value!r}, and a size is above 0")
                continue
            wrong = not sized or (isinstance(value, float) and value != value)
            if wrong or (isinstance(value, int | float) and value < 0):
                self._complain("invalid-expression", name, f"is {value!r}, not a size, number or name")
        if self.problems:
            raise InputError(self.problems)
        return self.values

    def _resolve(self, name: str, chain: tuple[str, ...]) -> None:
        if name in self.values or name in self.failed:
            return
        if name in chain:
            cycle = chain[chain.index(name) :]
            self.failed.update(cycle)
            self._complain("circular-dims", name, "needs itself: " + " -> ".join((*cycle, name)))
            return
        value = self.written[name]
        if not isinstance(value, str):
            self.values[name] = value
            return
        try:
            needed = names(value) & self.written.keys()
            for other in sorted(needed):
                self._resolve(other, (*chain, name))
            if needed & self.failed:
                self.failed.add(name)
            elif name not in self.failed:
                self.values[name] = evaluate(value, {**{n: self.values[n] for n in needed}, "config": self.config})
        except ExpressionError as error:
            self.failed.add(name)
            missing = "no key" in str(error)
            self._complain(
                "missing-config" if missing else "invalid-expression",
                name,
                f"cannot be computed: {error}",
                value,
            )

    def _complain(self, code: str, name: str, what: str, expression: str | None = None) -> None:
        span = self.spans[name]
        given = "" if span else f"`--set {name}`: "
        self.problems.append(
            Diagnostic(
                code,
                f"{given}dim `{name}` {what}",
                span,
                (f"expression: {expression}",) if expression else (),
                f"give it with `--set {name}=VALUE`" if code == "missing-config" else None,
            )
        )
