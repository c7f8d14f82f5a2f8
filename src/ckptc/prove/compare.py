"""Where two models part: the first point at which what they compute differs, in words.

Both sides note what goes into and comes out of attention and MLP in the order in which they compute it; the n-th of a
kind is the n-th on both. Names of modules and the mapping play no part in this, so a wrong mapping cannot hide. The
heads of query and key may be in another order of `head_dim` on each side (rotary halves, or pairs). So what is compared
of them is what that order does not change: lengths, and products of positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TOLERANCE = 1e-3  # of the largest number: far above float32 noise, far below any wrong array
SOLID = ("embedding", "attention output", "mlp output")  # the hidden states that must agree for a proof
# What each point of a layer is called, in the order of computing, and the words of arrays that lead to it.
WORDS = {
    "embedding": ("after the embedding", ("embed",)),
    "attention input": ("before the attention: after its norm, or the layer before", ("pre_self_attention", "norm")),
    "query length": ("attention, after the query projection", ("query", "wq")),
    "key length": ("attention, after the key projection", ("key", "wkv")),
    "value": ("attention, after the value projection", ("value", "wkv")),
    "query": ("attention, after the rotary embedding of the query", ("query", "wq")),
    "key": ("attention, after the rotary embedding of the key", ("key", "wkv")),
    "scores": ("attention, after query and key are multiplied", ("query", "key")),
    "heads": ("attention, after the values are mixed", ("sink", "query", "key")),
    "attention output": ("attention, after the output projection", ("out/",)),
    "mlp input": ("before the MLP: after its norm, or the attention's", ("post_self_attention", "norm")),
    "router": ("MLP, after the router", ("gate", "router")),
    "mlp hidden": ("MLP, after the gate and up projections", ("wi",)),
    "mlp output": ("MLP, after the down projection", ("wo", "wi", "gate")),
    "logits": ("after the last layer: final norm, or head", ("decoder_norm", "logits", "embed")),
}
TOGETHER = ("query length", "key length", "value")  # computed side by side: said together
AFTER = {"query length": "query", "key length": "key", "value": "value"}


@dataclass(frozen=True)
class Point:
    """A place in both models: how far they differ there, in parts of the largest number."""

    layer: int  # of the checkpoint's model; -1 outside of layers
    name: str
    relative: float

    @property
    def agrees(self) -> bool:
        return self.relative <= TOLERANCE


@dataclass(frozen=True)
class Found:
    """What one layout and loader gives."""

    layout: str
    loader: str
    relative: float  # of logits
    kl: float  # mean over positions, in nats
    top1: float  # share of positions where both choose the same token
    points: tuple[Point, ...]

    @property
    def agrees(self) -> bool:
        return self.relative <= TOLERANCE and not self.parted

    @property
    def parted(self) -> tuple[Point, ...]:
        """The points at which the models part first; none where they agree."""
        wrong = [p for p in self.points if not p.agrees]
        if self.relative <= TOLERANCE:
            wrong = [p for p in wrong if p.name in SOLID]
        if not wrong:
            return ()
        first = wrong[0]
        beside = [p for p in wrong if p.layer == first.layer and p.name in TOGETHER]
        return tuple(beside) if first.name in TOGETHER else (first,)

    @property
    def words(self) -> str:
        """`layer 0, attention, after the value projection`; empty where the models agree."""
        parted = self.parted
        if not parted:
            return "" if self.agrees else WORDS["logits"][0]
        where = f"layer {parted[0].layer}, " if parted[0].layer >= 0 and parted[0].name != "embedding" else ""
        if parted[0].name in TOGETHER:
            which = " and ".join(AFTER[p.name] for p in parted)
            return f"{where}attention, after the {which} projection{'s' if len(parted) > 1 else ''}"
        return where + WORDS[parted[0].name][0]

    @property
    def hints(self) -> tuple[str, ...]:
        """Words in the paths of the arrays to look at."""
        return tuple(w for p in self.parted for w in WORDS[p.name][1]) or (() if self.agrees else WORDS["logits"][1])


def compare(directory: Path, layout: str, loader: str) -> Found:
    """Compares expected.npz with LAYOUT.LOADER.npz, as the programs in `sides/` left them."""
    expected, actual = read(directory / "expected.npz"), read(directory / f"{layout}.{loader}.npz")
    first = expected.pop("logits").astype(np.float64)
    second = actual.pop("logits").astype(np.float64)[..., : first.shape[-1]]  # the target's vocabulary may be padded
    p, q = log_softmax(first), log_softmax(second)
    return Found(
        layout,
        loader,
        difference(first, second),
        float((np.exp(p) * (p - q)).sum(-1).mean()),
        float((first.argmax(-1) == second.argmax(-1)).mean()),
        tuple(points(expected, actual)),
    )


def read(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name != "tokens"}


def points(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> list[Point]:
    """All points that both sides have as often as each other, in the order in which the checkpoint's model computes."""
    first, second = by_name(expected), by_name(actual)
    order = list(WORDS)
    out: list[tuple[tuple[int, int, int], Point]] = []
    for name, mine in first.items():
        theirs = second.get(name, [])
        if len(mine) != len(theirs):
            continue
        for (number, layer, one), (_, _, other) in zip(mine, theirs, strict=True):
            if one.size != other.size:
                continue
            key = (layer, order.index(name), number)
            out.append((key, Point(layer, name, difference(one, other.reshape(one.shape)))))
    return [point for _, point in sorted(out, key=lambda item: item[0])]


def by_name(arrays: Mapping[str, Array]) -> dict[str, list[tuple[int, int, Array]]]:
    """(number, layer, array) by point, with what is derived of heads."""
    out: dict[str, list[tuple[int, int, Array]]] = defaultdict(list)
    heads: dict[str, Array] = {}
    for label in sorted(arrays):
        number, layer, name = label.split("|")
        place, value = (int(number), int(layer)), arrays[label]
        if name in ("query", "key"):
            heads[name] = value
            out[f"{name} length"].append((*place, np.linalg.norm(value, axis=-1)))
            out[name].append((*place, np.einsum("bshd,bthd->bhst", value, value)))
        elif name == "value" and {"query", "key"} <= heads.keys():
            query, key = heads.pop("query"), heads.pop("key")
            if query.shape[2] % key.shape[2] == 0:
                repeated = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
                out["scores"].append((*place, np.einsum("bshd,bthd->bhst", query, repeated)))
            out[name].append((*place, value))
        elif name in WORDS:
            out[name].append((*place, value))
    return out


def difference(expected: Array, actual: Array) -> float:
    """The largest difference, in parts of the largest number expected; infinite where there is no number."""
    if not np.isfinite(actual).all() or not np.isfinite(expected).all():
        return float("inf")
    return float(np.abs(actual - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30))


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out
