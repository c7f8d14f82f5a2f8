"""How the values of options are read."""

from __future__ import annotations

import argparse
import re

import pytest

from ckptc.cli.arguments import MIB, memory, positive, setting, size
from ckptc.cli.main import parser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("padded_vocab=160", ("padded_vocab", 160)),
        ("factor=0.5", ("factor", 0.5)),
        ("factor=1e-5", ("factor", 1e-5)),
        ("tied=true", ("tied", True)),
        ("tied=false", ("tied", False)),
        ("padded_vocab=vocab + 32", ("padded_vocab", "vocab + 32")),
        ("a== b", ("a", "= b")),
        ("vocab= 3 ", ("vocab", 3)),
        ("vocab=-1", ("vocab", -1)),  # the compiler refuses it, with the dim's place
    ],
)
def test_setting(text: str, expected: tuple[str, object]) -> None:
    assert setting(text) == expected
    assert type(setting(text)[1]) is type(expected[1])


@pytest.mark.parametrize(
    "text", ["", "vocab", "=3", "vocab=", "vocab= ", "Vocab=3", "vo cab=3", "vocab =3", "1a=3", "a.b=3"]
)
def test_setting_refuses_what_is_not_a_name_and_a_value(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"`{text}` is not DIM=VALUE")):
        setting(text)


@pytest.mark.parametrize("value", ["٣", "1٣", "３", "²", "1_000", "0x10", "1e5_0", "12abc", "vocab + ٣"])
def test_setting_takes_no_digits_but_those_of_ascii(value: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"characters that no number|is not a number"):
        setting(f"vocab={value}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "1e19", "10000000000000000000", "9" * 5000])
def test_setting_refuses_numbers_that_size_nothing(value: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not the size of anything"):
        setting(f"vocab={value}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("1048576B", MIB),
        ("256MiB", 256 * MIB),
        ("256mib", 256 * MIB),
        ("256Mi", 256 * MIB),
        ("1.5GiB", 3 * 512 * MIB),
        ("1k", 1000),
        ("2kB", 2000),
        ("3M", 3_000_000),
        ("1G", 10**9),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
        (" 8 GiB ", 8 << 30),
    ],
)
def test_size(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1.", ".5G", "1e9", "1PiB", "1BB", "1iB", "1,5G", "1 G B", "9" * 400, "٣G"]
)
def test_size_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 256MiB"):
        size(text)


def test_memory_has_a_least() -> None:
    assert memory("1MiB") == MIB
    with pytest.raises(argparse.ArgumentTypeError, match="1MB is too little memory; 1MiB is the least"):
        memory("1MB")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "x", "٣", "1_0", "9" * 30])
def test_positive_refuses(text: str) -> None:
    assert positive("16") == 16
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number above 0"):
        positive(text)


def test_defaults() -> None:
    args = parser().parse_args(["convert", "--model", "x", "--source", "s", "--output", "o"])
    found = args.scan, args.dtype, args.multimodal, args.set, args.shards, args.memory
    assert found == (True, "bfloat16", False, [], None, 512 * MIB)  # --shards: 16, once it is known that nobody gave it
    args = parser().parse_args(["compile", "--model", "x"])
    # The same, or with --export what `export` has: nothing is said until it is known which.
    assert (args.scan, args.dtype, args.memory, args.source) == (None, None, None, None)
    assert (args.plan_file, args.dump_plan, args.force) == (None, False, False)


def test_scan_and_no_scan() -> None:
    def scan(*options: str) -> object:
        return parser().parse_args(["compile", "--model", "x", *options]).scan

    assert (scan("--scan"), scan("--no-scan"), scan("--no-scan", "--scan")) == (True, False, True)


def test_set_may_be_repeated_and_keeps_the_order() -> None:
    args = parser().parse_args(["compile", "--model", "x", "--set", "a=1", "--set", "b=2", "--set", "a=3"])
    assert args.set == [("a", 1), ("b", 2), ("a", 3)]
