"""Plans that lie: edited with the digest made to fit, so that what lies behind it is reached; torn; of another version."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from ckptc.ops.codes import CODES
from fuzz_headers import GOLDEN, joined
from fuzz_values import CLIMBING, NUMBERS, STRINGS, Case, changed, dumps, hostile, shake, torn

# Plans of different make, and the checkpoint each is of: stacks and pads, experts, layers apart.
PLANS = {
    "gemma2": ["--model", "gemma2-2b"],
    "gpt_oss": ["--model", "gpt-oss-20b"],
    "qwen3_5_fp8": ["--model", "qwen3.5-35b-a3b-fp8", "--no-scan"],
    "qwen3_moe": ["--model", "qwen3-30b-a3b", "--dtype", "float32"],
}
# A checkpoint of codes of both kinds, with what they decode to.
CODED = """\
family: coded
target: maxtext
dims: { layers: 2, embed: 64, mlp: 6 }
config: { quantization_config: { weight_block_size: [4, 32] } }
models: { coded: { repo: example/coded } }
blocks:
  decoder:
    source: model.layers.{{ layer }}
    scanned: [{ at: decoder/layers, stack: { layer: layers } }]
    unscanned: [{ at: "decoder/layers_{{ layer }}", for: { layer: layers } }]
    tensors:
      eight: { from: eight, as: mlp embed -> embed mlp }
      four: { from: four, as: embed mlp }
"""
SHAPES = {
    "eight": ("F8_E4M3", [6, 64]),
    "eight_scale_inv": ("F32", [2, 2]),
    "four_blocks": ("U8", [6, 2, 16]),
    "four_scales": ("U8", [6, 2]),
}
SETTINGS = (
    *([["block", b], ["flat", f]] for b in ([128, 128], [1], [], [0], [32], [10**9, 1]) for f in (True, False)),
    [],
    [["groups", True]],
    [["divides", False]],
    *([["bits", b], ["group", g], ["zeros", True], ["index", False]] for b in (4, 3, 0) for g in (1, 32, -1)),
)
SIZES = {"F8_E4M3": 1, "U8": 1, "F32": 4}
SET = ["--set", "padded_vocab=160"]
EXPORTED = "gemma2"
DTYPES = (
    "bfloat16",
    "float32",
    "float8_e4m3fn",
    "float64",
    "int8",
    "uint8",
    "bool",
    "int4",
    "object",
    "O",
    "V4",
    "",
    "<f4",
)


def mutator(base: Path) -> Callable[[random.Random], Case]:
    """Makes the valid plans once."""
    plans = _made(base)
    return lambda rng: make(rng, plans)


@cache
def _made(base: Path) -> dict[str, tuple[bytes, Path]]:
    """The text of each plan, and the directory of its source."""
    plans: dict[str, tuple[bytes, Path]] = {}
    commands = [
        ["convert", *PLANS[EXPORTED], *SET, "--source", str(GOLDEN / EXPORTED / "hf"), "--output", str(base / "saved")],
        ["compile", "--export", *PLANS[EXPORTED], *SET, "--source", str(base / "saved"), "-o", str(base / "back.json")],
    ]
    for name, options in PLANS.items():
        source = str(GOLDEN / name / "hf")
        commands.append(["compile", *options, *SET, "--source", source, "-o", str(base / f"{name}.json")])
    (base / "coded").mkdir()
    (base / "coded.yaml").write_text(CODED, "utf-8")
    (base / "coded" / "model.safetensors").write_bytes(_coded_file())
    coded = ["compile", "--model", "coded", "--mapping", str(base / "coded.yaml"), "--source", str(base / "coded")]
    commands.append([*coded, "-o", str(base / "coded.json")])
    commands[0] += ["--jobs", "1"]
    commands[1] += ["--config-from", str(GOLDEN / EXPORTED / "hf")]
    for command in commands:
        # In another process: what runs there starts threads, after which this one could not be forked.
        subprocess.run([sys.executable, "-m", "ckptc", *command], check=True, stdout=subprocess.DEVNULL)
    for name in PLANS:
        plans[name] = ((base / f"{name}.json").read_bytes(), GOLDEN / name / "hf")
    plans["coded"] = ((base / "coded.json").read_bytes(), base / "coded")
    plans["back"] = ((base / "back.json").read_bytes(), base / "saved")
    return plans


def _coded_file() -> bytes:
    header, end = dict[str, Any](), 0
    for layer in range(2):
        for name, (dtype, shape) in SHAPES.items():
            begin, end = end, end + prod(shape) * SIZES[dtype]
            header[f"model.layers.{layer}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return joined(dumps(header), bytes(end))


def make(rng: random.Random, plans: dict[str, tuple[bytes, Path]]) -> Case:
    name = rng.choice(list(plans))
    text, source = plans[name]
    body = json.loads(text)
    case = Case([], {})
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        lie = rng.choices(LIES, WEIGHTS)[0]
        with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError):  # an earlier lie took its place
            case.lies.append(f"{lie.__name__}: {lie(rng, body)}")
    if rng.random() < 0.93:
        text = fitted(body)
    else:
        text, what = torn(rng, text if rng.random() < 0.7 else fitted(body))
        case.lies.append(what)
    case.files = {"plan.json": text}
    from_ = ["--source", str(source)]
    if name == "back":
        case.argv = [
            "run",
            "plan.json",
            "--output",
            "out",
            "--jobs",
            "1",
            "--quiet",
            *from_,
            "--config-from",
            str(GOLDEN / EXPORTED / "hf"),
        ]
    elif rng.random() < 0.85:
        case.argv = ["run", "plan.json", "--output", "out", "--jobs", "1", "--quiet", *from_]
        if rng.random() < 0.1:
            case.argv += ["--verify"]
    else:
        case.argv = ["verify", "plan.json", "--output", "nowhere", "--quiet", *from_]
    return case


def fitted(body: dict[str, Any]) -> bytes:
    """The plan's text, with the digest of what it now says, if it can have one."""
    from ckptc.diagnostics import InputError
    from ckptc.plan.json import loads

    text = dumps(body)
    try:
        loads(text)
    except InputError as error:
        (found,) = error.diagnostics
        if found.code == "edited-plan":
            return dumps({**body, "digest": found.notes[0].removeprefix("expected: ")})
    return text


