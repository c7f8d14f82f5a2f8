"""Checkpoints that lie: headers, indexes and configs, and files that are something else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fuzz_values import CLIMBING, NUMBERS, Case, changed, dumps, hostile, shake, torn

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "golden"
# Small checkpoints of different make: stacks, cycles and pads; experts; scales beside codes; a config in sections.
MODELS = {
    "gemma2": ("gemma2-2b", ["--set", "padded_vocab=160"]),
    "qwen3_moe": ("qwen3-30b-a3b", ["--set", "padded_vocab=160"]),
    "gpt_oss": ("gpt-oss-20b", ["--set", "padded_vocab=160"]),
    "llama3_1": ("llama3.1-8b", ["--set", "padded_vocab=160"]),
    "gemma3": ("gemma3-4b", ["--set", "padded_vocab=160"]),
}
PICKLE = b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 4976698672\n"
ZIP = b"PK\x03\x04" + bytes(60)
PAGE = b"<!DOCTYPE html><html><body>Repository not found</body></html>"


def mutator(base: Path) -> Callable[[random.Random], Case]:
    return make


@cache
def checkpoint(name: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((GOLDEN / name / "hf").iterdir())}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a valid file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def make(rng: random.Random) -> Case:
    name = rng.choice(list(MODELS))
    model, options = MODELS[name]
    if rng.random() < 0.03:
        model = MODELS[rng.choice(list(MODELS))][0]
    files = dict(checkpoint(name))
    case = Case([], {})
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choices(LIES, WEIGHTS)[0](rng, files, case)
    case.files = {f"checkpoint/{n}": content for n, content in files.items()}
    case.links = {f"checkpoint/{n}": target for n, target in case.links.items()}
    case.holes = {f"checkpoint/{n}": size for n, size in case.holes.items()}
    source = [
        "--model",
        model,
        "--source",
        "checkpoint",
        *options,
        *rng.choice(([], ["--no-scan"], ["--memory", "1MiB"])),
    ]
    if rng.random() < 0.1:
        case.argv = ["convert", *source, "--output", "out", "--jobs", "1", "--quiet"]
    else:
        case.argv = ["compile", *source]
    return case


Files = dict[str, bytes]
Lie = Callable[[random.Random, Files, Case], None]


def _shard(rng: random.Random, files: Files) -> str | None:
    names = [n for n, data in files.items() if n.endswith(".safetensors") and len(data) > 64 and data[8:9] == b"{"]
    return rng.choice(names) if names else None


def _rewritten(files: Files, name: str) -> tuple[dict[str, Any], bytes] | None:
    try:
        header, data = split(files[name])
    except ValueError:
        return None
    return (header, data) if isinstance(header, dict) and header else None


def header_value(rng: random.Random, files: Files, case: Case) -> None:
    """One value of one header."""
    name = _shard(rng, files)
    found = _rewritten(files, name) if name else None
    if name is None or found is None:
        return
    header, data = found
    case.lies.append(f"{name}: {shake(rng, header)}")
    files[name] = joined(dumps(header), data)


def tensor_place(rng: random.Random, files: Files, case: Case) -> None:
    """A tensor whose offsets overlap others', leave holes, run backwards or past the end, or whose shape is another."""
    name = _shard(rng, files)
    found = _rewritten(files, name) if name else None
    if name is None or found is None:
        return
    header, data = found
    key = rng.choice(list(header))
    entry = header[key]
    if not isinstance(entry, dict) or "data_offsets" not in entry:
        return
    other = header[rng.choice(list(header))]
    match rng.randrange(6):
        case 0:
            entry["data_offsets"] = other.get("data_offsets", [0, 0]) if isinstance(other, dict) else [0, 0]
        case 1:
            entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
        case 2:
            entry["shape"] = [changed(rng, n) for n in entry["shape"]]
        case 3:
            entry["shape"] = entry["shape"] * rng.choice((0, 2, 500))
        case 4:
            entry["dtype"] = rng.choice(("F4", "F6_E2M3", "F32", "F64", "BOOL", "C64", "f32", "", "O", None, 7))
        case 5:
            shape = [2**40, 2**20]
            entry |= {"shape": shape, "data_offsets": [len(data), len(data) + 2 * 2**60]}
    case.lies.append(f"{name}: {key} = {str(entry)[:80]}")
    files[name] = joined(dumps(header), data)


