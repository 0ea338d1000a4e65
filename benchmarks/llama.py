"""What the benchmarks train: a Llama of random weights, on random tokens."""

from typing import Any

import jax

from benchmarks.row import Options
from lora_mini_jax.models import Llama, LlamaConfig


def llama(size: Options, **settings: Any) -> Llama:
    """The model of that size; ``settings`` are Llama's own, such as ``scan_layers``."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.ff or 4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 64),
    )
    return Llama(config, dtype=size.dtype, param_dtype=size.dtype, **settings)


def drawn(size: Options, **settings: Any) -> tuple[Llama, Any, jax.Array]:
    """The model, its parameters, and tokens (batch, length + 1) int32; the same at every call."""
    model, shape = llama(size, **settings), (size.batch, size.length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, size.vocab)
    return model, jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])["params"], tokens
