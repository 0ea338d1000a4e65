"""DoRA takes the product with the kernel from the layer's output: no second one, bias or none."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_mini_jax as lmj
from lora_mini_jax.methods import DoRA
from tests.cases import draws, randomised

X = draws(jnp.zeros((2, 3, 4, 5)), 1.0)
RNGS = nnx.Rngs(0)


class More(nn.Dense):
    """A subclass whose call is its own: it adds what the library cannot know of."""

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        kernel = self.param("kernel", nn.initializers.ones, (inputs.shape[-1], self.features))
        return inputs @ kernel + inputs.sum()


class Scaled(nn.Dense):
    """A subclass that makes its output of its parent's."""

    def __call__(self, inputs: Any) -> Any:
        return 2 * super().__call__(inputs)


class ScaledNNX(nnx.Linear):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        return 2 * super().__call__(inputs, out_sharding)


def attention(bias: bool) -> nn.Module:
    """Kernels with several axes out (q, k, v), and with several in (the output's)."""
    return nn.MultiHeadDotProductAttention(num_heads=5, qkv_features=10, use_bias=bias)


LAYERS = {
    "dense": nn.Dense(6),
    "dense without a bias": nn.Dense(6, use_bias=False),
    "dense in bfloat16": nn.Dense(6, dtype=jnp.bfloat16),
    "two axes in and out": nn.DenseGeneral((3, 2), axis=(-2, -1)),
    "axes that are not the last": nn.DenseGeneral((3, 2), axis=(1, -1)),
    "a batch axis": nn.DenseGeneral(6, batch_dims=(0,)),
    "attention": attention(True),
    "attention without biases": attention(False),
    "a subclass": Scaled(6),
    "a subclass with a call of its own": More(6),
    "NNX": nnx.Linear(5, 6, rngs=RNGS),
    "NNX without a bias": nnx.Linear(5, 6, use_bias=False, rngs=RNGS),
    "NNX in bfloat16": nnx.Linear(5, 6, dtype=jnp.bfloat16, rngs=RNGS),
    "NNX, two axes": nnx.LinearGeneral((4, 5), (3, 2), axis=(-2, -1), rngs=RNGS),
    "NNX, a batch axis": nnx.LinearGeneral(5, 6, batch_axis={0: 2}, rngs=RNGS),
    "NNX, a subclass": ScaledNNX(5, 6, rngs=RNGS),
}
TWICE = {"a batch axis", "NNX, a batch axis", "a subclass with a call of its own"}


def setup(name: str, method: Any) -> tuple[Any, Any, Any, Any]:
    """The adapted call, the plain call, parameters with biases that are not 0, and an adapter."""
    model = LAYERS[name]
    if isinstance(model, nn.Module):
        params = draws(model.init(jax.random.key(0), X)["params"])
        targets = lmj.linen.targets(model, params, X)
        apply, plain = lmj.linen.adapt(model), lambda params, x: model.apply({"params": params}, x)
    else:
        params = draws(lmj.nnx.parameters(model))
        targets = lmj.nnx.targets(model, X)
        apply, zero = lmj.nnx.adapt(model), lmj.init(params, lmj.LoRA(rank=1), targets)
        plain = lambda params, x: apply(params, zero, x)  # noqa: E731
    return apply, plain, params, randomised(lmj.init(params, method, targets), 0.5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_call_equals_merged_weights(name: str) -> None:
    apply, plain, params, adapter = setup(name, DoRA(rank=2))
    y, wanted = apply(params, adapter, X), plain(lmj.merge(params, adapter), X)
    atol = 0.1 if y.dtype == jnp.bfloat16 else 2e-5
    np.testing.assert_allclose(np.float32(y), np.float32(wanted), rtol=1e-4, atol=atol)
    assert jnp.abs(y - plain(params, X)).max() > 0.3


@pytest.mark.parametrize("name", [name for name in LAYERS if "batch" not in name])
def test_a_batch_may_be_empty(name: str) -> None:
    apply, plain, params, adapter = setup(name, DoRA(rank=2))
    empty = X[:0]
    assert apply(params, adapter, empty).shape == plain(params, empty).shape


def dots(function: Any, *args: Any) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("dot_general[")


@pytest.mark.parametrize("name", LAYERS)
def test_no_product_with_the_kernel_is_made_twice(name: str) -> None:
    counts = []
    for method in (lmj.LoRA(rank=2), DoRA(rank=2)):
        apply, _, params, adapter = setup(name, method)

        def loss(trainable: Any, x: Any, apply=apply, params=params, adapter=adapter) -> Any:
            return apply(params, adapter.with_trainable(trainable), x).sum()

        counts.append(dots(jax.grad(loss, (0, 1)), adapter.trainable, X))
    lora, dora = counts
    kernels = len(adapter.trainable)
    # The product A B for the norm; and where the layer does not say what it adds, x W both ways.
    assert dora - lora == kernels * (3 if name in TWICE else 1)
