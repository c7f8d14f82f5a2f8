"""Options that commands share, and the readers of their values."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any

from ckptc.diagnostics import fail

MIB = 1 << 20
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}
MEMORY_LEAST = 1 * MIB
SCHEME = "hf://"
BUCKETS = "gs://"
ELSEWHERE = (
    "compile",
    "explain",
    "run",
    "convert",
    "verify",
)  # commands whose source may lie on the Hub or in a bucket
LARGEST = 10**18  # that a number may be, here and in mappings


def scan_axis(parser: argparse.ArgumentParser, **options: Any) -> None:
    """`--param-scan-axis`."""
    parser.add_argument("--param-scan-axis", type=int, choices=range(4), metavar="N", **options)


def compilation(parser: argparse.ArgumentParser, source: str = "the numbers shipped for the model") -> None:
    """What decides a plan."""
    parser.add_argument("--model", required=True, metavar="NAME", help="a named model; `ckptc models` lists them")
    parser.add_argument(
        "--source",
        metavar="DIR|hf://ORG/NAME[@REVISION]|gs://BUCKET/PATH",
        help="a checkpoint: config.json and safetensors files, in a directory, on the Hugging Face Hub or in a bucket of "
        "Google Cloud Storage, from which weights are streamed. Its config decides the dims, its headers check every shape "
        f"(default: {source})",
    )
    parser.add_argument(
        "--scan",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stack the layers, as MaxText's scan_layers=true expects (default), or keep them apart",
    )
    scan_axis(
        parser,
        help="the axis of an array that stacked layers are, as MaxText's param_scan_axis (default: 1)",
    )
    parser.add_argument(
        "--pipeline",
        metavar="stages=N[,...]",
        help="lay the layers out for MaxText's pipeline parallelism: `stages` (ici_pipeline_parallelism times "
        "dcn_pipeline_parallelism), `layers_per_stage` (default: 1), `scan_layers_per_stage`, and `layers`, how many are "
        "pipelined (default: all). A checkpoint so laid out fits these settings alone",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "float16", "float8_e4m3fn"],
        default="bfloat16",
        help="of stored floating arrays, where the mapping keeps no other (default: bfloat16)",
    )
    parser.add_argument("--multimodal", action="store_true", help="convert the vision and audio towers too")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=setting,
        metavar="DIM=VALUE",
        help="override a dim of the mapping; may be repeated",
    )
    parser.add_argument("--mapping", metavar="FILE", help="a mapping that is not among the shipped ones")
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--shards",
        type=positive,
        metavar="N",
        help="storage shards of each array, along the first axis they divide, else the second (default: 16)",
    )
    split.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="shard each array for the device mesh it will be used on, such as fsdp=16,tensor=4, by MaxText's rules: "
        "each device's part is then whole chunks, and a restore on that mesh reads only what each host needs. A "
        "restore that names no sharding gets this one, and so needs as many devices",
    )
    parser.add_argument(
        "--rules",
        metavar="FILE",
        help="with --mesh: YAML with `logical_axis_rules`, as MaxText's settings have them, that take the place of the "
        "default ones of the same axes",
    )
    parser.add_argument(
        "--compression",
        type=compression,
        metavar="none|zstd[:LEVEL]|blosc-lz4",
        help="of stored chunks (default: none, the fastest). Of bfloat16 weights blosc-lz4 saves 24%% of the bytes for "
        "some 1 CPU second per GB, zstd 22%% for some 3; half of that again in each restore. Weights in 8 bits hardly "
        "shrink. LEVEL is 1 to 22 (default: 3, as Orbax itself)",
    )
    parser.add_argument(
        "--memory",
        type=memory,
        default=512 * MIB,
        metavar="SIZE",
        help="budget for buffers: source bytes read and target bytes made, of all units in flight (default: 512MiB). "
        "The interpreter and its libraries, some 150 MB, are not counted. No unit of work uses more than a third of "
        "it. A worker whose units are not tiny takes 16 MiB more, to read and write past the page cache; as many run as "
        "fit, and always one",
    )
    parser.add_argument(
        "--link",
        action="store_true",
        help="copy nothing that only moves: the output holds hard links to the source's files, on the same file system, "
        "and refers to the tensors in them; arrays with arithmetic or in another dtype are copied. A restore transposes "
        "and so takes up to twice as long, in places 3 times. Source files that are changed in place afterwards change the checkpoint, "
        "too; deleted or replaced ones do not",
    )


def execution(parser: argparse.ArgumentParser) -> None:
    """What a run needs besides a plan."""
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR|gs://…",
        help="where the checkpoint goes: DIR/0/items, or gs://BUCKET/PATH/0/items, with no copy on this machine",
    )
    jobs(parser)
    parser.add_argument(
        "--restart",
        action="store_true",
        help="throw away what an unfinished run has left in the output (default: go on where it stopped)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint that is there, once the new one is complete"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="before the output appears, read all of it back and compare it with the source, bit by bit",
    )
    parser.add_argument(
        "--cache",
        action="store_true",
        help="download the source's files into the Hub's cache first and keep them there (default: stream them, and keep "
        "nothing)",
    )
    parser.add_argument(
        "--check-source",
        metavar="FILE|auto",
        help="first compare the SHA-256 of every source file with this file, as `sha256sum` writes it, or with what "
        "the Hub's client noted when it downloaded them (auto)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def refuse_urls(args: argparse.Namespace) -> None:
    """`unsupported-url`, unless the only URL is where `run` or `convert` puts a checkpoint: any other would be taken for a
    path."""
    for name, value in vars(args).items():
        if not isinstance(value, str) or not re.match("[a-z0-9]+://", value):
            continue
        if name == "output" and value.startswith(SCHEME) and args.command == "export":
            continue
        if name == "fill_from" and value.startswith(SCHEME):
            continue
        if name == "source" and value.startswith((SCHEME, BUCKETS)) and args.command in ELSEWHERE:
            continue
        if args.command not in ("run", "convert") or name != "output":
            help = "give a local path; a --source may be hf://ORG/NAME, the --output of `run` and `convert` gs://BUCKET/PATH"
            raise fail("unsupported-url", f"{value} is a URL, and `{args.command}` has no use for it there", help=help)
        if args.verify:
            help = "leave out --verify; compare a copy of it in a directory: `ckptc verify PLAN --output DIR`"
            raise fail(
                "unsupported-url", f"{value} cannot be verified: checkpoints are read from directories", help=help
            )


def jobs(parser: argparse.ArgumentParser) -> None:
    """How many processes work at once."""
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="worker processes at most; fewer where the memory budget holds fewer units of work (default: the cores "
        "that this process may use)",
    )


def together(parser: argparse.ArgumentParser) -> None:
    """How several processes run one plan. `ckptc.cli.processes` reads them."""
    group = parser.add_argument_group(
        "several processes or machines",
        "The same command is started once for each process, with a shared --output; each makes its part of the plan, by "
        "bytes, and process 0 commits. The source may lie elsewhere on each machine.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, and the others find it")
    group.add_argument("--num-processes", type=positive, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=whole, metavar="I", help="which of them this one is, from 0")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="instead of these three: as JAX finds out from the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU)",
    )
    group.add_argument(
        "--wait",
        type=positive,
        metavar="SECONDS",
        help="how long processes wait for each other at the start (default: 300)",
    )


def setting(text: str) -> tuple[str, int | float | bool | str]:
    """`name=value`; the value is a number, true or false, or an expression over other dims."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not value.strip():
        raise argparse.ArgumentTypeError(f"`{text}` is not DIM=VALUE")
    value = value.strip()
    if value in ("true", "false"):
        return name, value == "true"
    if not value.isascii():  # digits of other scripts are numbers to Python
        raise argparse.ArgumentTypeError(f"`{text}`: {value} has characters that no number or expression has")
    number: int | float
    if re.fullmatch(r"[+-]?[0-9]+", value):
        number = int(value) if len(value) <= 20 else math.inf
    elif re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|nan)", value, re.IGNORECASE):
        number = float(value)
    elif re.fullmatch(r"[+-]?[0-9]\w*", value):  # 1_000 and 0x10 are numbers to Python
        raise argparse.ArgumentTypeError(f"`{text}`: {value} is not a number; only digits make one")
    else:
        return name, value
    if abs(number) > LARGEST or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"`{text}`: {value} is not the size of anything")
    return name, number


def positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    return 0 if text == "0" else positive(text)


def size(text: str) -> int:
    """Bytes: `256MiB`, `1.5G`, `1048576`."""
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?I?)B?\s*", text, re.IGNORECASE)
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"`{text}` is not a size such as 256MiB")
    return int(float(match.group(1)) * _UNITS[unit])


def compression(text: str) -> str:
    """As plans have it: `zstd` is `zstd:3`."""
    found = re.fullmatch(r"none|blosc-lz4|zstd(?::([1-9]|1[0-9]|2[0-2]))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"`{text}` is not none, zstd, zstd:LEVEL with a level of 1 to 22, or blosc-lz4"
        )
    return f"zstd:{found[1] or 3}" if text.startswith("zstd") else text


def memory(text: str) -> int:
    value = size(text)
    if value < MEMORY_LEAST:
        raise argparse.ArgumentTypeError(f"{text} is too little memory; 1MiB is the least")
    return value