def tensor_name(rng: random.Random, files: Files, case: Case) -> None:
    """A tensor under another name, twice, or not at all."""
    name = _shard(rng, files)
    found = _rewritten(files, name) if name else None
    if name is None or found is None:
        return
    header, data = found
    key = rng.choice(list(header))
    new = rng.choice((str(hostile(rng)), key + ".weight", key.replace("0", "1"), key.replace("0", "99"), "x" * 100_000))
    kept = rng.random() < 0.3
    made = {(new if k == key else k): v for k, v in header.items()}
    if kept:
        made[key] = header[key]
    case.lies.append(f"{name}: {key} is called {new[:40]!r}" + (" too" if kept else ""))
    text = dumps(made)
    if rng.random() < 0.2:  # the same key twice, which only the text of JSON can hold
        text = text[:-1] + b", " + dumps(made)[1:]
        case.lies.append("and every key twice")
    files[name] = joined(text, data)


def header_length(rng: random.Random, files: Files, case: Case) -> None:
    name = _shard(rng, files)
    if name is None:
        return
    length = int.from_bytes(files[name][:8], "little")
    new = rng.choice((0, 1, 2, length - 1, length + 1, length * 2, 10**8, 10**8 + 1, 2**63, 2**64 - 1))
    case.lies.append(f"{name}: a header of {new} bytes")
    files[name] = new.to_bytes(8, "little") + files[name][8:]