Body = dict[str, Any]
Lie = Callable[[random.Random, Body], str]


def _kind(rng: random.Random, body: Body) -> dict[str, Any]:
    kind: dict[str, Any] = rng.choice(body["kinds"])
    return kind


def anything(rng: random.Random, body: Body) -> str:
    return shake(rng, body)


def part_number(rng: random.Random, body: Body) -> str:
    """Where a part begins, or which source it reads."""
    part = rng.choice(_kind(rng, body)["parts"])
    key = rng.choice(("source", "base", "first", "value"))
    part[key] = rng.choice((changed(rng, part.get(key, 0)), rng.randrange(-2, 5000)))
    return f"{key} = {repr(part[key])[:60]}"


def part_loop(rng: random.Random, body: Body) -> str:
    """A loop of a part: its size, its weight in the array, its step in the tensor, its step among tensors."""
    part = rng.choice(_kind(rng, body)["parts"])
    axis = rng.choice(part["axes"])
    match rng.randrange(6):
        case 0:
            axis[0] = rng.choice((changed(rng, axis[0]), rng.randrange(200)))
        case 1:
            axis[1].append(
                [rng.choice((1, 2, 3, 10**6, 10**12)), rng.choice((0, 1, 2, 10**6)), rng.choice((0, 1, 7)), 0]
            )
        case 2:
            axis[1].pop()
        case 3:
            axis[1].reverse()
        case 4:
            axis[1] = [rng.choice(([1, 1, 0, 0], [2, 1, 1, 0], [1, 10**18, 10**18, 10**18]))] * rng.choice(
                (1, 40, 5000)
            )
        case _:
            factor = rng.choice(axis[1])
            at = rng.randrange(len(factor))
            factor[at] = rng.choice((changed(rng, factor[at]), 0, rng.randrange(400)))
    return str(axis)[:80]


def parts(rng: random.Random, body: Body) -> str:
    """Parts that overlap, are missing, or are many."""
    kind = _kind(rng, body)
    every = kind["parts"]
    at = rng.randrange(len(every))
    match rng.randrange(4):
        case 0:
            every.append(json.loads(json.dumps(every[at])))
        case 1:
            every.pop(at)
        case 2:
            kind["parts"] = every * rng.choice((2, 200))
        case 3:
            every[at] = {
                "value": rng.choice((0, 1.5, 1e308, "x")),
                "axes": every[at]["axes"],
                "math": every[at]["math"],
            }
    return f"{len(kind['parts'])} parts"


def math(rng: random.Random, body: Body) -> str:
    part = rng.choice(_kind(rng, body)["parts"])
    step = rng.choice(("cast", "scale", "add", "exec", "pow", "mul", 3, None))
    operand = rng.choice((1, 0.5, 1e300, "float32", "int8", "float8_e4m3fn", "object", None, [], *NUMBERS[-6:]))
    part["math"] = rng.choice((part["math"] + [[step, operand]], [[step]], [[step, operand]] * 3000, step))
    return str(part["math"])[:80]


