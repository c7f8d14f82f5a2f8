"""Fuzzing led by coverage: bytes to the parsers of headers, indexes, mappings, expressions and plans, in this process.

    pip install atheris                                      not a dependency: it needs CPython 3.11 or 3.12 on Linux
    python tools/fuzz_coverage.py headers -max_total_time=60 any option of libFuzzer

`tools/fuzz.py` puts lies into valid inputs and runs whole commands. Here nothing is known of the format: atheris keeps
what reaches new code. An input may be refused with a diagnostic; any other exception ends the run, and the input that
caused it is written to `crash-…`. Inputs begin with the valid ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import atheris  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).resolve().parent))

with atheris.instrument_imports(include=["ckptc", "ruamel"]):
    import fuzz_headers
    import fuzz_mappings
    from ckptc.compile.compiler import compile_plan
    from ckptc.compile.options import Options
    from ckptc.diagnostics import InputError
    from ckptc.plan.check import check_plan
    from ckptc.plan.json import dumps, loads
    from ckptc.spec.document import parse
    from ckptc.spec.expressions import ExpressionError, evaluate, render
    from ckptc.spec.mapping import find_model, load_mapping
    from ckptc.storage.formats.json_stream import blocks_of, strict_json
    from ckptc.storage.formats.safetensors import parse_header


def headers(data: bytes) -> None:
    parse_header("model.safetensors", len(data), data)


def indexes(data: bytes) -> None:
    strict_json(blocks_of(data), "index.json", "index", "index.json")


def expressions(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    names = {"layers": 4, "embed": 8, "config": {"a": [1, 2], "b": {"c": None}}, "words": ["x", "y"]}
    for work in (evaluate, render):
        work(text, names)


def documents(data: bytes) -> None:
    parse(data.decode("utf-8", "replace"), "mapping.yaml")


def mappings(data: bytes) -> None:
    place = FOLDER / f"mapping-{os.getpid()}.yaml"
    place.write_bytes(data)
    mapping = load_mapping(place)
    compile_plan(mapping, next(iter(mapping.models.values())), Options())


def plans(data: bytes) -> None:
    check_plan(loads(data, "plan.json"), "plan.json")


# One that is used again: libFuzzer ends the process without a word to Python, and would leave one behind each time.
FOLDER = Path(tempfile.gettempdir(), "ckptc-fuzz-coverage")
TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f for f in (headers, indexes, expressions, documents, mappings, plans)
}


def seeds(target: str) -> Iterable[bytes]:
    """Valid inputs, and those that were once chosen to be hard."""
    if target == "headers":
        for name in fuzz_headers.MODELS:
            for file, content in fuzz_headers.checkpoint(name).items():
                if file.endswith(".safetensors"):
                    yield content[: 8 + int.from_bytes(content[:8], "little")]
    elif target == "expressions":
        yield from (e.encode() for e in (*fuzz_mappings.EXPRESSIONS, *fuzz_mappings.TEMPLATES))
    elif target in ("documents", "mappings"):
        yield fuzz_mappings.TINY.encode()
        yield from (d.encode("utf-8", "surrogatepass") for d in fuzz_mappings.DOCUMENTS if len(d) < 10_000)
    elif target == "plans":
        mapping, model = find_model("gemma2-2b")
        yield dumps(compile_plan(mapping, model, Options())).encode()
    else:
        yield b'{"metadata":{"total_size":4},"weight_map":{"a":"model.safetensors"}}'


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz_coverage.py {{{','.join(TARGETS)}}} [libFuzzer's options]\n\n{__doc__}")
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with suppress(InputError, ExpressionError):
            target(data)

    corpus = FOLDER / target.__name__
    corpus.mkdir(parents=True, exist_ok=True)
    longest = 0
    for number, seed in enumerate(seeds(target.__name__)):
        (corpus / f"seed-{number}").write_bytes(seed)
        longest = max(longest, len(seed))
    atheris.Setup([sys.argv[0], "-timeout=20", f"-max_len={max(4096, 2 * longest)}", *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
