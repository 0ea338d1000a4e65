"""The methods that Hugging Face's PEFT has too: the same weights give the same outputs, gradients,
updates and merged weights."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import LoRA, TrainState, init, linen, make_train_step, merge, select, unmerge
from lora_mini_jax.methods import AdaLoRA, DoRA, MiSS, OLoRA, PiSSA, VeRA
from tests.pytorch import peft, torch

VOCAB, WIDTH, HIDDEN, OUT = 13, 8, 10, 6
RNG = np.random.default_rng(0)
IDS, GOAL = RNG.integers(0, VOCAB, (4, 5)), RNG.normal(size=(4, 5, OUT)).astype(np.float32)
WEIGHT = {"embed": "embedding", "up": "kernel", "down": "kernel"}
ALL, LINEAR = ("embed", "up", "down"), ("up", "down")


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


@dataclass(frozen=True)
class Row:
    """A method here and in PEFT: PEFT's configuration, the attribute of its layers that holds each
    of our trained leaves, which layers are adapted, and which leaves start at random."""

    method: Any
    config: str
    settings: dict[str, Any]
    leaves: dict[str, str]
    layers: tuple[str, ...] = LINEAR
    drawn: tuple[str, ...] = ()


def lora(method: Any, layers: tuple[str, ...] = ALL, **settings: Any) -> Row:
    leaves = {"A": "lora_A", "B": "lora_B"}
    if method.name == "dora":
        leaves["magnitude"] = "lora_magnitude_vector"
    return Row(method, "LoraConfig", {"r": 3, "lora_alpha": 5, **settings}, leaves, layers, ("A",))


def miss(mode: Any, rank: int, init_weights: Any) -> Row:
    settings = {"r": rank, "mini_r": 2, "init_weights": init_weights}
    return Row(MiSS(rank, mode, mini_rank=2), "MissConfig", settings, {"D": "miss_block"})


ROWS = {
    "lora": lora(LoRA(3, alpha=5.0)),
    "rslora": lora(LoRA(3, alpha=5.0, rslora=True), use_rslora=True),
    "dora": lora(DoRA(3, alpha=5.0), use_dora=True),
    "pissa": lora(PiSSA(3, alpha=5.0), LINEAR, init_lora_weights="pissa"),
    "olora": lora(OLoRA(3, alpha=5.0), LINEAR, init_lora_weights="olora"),
    "vera": Row(VeRA(3), "VeraConfig", {"r": 3}, {"d": "vera_lambda_d", "b": "vera_lambda_b"}),
    "adalora": Row(
        AdaLoRA(3, alpha=5.0, target_rank=2, total_steps=9, tinit=5, orth_reg_weight=0.0),
        "AdaLoraConfig",
        {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 9},
        {"A": "lora_A", "E": "lora_E", "B": "lora_B"},
        drawn=("A", "B"),
    ),
    "miss": miss("miss", 3, True),  # 3 divides neither 8 nor 10
    "miss-mini": miss("mini", 3, "mini"),
    "miss-bat": miss("bat", 2, "bat"),
}
LAYOUT = {"A": np.transpose, "B": np.transpose, "E": np.ravel}
"""PEFT's arrays to ours, by leaf; the others are alike."""


class Pair:
    """A PEFT model whose factors are moved from where they start, and the same weights here."""

    def __init__(self, name: str, noise: float = 0.2):
        torch.manual_seed(0)
        base, row = Torch(), ROWS[name]
        self.row, self.model, self.params = row, Flax(), weights(base)
        config = getattr(peft, row.config)(target_modules=list(row.layers), **row.settings)
        self.peft = peft.get_peft_model(base, config)
        self.layers = {name: getattr(self.peft.base_model.model, name) for name in row.layers}
        with torch.no_grad():
            for layer, leaf in product(self.layers.values(), row.leaves):
                tensor = self.tensor(layer, leaf)
                tensor.add_(noise * torch.randn_like(tensor))
        targets = select(linen.targets(self.model, self.params, IDS), list(row.layers))
        self.drawn = init(self.params, row.method, targets)
        self.adapter = self.drawn.with_trainable(self.theirs())
        if name == "vera":
            self.adapter = replace(self.adapter, frozen=self.vera_s())

    def tensor(self, layer: Any, leaf: str) -> Any:
        """PEFT's tensor for one of our leaves; an embedding's has a name of its own."""
        held = getattr(layer, self.row.leaves[leaf])
        if "default" not in held:
            held = getattr(layer, self.row.leaves[leaf].replace("lora_", "lora_embedding_"))
        return getattr(held["default"], "weight", held["default"])

    def theirs(self, of: Any = lambda tensor: tensor) -> dict[str, dict[str, Any]]:
        """PEFT's factors (or their gradients) under our names and in our layout."""
        return {
            f"{name}/{WEIGHT[name]}": {
                leaf: LAYOUT.get(leaf, np.asarray)(arrays(of(self.tensor(layer, leaf))))
                for leaf in self.row.leaves
            }
            for name, layer in self.layers.items()
        }

    def vera_s(self) -> dict[str, dict[str, Any]]:
        """VeRA's random factors: PEFT has two for all layers, and cuts them to each one's size."""
        return {
            f"{name}/kernel": {
                "A": arrays(layer.vera_A["default"])[:, : layer.in_features].T,
                "B": arrays(layer.vera_B["default"])[: layer.out_features].T,
            }
            for name, layer in self.layers.items()
        }

    def loss(self, params: Any, adapter: Any, batch: Any = IDS, key: Any = None) -> jax.Array:
        return ((linen.adapt(self.model)(params, adapter, batch) - GOAL) ** 2).mean()

    def peft_loss(self) -> Any:
        return ((self.peft(torch.tensor(IDS)) - torch.tensor(GOAL)) ** 2).mean()

    def peft_weights(self) -> Any:
        return weights(self.peft.base_model.model)

    def residual(self) -> Any:
        """Our weights less what PEFT takes out of them at the start."""
        none = {path: {leaf: x if leaf == "magnitude" else 0 * x for leaf, x in own.items()}
                for path, own in self.drawn.trainable.items()}  # fmt: skip
        return merge(self.params, self.drawn.with_trainable(none))