def sizes(rng: random.Random, body: Body) -> str:
    """Shape, chunk, unit, shards: unlike each other, huge, of other lengths."""
    kind = _kind(rng, body)
    key = rng.choice(("shape", "chunk", "unit", "shards"))
    old = kind[key]
    match rng.randrange(5):
        case 0:
            kind[key] = [rng.choice((1, 2, 3, n, n + 1, max(1, n // 2), 2**31, 2**50)) for n in old]
        case 1:
            kind[key] = [*old, 1]
        case 2:
            kind[key] = old[1:]
        case 3:
            kind[key] = [1] * len(old)
        case 4:
            for other in ("shape", "chunk", "unit"):
                kind[other] = [n * rng.choice((1, 10**5, 10**9)) for n in kind[other]]
    return f"{key} = {str(kind[key])[:60]}"


def tensors(rng: random.Random, body: Body) -> str:
    """Tensors that lie elsewhere, in another file, under another name; outputs of other tensors and kinds."""
    row = rng.choice(body[rng.choice(("tensors", "outputs"))])
    at = rng.randrange(4)
    row[at] = rng.choice((changed(rng, row[at]), rng.choice(body["tensors"])[at], hostile(rng)))
    return str(row)[:80]


def sources(rng: random.Random, body: Body) -> str:
    source = rng.choice(_kind(rng, body)["sources"])
    lists = [source, *([source["decode"]] * 3 if "decode" in source else [])]
    target = rng.choice(lists)
    key = rng.choice(list(target))
    match rng.randrange(3):
        case 0:
            target[key] = changed(rng, target[key])
        case 1:
            source["dtype"] = rng.choice(DTYPES)
        case 2:
            source["decode"] = {
                "code": rng.choice((*CODES, "")),
                "settings": rng.choice(SETTINGS),
                "shape": rng.choice(([1, 1], source["shape"], source["shape"][:-1], [])),
                "beside": [
                    {
                        "dtype": rng.choice(DTYPES),
                        "shape": rng.choice(([1, 1], source["shape"], source["shape"][:-1], [])),
                    }
                    for _ in range(rng.randrange(3))
                ],
            }
    return str(source)[:80]


def names(rng: random.Random, body: Body) -> str:
    """Paths that climb, of files and arrays; dtypes there are not."""
    match rng.randrange(4):
        case 0:
            file = rng.choice(body["sources"][0]["files"])
            file["name"] = rng.choice((*CLIMBING, file["name"] + "x", "config.json"))
            return repr(file["name"])[:60]
        case 1:
            row = rng.choice(body["outputs"])
            row[0] = rng.choice((*STRINGS, "../../outside/x", row[0] + "/x", rng.choice(body["outputs"])[0], "a/../b"))
            return repr(row[0])[:60]
        case 2:
            kind = _kind(rng, body)
            kind["dtype"] = rng.choice(DTYPES)
            return str(kind["dtype"])
        case _:
            file = rng.choice(body["sources"][0]["files"])
            file[rng.choice(("size", "header"))] = hostile(rng)
            return str(file)[:60]


def order(rng: random.Random, body: Body) -> str:
    """Lists in another order, shorter, or with things twice."""
    key = rng.choice(("outputs", "kinds", "tensors", "sources", "left_out", "batches"))
    body[key] = changed(rng, body[key]) if rng.random() < 0.7 else rng.sample(body[key], len(body[key]))
    return key


def head(rng: random.Random, body: Body) -> str:
    """Versions, choices and totals."""
    key = rng.choice(("format", "made", "choices", "totals", "layout"))
    if key == "format" or not isinstance(body[key], dict):
        body[key] = rng.choice((0, 2, "1", True, 1.0, None, 10**30))
        return f"{key} = {repr(body[key])[:40]}"
    inner = rng.choice(list(body[key]))
    body[key][inner] = rng.choice((changed(rng, body[key][inner]), hostile(rng)))
    return f"{key}.{inner} = {repr(body[key][inner])[:40]}"


def layout(rng: random.Random, body: Body) -> str:
    """What the outputs become."""
    there = body["layout"]
    if rng.random() < 0.2:
        body["layout"] = rng.choice(
            (None, {}, {"format": "orbax"}, {"format": "safetensors", "files": [], "config": {}})
        )
        return f"layout = {body['layout']}"
    if "files" not in there:
        there[rng.choice(("mesh", "compression", "link"))] = rng.choice(([["fsdp", 2]], "zstd:3", True, [["", 0]]))
        return str(there)[:80]
    if rng.random() < 0.5:
        row = rng.choice(there["files"])
        row[0] = rng.choice(
            (
                "../../outside/x.safetensors",
                "..safetensors",
                ".safetensors",
                "a\0.safetensors",
                "config.json",
                "~.safetensors",
            )
        )
        return str(row[0])
    if rng.random() < 0.3 and there.get("companions"):
        row = rng.choice(there["companions"])
        row["name"] = rng.choice((*CLIMBING, "config.json", "model.safetensors.index.json"))
        return repr(row["name"])
    return shake(rng, there)


LIES: tuple[Lie, ...] = (
    anything,
    part_number,
    part_loop,
    parts,
    math,
    sizes,
    tensors,
    sources,
    names,
    order,
    head,
    layout,
)
WEIGHTS = (6, 3, 5, 2, 2, 5, 2, 4, 3, 1, 2, 2)
