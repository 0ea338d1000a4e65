"""The activations of feed-forward layers, by Hugging Face's names."""

from collections.abc import Callable
from functools import partial

import jax

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
"""``gelu`` is the exact one; ``gelu_new`` and ``gelu_pytorch_tanh`` its approximation by tanh;
``swish`` is another name of ``silu``."""
