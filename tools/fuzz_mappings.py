"""Mappings that lie: values of other types, expressions that reach out or run long, loops that never end, deep and huge YAML."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fuzz_values import Case, changed, dumps, get, hostile, places, put, shake, torn

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("gemma2", "llama3.1", "qwen3-moe", "mixtral", "gpt-oss", "gemma3", "tiny")
TINY = """\
family: tiny
title: Two matrices
target: maxtext
dims:
  layers: config.num_hidden_layers
  embed: config.hidden_size
  mlp: config.intermediate_size
  vocab: config.vocab_size
  padded_vocab: round_up(vocab, 8)
models:
  tiny: { repo: example/tiny, config: { num_hidden_layers: 2, hidden_size: 4, intermediate_size: 6, vocab_size: 8 } }
  tiny-tied: { repo: example/tiny-tied, like: tiny }
tensors:
  token_embedder/embedding: { from: model.embed.weight, as: vocab embed, ops: [{ pad: { vocab: padded_vocab } }] }
blocks:
  decoder:
    source: model.layers.{{ layer }}
    scanned: [{ at: decoder/layers, stack: { layer: layers } }]
    unscanned: [{ at: "decoder/layers_{{ layer }}", for: { layer: layers } }]
    tensors:
      mlp/wo/kernel: { from: down.weight, as: embed mlp -> mlp embed }
      mlp/{{ w }}/kernel: { for: { w: { wi_0: gate, wi_1: up } }, from: "{{ w.value }}.weight", as: "mlp embed -> embed mlp" }
ignore:
  - { source: "*.inv_freq", reason: recomputed by the target }
