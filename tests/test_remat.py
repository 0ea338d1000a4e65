"""What a layer keeps for the backward pass changes the memory, and nothing else."""

from functools import cache
from itertools import pairwise
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import UserError
from lora_mini_jax.models import Llama, LlamaConfig
from lora_mini_jax.models.bert import Bert, BertConfig
from lora_mini_jax.models.gpt2 import GPT2, GPT2Config
from lora_mini_jax.models.remat import POLICIES, Remat
from lora_mini_jax.options import Finetune
from tests.cases import random_params

NAMES = get_args(Remat)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 128)))
SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MODELS: dict[str, Any] = {
    "llama": Llama(LlamaConfig(**SHAPE, hidden_size=32, intermediate_size=48)),
    "gpt2": GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=64, n_positions=128)),
    "bert": Bert(BertConfig(**SHAPE, hidden_size=32, intermediate_size=48)),
}


@cache
def step(name: str, scan: bool, remat: str) -> Any:
    """Loss and gradients of a model, compiled."""
    model = MODELS[name].clone(scan_layers=scan, remat=remat)

    def loss(params: Any) -> Any:
        return sum(jnp.sin(leaf).mean() for leaf in jax.tree.leaves(
            model.apply({"params": params}, TOKENS)))  # fmt: skip

    return jax.jit(jax.value_and_grad(loss)).lower(params_of(name, scan)).compile()


@cache
def params_of(name: str, scan: bool) -> Any:
    return random_params(MODELS[name].clone(scan_layers=scan), TOKENS)


@pytest.mark.parametrize("remat", sorted(POLICIES))
@pytest.mark.parametrize(("name", "scan"), [("llama", True), ("llama", False), ("gpt2", True),
                                            ("bert", True)])  # fmt: skip
def test_every_name_gives_the_same_loss_and_gradients(name: str, scan: bool, remat: str):
    params = params_of(name, scan)
    value, grads = step(name, scan, "none")(params)
    value2, grads2 = step(name, scan, remat)(params)
    np.testing.assert_allclose(value2, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads2, grads)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_names_go_from_the_most_memory_to_the_least(name: str):
    """In a scan; layers that a CPU runs one by one are merged with their own recomputation."""
    taken = [step(name, True, remat).memory_analysis().temp_size_in_bytes for remat in NAMES]
    assert all(more > 1.1 * less for more, less in pairwise(taken)), taken


@pytest.mark.parametrize("wrong", [True, None, "all"])
def test_another_name_is_refused_with_those_there_are(wrong: Any):
    model = MODELS["llama"].clone(remat=wrong)
    with pytest.raises(UserError, match=f"remat is {wrong!r}: choose one of none, dots, dots_no"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def test_the_command_line_offers_the_same_names():
    assert get_args(Finetune.__dataclass_fields__["remat"].type) == NAMES
    assert set(POLICIES) == set(NAMES) - {"none"}
