"""Natural mistakes in Python: each is one line that says what to give instead, without arrays."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import lora_mini_jax as lmj
from lora_mini_jax import Target, UserError
from lora_mini_jax.tree import flatten

X = jnp.ones((2, 8))
# Of no type, for each is given where it does not belong.
LINEN: Any = nn.Dense(4)
NNX: Any = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
PARAMS: Any = LINEN.init(jax.random.key(0), X)["params"]
SHAPES: Any = jax.eval_shape(lambda: PARAMS)
LORA: Any = lmj.LoRA(rank=2)
TARGETS = [Target("kernel", (8, 4))]
ADAPTER: Any = lmj.init(PARAMS, LORA, TARGETS)
TX = optax.sgd(0.1)
STATE: Any = lmj.TrainState.create(ADAPTER, TX)
GRADIENT = lmj.LoRAMini(rank=1, a=2, b=2, outer_init="gradient")
UNMADE = lmj.init(PARAMS, GRADIENT, TARGETS)
NAMED: Any = {"a": ADAPTER}
LIST: Any = [ADAPTER]


class MyDense(nn.Module):
    """A layer that is not Flax's, with its kernel in ``w``."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        w = self.param("w", nn.initializers.ones, (x.shape[-1], 4))
        return nn.Dense(4)(x @ w)


def rules(model: Any, given: Any) -> Any:
    params = model.init(jax.random.key(0), X)["params"]
    return lmj.linen.targets(model, params, X, rules=given)


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "swapped": (lambda: lmj.init(LORA, PARAMS, TARGETS), "dict is no method: .* after the param"),
    "shapes": (lambda: lmj.init(SHAPES, LORA, TARGETS), "shapes without arrays: .*eval_shape"),
    "a list in the parameters": (
        lambda: lmj.parameters({"ws": [X, X]}, []),
        "ws is a list, not an array: .* a name of its own",
    ),
    "a state of parameters": (lambda: lmj.TrainState.create(PARAMS, TX), "dict is no adap"),
    "a count of a state": (
        lambda: lmj.count(STATE),
        "TrainState is no adapter: .* of a state or a bank, its adapter",
    ),
    "a bank of a list": (lambda: lmj.bank(LIST), "a name for each: bank"),
    "a bank of states": (lambda: lmj.bank({"a": PARAMS}), "a dict is no adapter"),
    "combined by name": (lambda: lmj.combine(NAMED, [1.0], PARAMS), "no adapter"),
    "an NNX model merged": (lambda: lmj.merge(NNX, ADAPTER), "nnx.parameters"),
    "an NNX model called with": (lambda: lmj.nnx.adapt(NNX)(NNX, ADAPTER, X), "nnx.parameters"),
    "NNX in Linen's place": (lambda: lmj.linen.adapt(NNX), "no Linen module: .*_jax.nnx"),
    "NNX's targets by Linen": (lambda: lmj.linen.targets(NNX, {}, X), "no Linen module"),
    "Linen in NNX's place": (lambda: lmj.nnx.parameters(LINEN), "no NNX module: .*linen"),
    "parameters as rules": (lambda: lmj.linen.adapt(LINEN, PARAMS), "rules are {layer"),
    "a rule of another leaf": (
        lambda: rules(MyDense(), {MyDense: lmj.linen.dense}),
        "the rules for MyDense found no kernel: .* leaf='kernel'",
    ),
    "a rule of no layer": (
        lambda: rules(LINEN, {"mine.MyDens": lmj.linen.dense}),
        "the rules for mine.MyDens found no kernel",
    ),
    "an NNX rule of no layer": (
        lambda: lmj.nnx.targets(NNX, X, rules={nnx.Conv: lmj.nnx.dense}),
        "the rules for Conv found no kernel",
    ),
    "a sharding rule of no kernel": (
        lambda: lmj.sharding.of_params(
            lmj.sharding.make_mesh("data=-1"), PARAMS, TARGETS, {"kernell$": (None, "tensor")}
        ),
        "'kernell\\$' matches no kernel",
    ),
    "not calibrated, merged": (lambda: lmj.merge(PARAMS, UNMADE), "come from data: .*calibrate"),
    "not calibrated, saved": (lambda: lmj.save("nowhere", UNMADE, PARAMS), "come from data"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_mistake_is_one_short_line(name: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    call, said = CALLS[name]
    with pytest.raises(UserError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert list(tmp_path.iterdir()) == []


def test_frozen_parameters_stay_frozen() -> None:
    frozen: Any = FrozenDict(PARAMS)
    merged = lmj.merge(frozen, ADAPTER)
    back, _ = lmj.split(lmj.join(frozen, ADAPTER), ADAPTER)
    for tree in (merged, lmj.unmerge(merged, ADAPTER), lmj.join(frozen, ADAPTER), back):
        assert isinstance(tree, FrozenDict)
    assert isinstance(lmj.merge(PARAMS, ADAPTER), dict)
    jax.tree.map(np.testing.assert_array_equal, flatten(merged), flatten(frozen))


def test_what_a_notebook_shows_has_no_arrays() -> None:
    state, bank = STATE, lmj.bank({"a": ADAPTER, "b": ADAPTER})
    assert repr(state) == f"TrainState(step 0 of {ADAPTER!r})"
    assert repr(bank) == "Bank(2 adapters: a, b; 1 kernel: lora)"
    assert "Traced" not in str(jax.make_jaxpr(lambda s: (repr(s), s.step)[1])(state))


def test_every_module_is_found_by_completion() -> None:
    assert {"sharding", "checkpoint", "data", "quantized", "hardware"} <= set(dir(lmj))