"""
EXPRESSIONS = (
    "1e400",  # first: to --set it is a usage error
    "range(10**9)", "range(99999)", "9**9**9", "10**17", "-1", "0", "layers * 10**6", "layers / 0", "0.5", "layers % 0",
    "().__class__.__mro__", "config.__class__", "config.items()", "''.join", "range(5).__len__()", "self", "cycler(1)", "lipsum()",
    "[range(99999)] * 99", "'x' * 10**9", "'%1000000000d' % 1", "(" * 400 + "1" + ")" * 400, "-" * 1900 + "1", "1+" * 900 + "1",
    "[" * 90 + "]" * 90, "x if x else y", "max([])", "min(range(99999))", "len(range(10**10))", "int('9' * 5000)", "sqrt(-1)",
    "round_up(1, 0)", "ceil_div(1, 0)", "config['a']['b']", "config.x | default(range)", "a | map('x')", "1 is defined", "bfloat16('nan')",
    "layers + layers", "embed", "vocab", "[1, 2, 3]", "'text'", "true", "none", "config", "range(3)", "[[]]", "(1, 2)", "'a' + 'b'",
    "sum(range(99999))", "range(range(3))", "loop", "namespace()", "max(range(99999), range(99999))", "int(1e18) * 9", "\"{{ 1 }}\"",
    "[x for x in y]", "lambda: 1", "caller()", "not not not layers", "layers == layers == layers", "1 < 2 < 3", "1 // 0.0", "float32(1e39)",
)  # fmt: skip
TEMPLATES = (
    "{{ layer }}{{ layer }}{{ layer }}", "{% for x in range(9**9) %}x{% endfor %}", "{{ range(9) }}", "{{", "}}", "{{ }}", "{# x", "{{ 'x' * 99 }}",
    "{{ layers }}", "{{ unknown }}", "{{ layer.value }}", "{{ layer.__class__ }}", "../../{{ layer }}", "{{ config }}", "{{ '{{ layer }}' }}",
    "{{ 1.5 }}", "a" * 3000, "{{ (" + "(" * 100, "*", "**", "[a-z]*", "a/b//c", "/", "", " ", "\t", "{{ layer }}" * 300,
)  # fmt: skip
PATTERNS = (
    "a b -> b a", "(a b) c -> a b c", "((a b) c) d", "a a -> a", "a -> b", "->", "a ->", "()", "( )", "1", "1 1 1", "a b c d e f g h i j k l m",
    "embed embed", "vocab embed -> embed", "(vocab embed) -> vocab embed", "x" * 2500, "a " * 900, "é", "embed ... -> ...", "embed=4", "_ _", "(" * 100,
    "vocab embed -> (vocab embed)", "vocab embed -> vocab embed layer", "2 embed -> embed 2", "0 embed", "-1", "vocab  embed",
)  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=False)
)
DOCUMENTS = (
    BOMB, "a: &a [*a]\n", "{" * 3000, "[" * 3000 + "]" * 3000, "- " * 2000 + "x", "? " * 2000 + "x", "a: " * 500, "", "null", "[]", "just text", "---\n---\n",
    "a: !!python/object/apply:os.system [id]\n", "%YAML 1.1\n---\na: yes\n", "a: 1\na: 2\n", "\0", "\t", "a: |\n" + " x\n" * 9000, "x" * 260_000,
    "<<: {a: b}\n", "a: 0o" + "7" * 4000, "a: 1:" + "59:" * 1000, "? [a]\n: b\n", "a: 2001-01-01", "a: " + "9" * 5000, "a: .nan", "a: 'unclosed", "a: \"\\ud800\"",  # noqa: E501
    "".join(f"k{n}: {n}\n" for n in range(9000)), "&a " * 1000, "!" * 1000, "*x", "a: >\n\n" + "\n" * 50_000, "{" + "a: {" * 60 + "}" * 61,
)  # fmt: skip


def mutator(base: Path) -> Callable[[random.Random], Case]:
    return make


@cache
def text_of(family: str) -> str:
    return TINY if family == "tiny" else (ROOT / "mappings" / f"{family}.yaml").read_text("utf-8")


@cache
def _data(family: str) -> str:
    """The mapping as JSON text, which is YAML."""
    from ckptc.spec.document import parse

    return json.dumps(parse(text_of(family), family).data)


def make(rng: random.Random) -> Case:
    family = rng.choices(FAMILIES, (2, 2, 2, 1, 1, 1, 8))[0]
    case = Case([], {})
    data: dict[str, Any] = json.loads(_data(family))
    models = list(data["models"])[:2]  # the largest of a family take seconds, broken or not
    if rng.random() < 0.35:
        text, what = _text(rng, text_of(family).encode())
        case.lies.append(what)
    else:
        for _ in range(rng.choice((1, 1, 2, 3))):
            case.lies.append(_value(rng, data))
        text = dumps(data)
    case.files = {"mapping.yaml": text}
    model = rng.choice(models)
    if rng.random() < 0.05:
        case.argv = ["models", *rng.choice(([], [model])), "--mapping", "mapping.yaml"]
    else:
        case.argv = ["compile", "--mapping", "mapping.yaml", "--model", model]
        case.argv += rng.choice(([], [], ["--no-scan"], ["--multimodal"], ["--memory", "1MiB"]))
        if rng.random() < 0.1:
            case.argv += [
                "--set",
                f"{rng.choice(list(json.loads(_data(family)).get('dims', {'embed': 1})))}={rng.choice(EXPRESSIONS[1:])[:200]}",
            ]
            case.lies.append(str(case.argv[-1])[:60])
    return case


def _text(rng: random.Random, text: bytes) -> tuple[bytes, str]:
    """The text itself: torn, lines moved, another document in place of it or after it."""
    lines = text.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    document = rng.choice(DOCUMENTS).encode("utf-8", "surrogatepass")
    match rng.randrange(8):
        case 0:
            return torn(rng, text)
        case 1:
            lines[at], lines[other] = lines[other], lines[at]
            return b"\n".join(lines), f"lines {at} and {other} swapped"
        case 2:
            lines.insert(at, lines[other])
            return b"\n".join(lines), f"line {other} again at {at}"
        case 3:
            lines[at] = b" " * rng.randrange(9) + lines[at].lstrip()
            return b"\n".join(lines), f"line {at} indented otherwise"
        case 4:
            lines[at] = b""
            return b"\n".join(lines), f"no line {at}"
        case 5:
            return document, f"{document[:30]!r} alone"
        case 6:
            return text + b"\n" + document, f"{document[:30]!r} after it"
        case _:
            name = rng.choice(
                (b"&a ", b"*a", b"!!str ", b"<<: *a", b"? ", b"|", b"'", b'"', b"\xe2\x80\xa8", b"\x85", b"\x1b", b"\t")
            )
            column = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:column] + name + lines[at][column:]
            return b"\n".join(lines), f"{name!r} in line {at}"


def _value(rng: random.Random, data: dict[str, Any]) -> str:
    """A value anywhere, an expression where expressions stand, a loop or a shape of another size."""
    every = [p for p in places(data) if p[0] != "models" or rng.random() < 0.2]
    texts = [p for p in every if isinstance(get(data, p), str)]
    if not texts or not every:
        return shake(rng, data)
    match rng.randrange(9):
        case 0:
            return shake(rng, data)
        case 1:
            path, new = rng.choice(every), hostile(rng)
        case 2:
            path = rng.choice([p for p in texts if p[0] == "dims"] or texts)
            new = rng.choice(EXPRESSIONS)
        case 3:
            loops = [p for p in every if len(p) > 1 and p[-2] in ("for", "stack")]
            path, new = (
                rng.choice(loops or every),
                rng.choice((*EXPRESSIONS, 99_999, 10**6, 0, -1, list(range(2000)), {}, [])),
            )
        case 4:
            path, new = (
                rng.choice([p for p in texts if p[-1] in ("from", "source", "at")] or texts),
                rng.choice(TEMPLATES),
            )
        case 5:
            path, new = rng.choice([p for p in texts if p[-1] == "as"] or texts), rng.choice(PATTERNS)
        case 6:
            numbers = [p for p in places(data) if p[0] == "models" and type(get(data, p)) is int]
            path = rng.choice(numbers or every)
            new = rng.choice((changed(rng, get(data, path)), 10**5, 10**6, 10**9, 10**17, 0, -1, "text", None, 0.5))
        case 7:
            path = rng.choice(texts)
            new = rng.choice((*EXPRESSIONS, *TEMPLATES, *PATTERNS))
        case _:  # a key under another name
            path = rng.choice(every)
            parent = get(data, path[:-1])
            if isinstance(parent, dict):
                name = str(rng.choice((hostile(rng), rng.choice(TEMPLATES), str(path[-1]) + "x")))
                parent[name] = parent.pop(path[-1])
                return f"{'/'.join(map(str, path))[:60]} is called {name[:40]!r}"
            new = None
    put(data, path, new)
    return f"{'/'.join(map(str, path))[:80]} = {repr(new)[:60]}"