def many_tensors(rng: random.Random, files: Files, case: Case) -> None:
    """A header with thousands of empty tensors, or a very long `__metadata__`."""
    name = _shard(rng, files)
    found = _rewritten(files, name) if name else None
    if name is None or found is None:
        return
    header, data = found
    count = rng.choice((1000, 20_000))
    if rng.random() < 0.5:
        header |= {f"extra.{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(count)}
    else:
        header["__metadata__"] = {f"key{n}": "x" * 100 for n in range(count)}
    case.lies.append(f"{name}: {count} more entries")
    files[name] = joined(dumps(header), data)


def bytes_torn(rng: random.Random, files: Files, case: Case) -> None:
    """Bytes of any file: a download cut short, a bad disk."""
    if not files:
        return
    name = rng.choice(list(files))
    files[name], what = torn(rng, files[name])
    case.lies.append(f"{name}: {what}")


def file_length(rng: random.Random, files: Files, case: Case) -> None:
    """A shard that is longer or shorter than its header says."""
    name = _shard(rng, files)
    if name is None:
        return
    size = len(files[name])
    new = rng.choice((0, 7, 8, 9, size - 1, size // 2, size + 1, 2 * size, 2**40))
    case.lies.append(f"{name}: {new} bytes long, not {size}")
    if new > 2 * size:
        case.holes[name] = new
    else:
        files[name] = (files[name] + bytes(max(0, new - size)))[:new]


def config_value(rng: random.Random, files: Files, case: Case) -> None:
    """One value of config.json, which decides sizes and loops."""
    if "config.json" not in files:
        return
    try:
        config = json.loads(files["config.json"])
    except ValueError:
        return
    if not isinstance(config, dict) or not config:
        return
    sections = [config, *(v for v in config.values() if isinstance(v, dict) and v)]
    section = rng.choice(sections)
    sizes = [k for k, v in section.items() if type(v) is int and v > 0]
    if sizes and rng.random() < 0.7:
        key = rng.choice(sizes)
        match rng.randrange(4):
            case 0:
                del section[key]
                case.lies.append(f"config.json: no {key}")
            case 1:
                section[key] = str(section[key])
                case.lies.append(f"config.json: {key} is a text")
            case _:
                huge = (10**5, 99_999, 10**6, 10**9, 10**17)
                section[key] = rng.choice((changed(rng, section[key]), hostile(rng), rng.choice(huge)))
                case.lies.append(f"config.json: {key} = {repr(section[key])[:60]}")
    else:
        case.lies.append(f"config.json: {shake(rng, config)}")
    files["config.json"] = dumps(config)


def index_value(rng: random.Random, files: Files, case: Case) -> None:
    """An index that names files that are not there, or not to be opened, or tensors elsewhere than they are."""
    name = "model.safetensors.index.json"
    shards = [n for n in files if n.endswith(".safetensors")]
    try:
        index = (
            json.loads(files[name])
            if name in files
            else {"weight_map": {k: n for n in shards for k in split(files[n])[0]}}
        )
        names: dict[str, Any] = index["weight_map"]
        key = rng.choice(list(names))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return
    if not isinstance(names, dict):  # an earlier lie took its place
        return
    match rng.randrange(5):
        case 0:
            names[key] = rng.choice((*CLIMBING, "model-00009-of-00009.safetensors", "config.json", 3, None, ["x"]))
        case 1:
            names[key] = rng.choice(shards) if shards else "x"
        case 2:
            del names[key]
        case 3:
            names["more." + key] = names[key]
        case 4:
            case.lies.append(f"index: {shake(rng, index)}")
    case.lies.append(f"index: {key} in {repr(names.get(key) if isinstance(names, dict) else names)[:60]}")
    files[name] = dumps(index)


def other_file(rng: random.Random, files: Files, case: Case) -> None:
    """A file that is something else: a pickle, a pointer to a large file, a page, nothing."""
    if not files:
        return
    name = rng.choice(list(files))
    files[name] = rng.choice((PICKLE, LFS, ZIP, PAGE, b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b"1"))
    case.lies.append(f"{name}: {files[name][:12]!r}")
    if rng.random() < 0.4:  # only pickles
        for shard in [n for n in files if n.endswith((".safetensors", ".index.json"))]:
            files[shard.replace("model", "pytorch_model").replace(".safetensors", ".bin")] = files.pop(shard)
        case.lies.append("pickles only")


def other_names(rng: random.Random, files: Files, case: Case) -> None:
    """Files that are gone, doubled, renamed, or links."""
    if not files:
        return
    name = rng.choice(list(files))
    match rng.randrange(5):
        case 0:
            del files[name]
            case.lies.append(f"no {name}")
        case 1:
            files["model-00003-of-00002.safetensors"] = files[name]
            files.pop("model.safetensors.index.json", None)
            case.lies.append(f"{name} twice, no index")
        case 2:
            case.links[name] = rng.choice(
                ("/dev/zero", "/dev/null", "nowhere", ".", "../../outside/precious.txt", name)
            )
            case.lies.append(f"{name} is a link to {case.links[name]}")
        case 3:
            files["\udcff.safetensors".encode("utf-8", "surrogateescape").decode("latin-1")] = files[name]
            case.lies.append("a file with a strange name")
        case 4:
            files["model.safetensors"] = files[name]
            case.lies.append(f"model.safetensors is {name}")


def other_family(rng: random.Random, files: Files, case: Case) -> None:
    """Another model's files, all or some."""
    others = checkpoint(rng.choice(list(MODELS)))
    names = rng.sample(list(others), rng.randrange(1, len(others) + 1))
    for name in names:
        files[name] = others[name]
    case.lies.append(f"another model's {names}")


LIES: tuple[Lie, ...] = (
    header_value,
    tensor_place,
    tensor_name,
    header_length,
    many_tensors,
    bytes_torn,
    file_length,
    config_value,
    index_value,
    other_file,
    other_names,
    other_family,
)
WEIGHTS = (4, 4, 3, 1, 0.3, 3, 2, 6, 3, 1, 2, 1)
