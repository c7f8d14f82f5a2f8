"""What is compiled: a named model, and the two steps of compiling an export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ckptc.diagnostics import fail
from ckptc.plan.model import Plan, Safetensors

if TYPE_CHECKING:
    from ckptc.spec.mapping import Family, Model
    from ckptc.storage.checkpoint.orbax_index import PlainIndex
    from ckptc.storage.source.base import Source

EXPORT_MEMORY = 1 << 30  # bytes of buffers
SHARD = 5 * 10**9  # bytes of tensors in a file

Value = str | int | float | bool


def _nothing(_: object) -> None: ...


def find(model: str, mapping: str | Path | None = None, target: str = "maxtext") -> tuple[Family, Model]:
    """A named model and its family, of a mapping's file or of the shipped ones. Raises InputError `unknown-model`."""
    from ckptc.spec.mapping import find_model, load_mapping

    return find_model(model, (load_mapping(Path(mapping), target=target),) if mapping else None, target)


class ExportCompilation:
    """The compilation of an export. A context manager: what the checkpoint's metadata says is read from the beginning on,
    by a process of its own where this one can be forked, while this one loads what else it needs."""

    def __init__(self, source: str | Path, chunks: bool = False) -> None:
        """`chunks`: whether to list where they lie, too, which only a run needs."""
        from ckptc.storage.forked_call import ForkedCall

        self.source = Path(source)
        self.plain: PlainIndex | None = None  # where chunks lie, once compiled
        self.companions: Path | None = None  # the directory with the original's files, once compiled

        def read() -> list[Any]:
            from ckptc.storage.checkpoint.orbax_reader import list_plain, open_saved

            saved, step = open_saved(self.source)
            return [saved.record(), list_plain(step.items).record() if chunks else None, str(step.items), step.said]

        self._work = ForkedCall(read)

    def plan(
        self,
        model: str | None = None,
        *,
        mapping: str | Path | None = None,
        config_from: str | Path | None = None,
        fill_from: str | Path | None = None,
        scan: bool | None = None,
        dtype: str | None = None,
        multimodal: bool = False,
        set: Mapping[str, Value] | None = None,
        scan_axis: int | None = None,
        memory: int | None = None,
        max_shard_size: int = SHARD,
        on_step: Callable[[str], None] = _nothing,
    ) -> Plan:
        """As `compile_export`; may be called once. `on_step`: told which of several steps is read."""
        from ckptc.compile.export import compile_export
        from ckptc.compile.reading import ExportOptions
        from ckptc.ir.saved import Saved
        from ckptc.run.export import companions_digest
        from ckptc.storage.checkpoint.companions import find_original, open_original
        from ckptc.storage.checkpoint.orbax_index import PlainIndex
        from ckptc.storage.checkpoint.safetensors import open_checkpoint
        from ckptc.storage.source.remembered import remember

        if model:
            find(model, mapping)  # before anything is waited for
        record, chunks, items, said = self._work.result()
        on_step(said)
        saved = Saved.of(record)
        self.plain = None if chunks is None else PlainIndex.of(chunks)
        noted = saved.converted
        family, named = find(model or _noted_model(noted.get("model"), self.source), mapping)
        directory = find_original(Path(config_from)) if config_from else _kept(Path(items))
        original = open_original(directory, noted.get("dims")) if directory else None
        options = ExportOptions(
            dtype=dtype,
            multimodal=multimodal or (family.multimodal and noted.get("multimodal") is True),
            set=dict(set or {}),
            layout=None if scan is None else "scanned" if scan else "unscanned",
            scan_axis=scan_axis,
            memory=memory or EXPORT_MEMORY,
            max_shard=max_shard_size,
        )
        filling = _filling(fill_from, directory)
        plan = compile_export(family, named, options, saved, original, open_checkpoint(filling) if filling else None)
        remember(plan.source or "", Path(items))
        if filling is not None and filling.local is not None and len(plan.sources) > 1:
            remember(plan.sources[1].digest or "", filling.local)
        assert isinstance(plan.layout, Safetensors)
        if plan.layout.companions and directory:
            remember(companions_digest(plan.layout), directory)
        self.companions = directory
        return plan

    def __enter__(self) -> ExportCompilation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.__exit__(kind, error, trace)


def _noted_model(noted: object, source: Path) -> str:
    """The model that a checkpoint says it is of. Raises `no-model`."""
    if not isinstance(noted, str):
        help = "say it with `--model NAME`; `ckptc models` lists them"
        raise fail("no-model", f"{source} does not say which model it is of", help=help)
    return noted


def _filling(given: str | Path | None, original: Path | None) -> Source | None:
    """What tensors are copied from that the target has no place for: the source that was given, else the original where
    its weights are at hand."""
    from ckptc.storage.source.base import as_source, opened

    if given is not None:
        return opened(given)
    return as_source(original) if original is not None and any(original.glob("*.safetensors")) else None


def _kept(items: Path) -> Path | None:
    """The original's files that a conversion has kept in its checkpoint, if it has."""
    from ckptc.storage.checkpoint.companions import KEPT
    from ckptc.storage.checkpoint.safetensors import CONFIG

    kept = items / KEPT
    return kept if (kept / CONFIG).is_file() else None
