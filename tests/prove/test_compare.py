"""Where two models part, found on small attention and MLP layers in numpy, of which one has a mistake in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptc.prove.compare import Found, compare

Array = np.ndarray[Any, Any]
LAYERS, EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, BATCH, LENGTH = 3, 24, 4, 2, 6, 40, 30, 2, 7


def weights() -> list[dict[str, Array]]:
    random = np.random.default_rng(0)
    shapes = {
        "q": (EMBED, HEADS, HEAD_DIM),
        "k": (EMBED, KV_HEADS, HEAD_DIM),
        "v": (EMBED, KV_HEADS, HEAD_DIM),
        "o": (HEADS * HEAD_DIM, EMBED),
        "gate": (EMBED, MLP),
        "up": (EMBED, MLP),
        "down": (MLP, EMBED),
        "norm": (EMBED,),
    }
    return [{n: random.normal(size=s) / EMBED**0.5 for n, s in shapes.items()} for _ in range(LAYERS)]


def rotated(x: Array, order: Array) -> Array:
    """Rotary embedding on halves of `head_dim` that lie in an order of their own."""
    inverse = np.argsort(order)
    first, second = np.split(x[..., inverse], 2, axis=-1)
    angle = np.arange(LENGTH)[:, None, None] / 10 ** np.arange(HEAD_DIM // 2)
    turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    return np.concatenate(turned, -1)[..., order]


def run(path: Path, layers: list[dict[str, Array]], order: Array, head: float = 1.0) -> None:
    """Computes and writes what a side of a proof writes. `order`: of the rotary halves in `head_dim`."""
    random = np.random.default_rng(1)
    x = random.normal(size=(BATCH, LENGTH, EMBED))
    unembed = random.normal(size=(EMBED, VOCAB))
    noted: dict[str, Array] = {}
    current = 0

    def note(point: str, value: Array) -> Array:
        noted[f"{len(noted):05d}|{current}|{point}"] = value
        return value

    note("embedding", x)
    for current, w in enumerate(layers):  # noqa: B007
        given = note("attention input", x * (1 + w["norm"]))
        q, k, v = (np.einsum("bse,ehd->bshd", given, w[n]) for n in "qkv")
        q, k = note("query", rotated(q, order)), note("key", rotated(k, order))
        note("value", v)
        scores = np.einsum("bshd,bthd->bhst", q, np.repeat(k, HEADS // KV_HEADS, 2))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhst,bthd->bshd", scores / scores.sum(-1, keepdims=True), np.repeat(v, HEADS // KV_HEADS, 2))
        x = x + note("attention output", note("heads", mixed).reshape(BATCH, LENGTH, -1) @ w["o"])
        inner = note("mlp hidden", np.maximum(note("mlp input", x) @ w["gate"], 0) * (x @ w["up"]))
        x = x + note("mlp output", inner @ w["down"])
    np.savez(path, logits=head * (x @ unembed), **noted)


HALVES, PAIRS = np.arange(HEAD_DIM), np.arange(HEAD_DIM).reshape(2, -1).T.ravel()


def found(directory: Path, theirs: list[dict[str, Array]], order: Array = PAIRS, head: float = 1.0) -> Found:
    run(directory / "expected.npz", weights(), HALVES)
    run(directory / "scan.train.npz", theirs, order, head)
    return compare(directory, "scan", "train")


def as_pairs(layers: list[dict[str, Array]]) -> list[dict[str, Array]]:
    return [{n: w[..., PAIRS] if n in ("q", "k") else w for n, w in layer.items()} for layer in layers]


def test_models_that_rotate_other_pairs_of_the_same_heads_agree(tmp_path: Path) -> None:
    same = found(tmp_path, as_pairs(weights()))
    assert same.agrees and same.words == "" and same.relative < 1e-12
    assert len(same.points) == 1 + LAYERS * 12


def swapped(one: str, other: str, layer: int = 0) -> Any:
    def change(layers: list[dict[str, Array]]) -> None:
        layers[layer][one], layers[layer][other] = layers[layer][other], layers[layer][one]

    return change


def changed(name: str, change: Any, layer: int = 0) -> Any:
    def apply(layers: list[dict[str, Array]]) -> None:
        layers[layer][name] = change(layers[layer][name])

    return apply


def transposed(w: Array) -> Array:
    return w.reshape(EMBED, -1).T.reshape(w.shape) if w[0].size == EMBED else w.T


MISTAKES = {
    "k and v swapped": (swapped("k", "v"), "layer 0, attention, after the key and value projections"),
    "v of another order of axes": (
        changed("v", lambda w: w.reshape(EMBED, HEAD_DIM, KV_HEADS).swapaxes(1, 2)),
        "layer 0, attention, after the value projection",
    ),
    "square q transposed": (changed("q", transposed), "layer 0, attention, after the query projection"),
    "square o transposed": (changed("o", transposed, 1), "layer 1, attention, after the output projection"),
    "q without its factor": (changed("q", lambda w: 2 * w), "layer 0, attention, after the query projection"),
    "rotary halves of k": (
        changed("k", lambda w: w[..., np.argsort(PAIRS)]),
        "layer 0, attention, after the rotary embedding of the key",
    ),
    "gate and up swapped": (swapped("gate", "up", 2), "layer 2, MLP, after the gate and up projections"),
    "down of another layer": (
        lambda layers: layers[1].update(down=layers[2]["down"]),
        "layer 1, MLP, after the down projection",
    ),
    "norm without its 1": (
        changed("norm", lambda w: w - 1, 1),
        "layer 1, before the attention: after its norm, or the layer before",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_layer_and_module(name: str, tmp_path: Path) -> None:
    change, words = MISTAKES[name]
    layers = as_pairs(weights())
    change(layers)
    wrong = found(tmp_path, layers)
    assert not wrong.agrees
    assert wrong.words == words


def test_a_mistake_after_the_last_layer_is_named(tmp_path: Path) -> None:
    wrong = found(tmp_path, as_pairs(weights()), head=2.0)
    assert not wrong.agrees and wrong.words == "after the last layer: final norm, or head"
    assert {"decoder_norm", "logits"} <= set(wrong.hints)


def test_hidden_states_that_differ_are_no_proof_though_logits_agree(tmp_path: Path) -> None:
    layers = as_pairs(weights())
    run(tmp_path / "expected.npz", weights(), HALVES)
    run(tmp_path / "scan.train.npz", layers, PAIRS)
    with np.load(tmp_path / "scan.train.npz") as file:
        arrays = {name: file[name] for name in file.files}
    label = next(name for name in arrays if name.endswith("|1|mlp output"))
    arrays[label] = arrays[label] * 1.1
    np.savez(tmp_path / "scan.train.npz", **arrays)
    wrong = compare(tmp_path, "scan", "train")
    assert wrong.relative < 1e-12 and not wrong.agrees
    assert wrong.words == "layer 1, MLP, after the down projection"


def test_what_is_no_number_differs(tmp_path: Path) -> None:
    wrong = found(tmp_path, as_pairs(weights()), head=float("nan"))
    assert wrong.relative == float("inf") and not wrong.agrees
