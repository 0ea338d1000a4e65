"""LoRA equals Hugging Face's PEFT: the same weights give the same outputs, gradients and steps."""

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import (
    LoRA,
    TrainState,
    init,
    linen,
    make_train_step,
    merge,
)

if os.environ.get("CI"):
    import peft
    import torch
else:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

VOCAB, WIDTH, HIDDEN, OUT = 13, 8, 10, 6
METHOD = LoRA(rank=3, alpha=5.0)
NAMES = ("embed", "up", "down")
RNG = np.random.default_rng(0)
IDS, GOAL = RNG.integers(0, VOCAB, (4, 5)), RNG.normal(size=(4, 5, OUT)).astype(np.float32)


class Flax(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Dense(HIDDEN, name="up")(nn.Embed(VOCAB, WIDTH, name="embed")(ids))
        return nn.Dense(OUT, name="down")(jnp.tanh(x))


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, OUT)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.embed(ids))))


def arrays(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().copy()


def torch_loss(model: Any) -> Any:
    return ((model(torch.tensor(IDS)) - torch.tensor(GOAL)) ** 2).mean()


class Pair:
    """A PEFT model with random A and B, and the same weights here."""

    def __init__(self):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(NAMES), lora_dropout=0.0)
        self.peft = peft.get_peft_model(Torch(), config)
        self.layers = {name: getattr(self.peft.base_model.model, name) for name in NAMES}
        with torch.no_grad():
            for layer in self.layers.values():
                for factor in self._factors(layer):
                    factor.copy_(0.3 * torch.randn_like(factor))
        weights = {name: layer.get_base_layer() for name, layer in self.layers.items()}
        self.params: Any = {
            "embed": {"embedding": arrays(weights["embed"].weight)},
            **{
                name: {"kernel": arrays(weights[name].weight).T, "bias": arrays(weights[name].bias)}
                for name in ("up", "down")
            },
        }
        self.model = Flax()
        targets = linen.targets(self.model, self.params, IDS)
        assert len(targets) == 3
        self.adapter = init(self.params, METHOD, targets).with_trainable(self.theirs())

    @staticmethod
    def _factors(layer: Any) -> tuple[Any, Any]:
        """PEFT's A ``(rank, in)`` and B ``(out, rank)``: an embedding has its own names."""
        if "default" in layer.lora_embedding_A:
            return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def theirs(self, of: Any = arrays) -> dict[str, dict[str, Any]]:
        """PEFT's factors (or their gradients) under our names and in our layout."""
        found = {}
        for name, layer in self.layers.items():
            a, b = (jnp.asarray(of(factor).T) for factor in self._factors(layer))
            leaf = "embedding" if name == "embed" else "kernel"
            found[f"{name}/{leaf}"] = {"A": a, "B": b}
        return found

    def loss(self, params: Any, adapter: Any, batch: Any = IDS, key: Any = None) -> jax.Array:
        return ((linen.adapt(self.model)(params, adapter, batch) - GOAL) ** 2).mean()


def close(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def test_outputs_and_loss_are_peft_s(pair: Pair):
    close(linen.adapt(pair.model)(pair.params, pair.adapter, IDS),
          arrays(pair.peft(torch.tensor(IDS))))  # fmt: skip
    close(pair.loss(pair.params, pair.adapter), arrays(torch_loss(pair.peft)))


def test_gradients_of_both_factors_are_peft_s(pair: Pair):
    def loss(trainable: Any) -> jax.Array:
        return pair.loss(pair.params, pair.adapter.with_trainable(trainable))

    pair.peft.zero_grad()
    torch_loss(pair.peft).backward()
    theirs = pair.theirs(lambda factor: arrays(factor.grad))
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(theirs))
    close(jax.grad(loss)(pair.adapter.trainable), theirs)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_three_steps_are_peft_s(optimiser: str):
    pair = Pair()
    tx = {"sgd": optax.sgd, "adam": optax.adam}[optimiser](0.05)
    parameters = [p for p in pair.peft.parameters() if p.requires_grad]
    tool = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser](parameters, lr=0.05)
    step, state = make_train_step(pair.loss, tx), TrainState.create(pair.adapter, tx)
    for _ in range(3):
        tool.zero_grad()
        loss = torch_loss(pair.peft)
        loss.backward()
        tool.step()
        state, metrics = step(state, pair.params, IDS)
        close(metrics.loss, arrays(loss))
    close(state.adapter.trainable, pair.theirs())
    before, after = (x.trainable["up/kernel"]["A"] for x in (pair.adapter, state.adapter))
    assert np.abs(after - before).max() > 1e-3


def test_merged_weights_are_peft_s():
    pair = Pair()
    ours, theirs = merge(pair.params, pair.adapter), pair.peft.merge_and_unload()
    close(ours["embed"]["embedding"], arrays(theirs.embed.weight))
    for name in ("up", "down"):
        close(ours[name]["kernel"], arrays(getattr(theirs, name).weight).T)


def test_a_new_lora_starts_as_peft_s_does():
    """The same law for A (uniform, the fan-in's bound) and zeros for B."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(200, 50))
    config = peft.LoraConfig(r=8, target_modules=["0"])
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    kernel = jnp.zeros((200, 50))
    a = np.asarray(LoRA(rank=8).init(jax.random.key(0), kernel)[0]["A"])
    b = arrays(theirs.lora_A["default"].weight)
    assert not theirs.lora_B["default"].weight.any()
    np.testing.assert_allclose(np.abs(a).max(), np.abs(b).max(), rtol=0.02)
    np.testing.assert_allclose(a.std(), b.std(), rtol=0.06)
