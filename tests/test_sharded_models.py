"""The models of this package on a mesh: how their kernels are split, and that nothing changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import LoRA, init, linen, select, sharding
from lora_mini_jax.models import Llama, LlamaConfig
from lora_mini_jax.models.bert import Bert, BertConfig
from lora_mini_jax.models.deberta import DebertaV2, DebertaV2Config
from lora_mini_jax.models.families import FAMILIES
from lora_mini_jax.models.gpt2 import GPT2, GPT2Config
from lora_mini_jax.models.roberta import Roberta, RobertaConfig, XLMRoberta, XLMRobertaConfig
from lora_mini_jax.models.t5 import T5, T5Config
from tests.cases import draws, random_params

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 12)))
SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
WIDE = {"hidden_size": 32, "intermediate_size": 48}
MODELS: dict[str, Any] = {
    "llama": Llama(LlamaConfig(**SHAPE, **WIDE)),
    "gpt2": GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=64, n_positions=128)),
    "t5": T5(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
    "bert": Bert(BertConfig(**SHAPE, **WIDE)),
    "roberta": Roberta(RobertaConfig(**SHAPE, **WIDE, type_vocab_size=1)),
    "xlm-roberta": XLMRoberta(XLMRobertaConfig(**SHAPE, **WIDE, type_vocab_size=1)),
    "deberta": DebertaV2(DebertaV2Config(**SHAPE, **WIDE)),
}
BACK = ("o_proj", "down_proj", "c_proj", "SelfAttention/o", "EncDecAttention/o", "wo",
        "attention/output/dense", "output/dense")  # fmt: skip
"""What takes a block's inner features back to the stream that all blocks share."""


def test_every_model_is_here():
    assert {type(model) for model in MODELS.values()} == {family.module for family in FAMILIES}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_on_a_mesh_computes_what_it_computes_on_one_device(name: str):
    model = MODELS[name]
    inputs = (TOKENS, TOKENS) if name == "t5" else (TOKENS,)
    params = random_params(model, *inputs, scale=0.1)
    targets = linen.targets(model, params, *inputs)
    adapter = init(params, LoRA(rank=4), select(targets, "all-linear"))
    adapter = adapter.with_trainable(draws(adapter.trainable, 0.05))

    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    places = sharding.of_params(mesh, params, targets)
    for target in select(targets, "all-linear"):
        module = target.path.removesuffix("/kernel")
        split = tuple(jax.tree.leaves(tuple(_at(places, target.path).spec)))
        back = module.endswith(BACK)
        wanted = ("tensor", "fsdp") if back else ("fsdp", "tensor")
        assert split == (wanted if min(target.shape) > 1 else wanted[:1]), target.path

    def outputs(params: Any, *given: Any) -> Any:
        apply = jax.jit(linen.adapt(model, rows=sharding.of_rows(params)))
        return jax.tree.leaves(apply(params, *given))

    alone = outputs(params, adapter, *inputs)
    together = outputs(
        jax.device_put(params, places),
        jax.device_put(adapter, sharding.of_adapter(mesh, adapter)),
        *(jax.device_put(x, sharding.of_batch(mesh)) for x in inputs),
    )
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def _at(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree
