"""Scores of labels are those that whole logits give, without whole logits in memory."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import init, linen
from lora_mini_jax.methods import LoRA
from lora_mini_jax.models import GPT2, T5, GPT2Config, Llama, LlamaConfig, T5Config
from lora_mini_jax.models.scoring import CHUNK
from lora_mini_jax.scores import score
from tests.cases import random_params, randomised
from tests.test_laws import close

VOCAB, TIME = 20000, CHUNK + 44
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip


def models() -> dict[str, Any]:
    small: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 1,
        "n_positions": 1024,
    }
    t5 = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {
        "untied": Llama(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
        "tied": Llama(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        "gpt2": GPT2(GPT2Config(**small), jnp.float32, jnp.float32),
        "t5": T5(t5),
        "t5 untied": T5(replace(t5, tie_word_embeddings=False)),
    }


@pytest.mark.parametrize("name", ["untied", "tied", "gpt2", "t5", "t5 untied"])
def test_scores_and_gradients_are_those_of_whole_logits(name: str):
    model = models()[name]
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, TIME)))
    labels, shapes = jnp.roll(tokens, -1, 1), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    read = (tokens[:, :5],) if name.startswith("t5") else ()
    params = random_params(model, *(shapes for _ in read), shapes, scale=0.1)
    # The head is adapted too: its factors must come into the scan.
    heads = ("lm_head", "embed", "wte", "shared")
    targets = linen.targets(model, params, *read, tokens)
    chosen = [t for t in targets if any(head in t.path for head in heads)]
    adapter = randomised(init(params, LoRA(rank=2), chosen), 0.1)
    apply = linen.adapt(model)

    def in_chunks(trainable: Any, tokens: Any, labels: Any) -> Any:
        now = adapter.with_trainable(trainable)
        found = apply(params, now, *read, tokens, labels=labels)
        return found.losses.sum(), found

    def whole(trainable: Any, tokens: Any, labels: Any) -> Any:
        found = score(apply(params, adapter.with_trainable(trainable), *read, tokens), labels)
        return found.losses.sum(), found

    steps = [jax.jit(jax.value_and_grad(f, has_aux=True)) for f in (in_chunks, whole)]
    (a, grads_a), (b, grads_b) = (step(adapter.trainable, tokens, labels) for step in steps)
    close(a[1].losses, b[1].losses)
    assert (a[1].right == b[1].right).all()
    close(grads_a, grads_b, 1e-4)
    if name == "untied":
        long = jax.ShapeDtypeStruct((1, 4 * CHUNK), jnp.int32)
        compiled = [step.lower(adapter.trainable, long, long).compile() for step in steps]
        memory: list[Any] = [each.memory_analysis() for each in compiled]
        small, large = (each.temp_size_in_bytes for each in memory)
        logits = long.size * VOCAB * 4
        assert small < logits < 2 * logits < large


def test_a_long_row_and_a_large_vocabulary_take_a_fraction_of_their_logits():
    vocab, time = 131_072, 8192
    sizes: dict[str, Any] = LLAMA | {"vocab_size": vocab, "max_position_embeddings": time}
    model, tokens = Llama(LlamaConfig(**sizes)), jax.ShapeDtypeStruct((1, time), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    targets = linen.targets(model, shapes, tokens)
    adapter = jax.eval_shape(lambda p: init(p, LoRA(rank=2), targets), shapes)
    apply = linen.adapt(model)

    def loss(trainable: Any, params: Any, frozen: Any, tokens: Any) -> Any:
        adapter = frozen.with_trainable(trainable)
        return apply(params, adapter, tokens, labels=tokens).losses.mean()

    step = jax.jit(jax.grad(loss)).lower(adapter.trainable, shapes, adapter, tokens).compile()
    memory: Any = step.memory_analysis()
    assert memory.temp_size_in_bytes < time * vocab * 4 / 8
