"""Modules of flax filled by `ckptc.load` on 4 CPU devices: run by test_load.py, in a process of its own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import ckptc

MAPPING = """\
family: tiny
title: One layer
target: maxtext
extra: true
dims: { inside: config.inside, outside: config.outside }
models: { tiny: { repo: example/tiny, config: { inside: 8, outside: 16 } } }
tensors:
  dense/kernel: { from: dense.weight, as: outside inside -> inside outside }
  dense/bias: { from: dense.bias, as: outside }
"""


def checkpoint(directory: Path) -> dict[str, np.ndarray]:
    (directory / "tiny.yaml").write_text(MAPPING, "utf-8")
    (directory / "config.json").write_text(json.dumps({"inside": 8, "outside": 16}), "utf-8")
    numbers = np.random.default_rng(0)
    tensors = {"dense.weight": numbers.standard_normal((16, 8), np.float32)}
    tensors["dense.bias"] = numbers.standard_normal(16, np.float32)
    save_file(tensors, directory / "model.safetensors")
    return tensors


class Linen(linen.Module):
    boxed: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = linen.initializers.ones
        return linen.Dense(
            16, name="dense", kernel_init=linen.with_partitioning(init, (None, "x")) if self.boxed else init
        )(x)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(8, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x)


def main(directory: Path) -> None:
    tensors = checkpoint(directory)
    x = np.arange(8, dtype=np.float32).reshape(1, 8)
    expected = x @ tensors["dense.weight"].T + tensors["dense.bias"]
    given = {"source": directory, "mapping": directory / "tiny.yaml"}
    mesh = jax.make_mesh((4,), ("x",))

    params = ckptc.load("tiny", like=jax.eval_shape(Linen().init, jax.random.key(0), x), **given)
    np.testing.assert_allclose(Linen().apply(params, x), expected, rtol=1e-5)
    print("linen")

    model = nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
    model = ckptc.load("tiny", like=model, **given)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5)
    print("nnx")

    boxed = jax.eval_shape(Linen(boxed=True).init, jax.random.key(0), x)
    params = ckptc.load("tiny", like=boxed, **given)
    assert isinstance(params["params"]["dense"]["kernel"], linen.Partitioned)
    np.testing.assert_array_equal(params["params"]["dense"]["kernel"].value, tensors["dense.weight"].T)
    print("boxes")

    # Devices that hold the same box have the same memory: giving the array away does not change what others see.
    everywhere = NamedSharding(mesh, PartitionSpec())
    like = {
        "dense": {
            n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=everywhere)
            for n, s in (("kernel", (8, 16)), ("bias", (16,)))
        }
    }
    first = ckptc.load("tiny", like=like, **given)["dense"]["kernel"]
    kept = [s.data for s in first.addressable_shards]
    assert len({k.unsafe_buffer_pointer() for k in kept}) == 1
    jax.block_until_ready(jax.jit(lambda a: a + 1, donate_argnums=0)(first))
    assert all(np.array_equal(k, tensors["dense.weight"].T) for k in kept if not k.is_deleted())
    print("donated")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