def arrays(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().copy()


def weights(model: Any) -> Any:
    """A PyTorch model's own weights in Flax layout."""
    layers = {n: getattr(getattr(model, n), "base_layer", getattr(model, n)) for n in ALL}
    return {"embed": {"embedding": arrays(layers["embed"].weight)}} | {
        name: {"kernel": arrays(layers[name].weight).T, "bias": arrays(layers[name].bias)}
        for name in LINEAR
    }


def close(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


every_row = pytest.mark.parametrize("name", ROWS)


@every_row
def test_outputs_loss_and_gradients_are_peft_s(name: str):
    pair = Pair(name)
    outputs = linen.adapt(pair.model)(pair.params, pair.adapter, IDS)
    close(outputs, arrays(pair.peft(torch.tensor(IDS))))
    plain = pair.model.apply({"params": pair.params}, IDS)
    assert np.abs(outputs - plain).max() > 0.01

    def loss(trainable: Any) -> jax.Array:
        return pair.loss(pair.params, pair.adapter.with_trainable(trainable))

    value, grads = jax.value_and_grad(loss)(pair.adapter.trainable)
    wanted = pair.peft_loss()
    wanted.backward()
    close(value, arrays(wanted))
    theirs = pair.theirs(lambda tensor: tensor.grad)
    assert all(np.abs(grad).max() > 1e-4 for grad in jax.tree.leaves(theirs))
    close(grads, theirs)


@pytest.mark.parametrize(("name", "optimiser"), [("lora", "sgd"), *((n, "adam") for n in ROWS)])
def test_three_updates_are_peft_s(name: str, optimiser: str):
    pair = Pair(name)
    tx = {"sgd": optax.sgd, "adam": optax.adam}[optimiser](0.05)
    parameters = [p for p in pair.peft.parameters() if p.requires_grad]
    tool = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser](parameters, lr=0.05)
    step, state = make_train_step(pair.loss, tx), TrainState.create(pair.adapter, tx)
    for _ in range(3):
        tool.zero_grad()
        loss = pair.peft_loss()
        loss.backward()
        tool.step()
        state, metrics = step(state, pair.params, IDS)
        close(metrics.loss, arrays(loss))
    close(state.adapter.trainable, pair.theirs())
    before, after = map(jax.tree.leaves, (pair.adapter.trainable, state.adapter.trainable))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(before, after, strict=True))


@every_row
def test_merged_and_unmerged_weights_are_peft_s(name: str):
    pair = Pair(name)
    merged = merge(pair.params, pair.adapter)
    pair.peft.merge_adapter()
    close(merged, pair.peft_weights())
    close(unmerge(merged, pair.adapter), pair.params)
    pair.peft.unmerge_adapter()
    close(pair.residual(), pair.peft_weights())


@every_row
def test_a_new_adapter_starts_as_peft_s_does(name: str):
    """But for random leaves; and PEFT starts a table's A at zero in place of its B."""
    pair = Pair(name, noise=0.0)
    close(pair.residual(), pair.peft_weights())
    for path, theirs in pair.theirs().items():
        ours = pair.drawn.trainable[path]
        if name in ("pissa", "olora"):  # a decomposition leaves the signs open
            close(ours["A"] @ ours["B"], theirs["A"] @ theirs["B"])
            close(np.abs(ours["A"]), np.abs(theirs["A"]))
        else:
            free = {*pair.row.drawn, *(("A", "B") if "embed" in path else ())}
            close({n: ours[n] for n in set(ours) - free}, {n: theirs[n] for n in set(ours) - free})


def test_a_new_lora_s_a_has_peft_s_distribution():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(200, 50))
    config = peft.LoraConfig(r=8, target_modules=["0"])
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    a = np.asarray(LoRA(rank=8).init(jax.random.key(0), jnp.zeros((200, 50)))[0]["A"])
    b = arrays(theirs.lora_A["default"].weight)
    np.testing.assert_allclose(np.abs(a).max(), np.abs(b).max(), rtol=0.02)
    np.testing.assert_allclose(a.std(), b.std(), rtol=0.06)
