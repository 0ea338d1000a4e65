"""What is said of a step before there are arrays is what the arrays then take."""

from typing import Any

import jax
import optax
import pytest

from lora_mini_jax import TrainState, init, make_train_step, sharding
from lora_mini_jax.forecast.collectives import collectives
from lora_mini_jax.forecast.footprint import AS_ON_ACCELERATORS, footprint
from lora_mini_jax.methods import LoRA, LoRAMini, SwitchLoRA
from tests.test_sharding import TOKENS, loss_of, made, on_mesh


def on_one_device(tree: Any) -> int:
    """Bytes of the shards on the first device."""
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(tree)]
    return sum(shard.nbytes for shard in shards)


@pytest.mark.parametrize("method", [LoRAMini(rank=2, a=4, b=4), SwitchLoRA(rank=2)])
def test_bytes_of_arguments_and_exchanges_are_those_of_the_real_step(method: Any):
    model, params, targets = made()
    tx, mesh = optax.adam(1e-2), sharding.make_mesh("fsdp=4,tensor=2")
    adapter = init(params, method, targets)
    shapes = jax.eval_shape(lambda: (params, TOKENS))
    params, adapter, batch = on_mesh("fsdp=4,tensor=2", params, adapter, targets)
    loss = loss_of(model, params)
    found = footprint(loss, tx, adapter.sites, targets, *shapes, mesh, has_aux=True)

    state = sharding.put_on_mesh(mesh, TrainState.create(adapter, tx))
    step: Any = make_train_step(loss, tx, has_aux=True, like=state)
    compiled = step.lower(state, params, batch).compile(AS_ON_ACCELERATORS)
    assert found.params == on_one_device(params)
    assert found.adapter == on_one_device(adapter)
    assert found.optimizer == on_one_device(state.opt_state)
    assert found.batch == TOKENS.nbytes // 4
    assert found.temporaries == compiled.memory_analysis().temp_size_in_bytes
    exchanged = collectives(compiled)
    assert sum(found.exchanged.values()) == sum(each.bytes * each.times for each in exchanged) > 0


def test_flops_are_those_of_the_products_of_all_rows():
    model, params, targets = made()
    mesh, method = sharding.make_mesh("data=8"), LoRA(rank=2)  # no products of factors alone
    adapter = init(params, method, targets)

    def flops(rows: int) -> int:
        shapes = jax.eval_shape(lambda: params), jax.ShapeDtypeStruct((rows, 5), TOKENS.dtype)
        tx = optax.sgd(1.0)
        what = loss_of(model, params), tx, adapter.sites, targets, *shapes, mesh
        return footprint(*what, has_aux=True).flops

    assert flops(16) == 2 * flops(8)
