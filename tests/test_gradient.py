"""A batch taken in parts gives what it gives at once, in less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import LoRA, TrainState, UserError, init, linen, make_train_step
from lora_mini_jax.methods import AdaLoRA
from tests.cases import VOCAB, randomised, setup
from tests.test_laws import close

TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, (8, 5)))
COUNTS = jnp.asarray(np.random.default_rng(4).integers(0, 2, (8, 5)), bool)


def made(method: Any, parts: int, has_aux: bool = True) -> tuple[Any, TrainState]:
    """A step of so many parts, and where it starts."""
    at = setup()
    apply = linen.adapt(at.model)

    def loss_fn(params: Any, adapter: Any, batch: Any, key: Any) -> Any:
        tokens, counts = batch
        chances = jax.nn.log_softmax(apply(params, adapter, tokens))
        losses = -jnp.take_along_axis(chances, tokens[..., None], -1)[..., 0]
        mean = (losses * counts).sum() / jnp.maximum(counts.sum(), 1)
        return (mean, counts.sum()) if has_aux else losses.mean()

    tx = optax.sgd(0.1)
    state = TrainState.create(randomised(init(at.params, method, at.targets), 0.1), tx)
    return make_train_step(loss_fn, tx, has_aux=has_aux, parts=parts), state


def updated(method: Any, parts: int, batch: Any = (TOKENS, COUNTS), has_aux: bool = True) -> Any:
    """What one update reports, and the trained leaves after it."""
    step, state = made(method, parts, has_aux)
    state, metrics = step(state, setup().params, batch)
    return metrics, state.adapter.trainable


@pytest.mark.parametrize(
    ("method", "has_aux"),
    [(LoRA(rank=2), True), (AdaLoRA(rank=3, target_rank=2, total_steps=9), False)],
)
def test_parts_add_up_to_the_whole(method: Any, has_aux: bool):
    # The rows have different numbers of tokens that count, so an unweighted mean would be another.
    whole, parts = updated(method, 1, has_aux=has_aux), updated(method, 4, has_aux=has_aux)
    close(parts[1], whole[1], 1e-5)
    np.testing.assert_allclose(parts[0].loss, whole[0].loss, rtol=1e-5)
    np.testing.assert_allclose(parts[0].grad_norm, whole[0].grad_norm, rtol=1e-5)
    assert (parts[0].aux == COUNTS.sum()) if has_aux else (parts[0].aux is None)


def test_four_parts_need_less_than_half_the_memory():
    def temporaries(parts: int) -> int:
        step, state = made(LoRA(rank=2), parts)
        tokens = jax.ShapeDtypeStruct((64, 20), jnp.int32)
        batch = tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.bool)
        return (
            step.lower(state, setup().params, batch).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporaries(4) < temporaries(1) / 2


def test_a_batch_without_a_token_that_counts_changes_nothing():
    metrics, after = updated(LoRA(rank=2), 4, (TOKENS, jnp.zeros_like(COUNTS)))
    assert metrics.loss == metrics.grad_norm == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="multiple of 3"):
        updated(LoRA(rank=2), 3)
    with pytest.raises(UserError, match="parts is 0"):
        made(LoRA(rank=2), 0)
