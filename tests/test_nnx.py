"""The NNX front door: the same adapters, laws and numbers as Linen's."""

import subprocess
import sys
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lora_mini_jax import (
    LoRA,
    LoRAMini,
    TrainState,
    UserError,
    init,
    linen,
    load,
    make_train_step,
    merge,
    save,
    select,
)
from lora_mini_jax import nnx as front
from lora_mini_jax.call import views
from lora_mini_jax.methods import DoRA, Full, MiSS, SwitchLoRA, VeRA
from tests.cases import draws, randomised

WIDTH, HEADS, LAYERS, VOCAB = 8, 2, 2, 11
IDS = jnp.array([[1, 4, 2, 9], [3, 3, 0, 10]])
METHODS = (LoRAMini(rank=2, a=4, b=3), DoRA(rank=2), MiSS(rank=3), SwitchLoRA(rank=2), VeRA(rank=3))


class Block(nnx.Module):
    """One layer of every kind that has a rule."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 12, rngs=rngs)
        self.heads = nnx.Einsum("btnh,nhk->btnk", (HEADS, 6, 6), rngs=rngs)
        self.down = nnx.LinearGeneral((HEADS, 6), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(x)
        h = jnp.tanh(self.up(x)).reshape(*x.shape[:-1], HEADS, 6)
        return x + self.down(self.heads(h))


class Model(nnx.Module):
    """Embedded ids through blocks, in a list or scanned, back to the tied table."""

    def __init__(self, scan: bool, rngs: nnx.Rngs) -> None:
        self.scan = scan
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        if scan:
            stacked = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block, in_axes=0, out_axes=0))
            self.blocks: Any = stacked(rngs)
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        if self.scan:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.blocks
            )
        else:
            for block in self.blocks:
                x = block(x)
        return self.embed.attend(x)


@cache
def setup(scan: bool) -> Any:
    """A model, its parameters, its targets, and its compiled plain call."""
    model = Model(scan, nnx.Rngs(0))
    front.update(model, draws(front.parameters(model)))
    graph, state, _ = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def plain(params: Any) -> jax.Array:
        fresh = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
        front.update(fresh, params)
        return fresh(IDS)

    return model, front.parameters(model), front.targets(model, IDS), plain


@pytest.mark.parametrize(("scan", "method"), [(True, m) for m in METHODS] + [(False, METHODS[0])])
def test_the_adapted_call_equals_merged_weights(scan: bool, method: Any) -> None:
    model, params, targets, plain = setup(scan)
    assert len(targets) == 1 + 7 * (1 if scan else LAYERS)
    apply = jax.jit(front.adapt(model))
    start = init(params, method, targets)
    np.testing.assert_allclose(apply(params, start, IDS), plain(params), atol=2e-5)
    adapter = randomised(start)
    y = apply(params, adapter, IDS)
    assert jnp.abs(y - plain(params)).max() > 0.05
    np.testing.assert_allclose(y, plain(merge(params, adapter)), rtol=1e-4, atol=5e-5)
    jax.tree.map(np.testing.assert_array_equal, front.parameters(model), params)  # untouched


def test_scanned_layers_equal_a_loop() -> None:
    loop, scan = Model(False, nnx.Rngs(0)), Model(True, nnx.Rngs(0))
    params = draws(front.parameters(loop))
    blocks = jax.tree.map(lambda *x: jnp.stack(x), *params["blocks"].values())
    stacked = {"embed": params["embed"], "blocks": blocks}
    adapters = []
    for model, own in ((loop, params), (scan, stacked)):
        targets = [t for t in front.targets(model, IDS) if t.kind == "linear"]
        adapters.append(randomised(init(own, LoRA(rank=2), targets)))
    for path, leaves in adapters[1].trainable.items():
        name = path.removeprefix("blocks/")
        for i in range(LAYERS):
            adapters[0].trainable[f"blocks/{i}/{name}"] = {n: x[i] for n, x in leaves.items()}
    np.testing.assert_allclose(
        jax.jit(front.adapt(loop))(params, adapters[0], IDS),
        jax.jit(front.adapt(scan))(stacked, adapters[1], IDS),
        rtol=1e-4, atol=2e-5,
    )  # fmt: skip


def test_training_touches_the_adapter_alone_compiles_once_and_survives_saving(tmp_path) -> None:
    model = Model(True, nnx.Rngs(0))
    params = front.parameters(model)
    targets = select(front.targets(model, IDS), "attn|up|down")
    apply, traced = front.adapt(model), []

    def loss(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
        traced.append(1)
        logits = apply(params, adapter, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean()

    tx = optax.adam(3e-2)
    step = make_train_step(loss, tx)
    state = TrainState.create(init(params, LoRAMini(rank=2, a=4, b=4), targets), tx)
    losses = []
    for _ in range(20):
        state, value = step(state, params, IDS)
        losses.append(float(value.loss))
    assert losses[-1] < 0.8 * losses[0]
    assert len(traced) == 1
    save(tmp_path / "adapter", state.adapter, params)
    again = load(tmp_path / "adapter", params)
    jax.tree.map(np.testing.assert_array_equal, again, state.adapter)


def test_the_numbers_are_those_of_linen() -> None:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.MultiHeadDotProductAttention(HEADS, name="attn")(x)
            return nn.Dense(5, name="out")(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.out = nnx.Linear(WIDTH, 5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(self.attn(x))

    x, model, other = draws(jnp.zeros((2, 4, WIDTH)), 1.0), Linen(), Nnx(nnx.Rngs(0))
    params = draws(front.parameters(other))
    here, there = front.targets(other, x), linen.targets(model, params, x)
    assert sorted(here, key=lambda t: t.path) == sorted(there, key=lambda t: t.path)
    adapter = randomised(init(params, LoRAMini(rank=2, a=4, b=4), there))
    np.testing.assert_allclose(
        front.adapt(other)(params, adapter, x), linen.adapt(model)(params, adapter, x), atol=1e-6
    )


class Scaled(nnx.Linear):
    """A user's layer that builds on its parent's call."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return 2 * super().__call__(inputs, out_sharding)


class Own(nnx.Module):
    """A user's layer that builds on nothing, with a name of its own for the kernel."""

    def __init__(self) -> None:
        self.weight = nnx.Param(draws(jnp.zeros((WIDTH, 5))))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...]


class Table(nnx.Module):
    """A tied table whose two calls have names of their own."""

    def __init__(self) -> None:
        self.rows = nnx.Param(draws(jnp.zeros((VOCAB, WIDTH))))

    def encode(self, ids: jax.Array) -> jax.Array:
        return self.rows[...][ids]

    def decode(self, x: jax.Array) -> jax.Array:
        return x @ self.rows[...].T


class Tied(nnx.Module):
    """Looks ids up and reads them back through an einsum of the user's own."""

    def __init__(self) -> None:
        self.table, self.mix = Table(), Mix()

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.mix(self.table.encode(ids))
        return self.table.decode(jnp.tanh(x.reshape(*ids.shape, WIDTH)))


class Mix(nnx.Module):
    """An einsum with a name of its own for the kernel."""

    def __init__(self) -> None:
        self.einsum_str = "btd,dnh->btnh"
        self.w = nnx.Param(draws(jnp.zeros((WIDTH, 2, WIDTH // 2))))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.einsum_str, x, self.w[...])


def test_layers_of_the_users_own() -> None:
    x = draws(jnp.zeros((2, WIDTH)), 1.0)
    scaled = Scaled(WIDTH, 5, rngs=nnx.Rngs(0))
    assert front.targets(Own(), x) == ()
    rules = {Own: lambda module, method, args: views.View(args[0], leaf="weight")}
    for model, given in ((scaled, {}), (Own(), rules)):
        params = front.parameters(model)
        adapter = randomised(init(params, LoRA(rank=2), front.targets(model, x, rules=given)))
        y = front.adapt(model, given)(params, adapter, x)
        assert jnp.abs(y - model(x)).max() > 0.05
        front.update(model, merge(params, adapter))
        np.testing.assert_allclose(y, model(x), atol=1e-5)


def table(module: Any, method: str, args: tuple) -> views.View | None:
    use = {"encode": "rows", "decode": "transposed"}.get(method)
    return views.View(args[0], leaf="rows", use=use, kind="embed") if use else None


def test_layers_with_names_of_their_own_for_calls_and_kernels() -> None:
    model, rules = Tied(), {Table: table, Mix: partial(front.einsum, leaf="w")}
    targets = front.targets(model, IDS, rules=rules)
    assert [t.path for t in targets] == ["mix/w", "table/rows"]
    params = front.parameters(model)
    adapter = randomised(init(params, LoRA(rank=2), targets), 0.5)
    y, plain = front.adapt(model, rules)(params, adapter, IDS), model(IDS)
    front.update(model, merge(params, adapter))
    np.testing.assert_allclose(y, model(IDS), rtol=1e-5, atol=1e-5)
    assert jnp.abs(y - plain).max() > 0.1


class Noisy(nnx.Module):
    """State that is no parameter: running statistics and a random stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.linear(x)))


def test_other_state_is_given_and_returned() -> None:
    model, x = Noisy(nnx.Rngs(0, dropout=1)), draws(jnp.zeros((6, WIDTH)), 1.0)
    params = front.parameters(model)
    adapter = init(params, LoRA(rank=2), front.targets(model, x))
    apply = jax.jit(front.adapt(model), static_argnames="mutable")
    first, variables = apply(params, adapter, x, mutable=True)
    np.testing.assert_array_equal(apply(params, adapter, x, mutable=True)[0], first)
    second = apply(params, adapter, x, variables=variables)
    assert jnp.abs(first - second).max() > 0.1  # another draw of the dropout
    np.testing.assert_allclose(first, model(x), atol=1e-6)
    np.testing.assert_allclose(second, model(x), atol=1e-6)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, nnx.split(model, nnx.Param, ...)[2]
    )


class Shared(nnx.Module):
    """Two layers with one kernel, and one of its own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a, self.b, self.c = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))
        self.b.kernel = self.a.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c(self.b(jnp.tanh(self.a(x))))


def test_a_kernel_of_two_layers_is_not_adapted_in_one_of_them() -> None:
    model, x = Shared(nnx.Rngs(0)), jnp.ones((2, WIDTH))
    params, targets = front.parameters(model), front.targets(model, x)
    with pytest.raises(UserError, match=r"a/kernel .* the model uses it past this layer too"):
        init(params, LoRA(rank=2), targets)
    for method, chosen in ((LoRA(rank=2), select(targets, ["c/kernel"])), (Full(), targets)):
        adapter = randomised(init(params, method, chosen))
        y = front.adapt(model)(params, adapter, x)
        front.update(model, merge(params, adapter))
        np.testing.assert_allclose(y, model(x), rtol=1e-4, atol=1e-5)
        front.update(model, params)


def test_parameters_that_do_not_fit_are_not_written() -> None:
    model = nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0))
    before = front.parameters(model)
    wrong = {"kernel": jnp.ones((4, WIDTH)), "kernl": jnp.ones(1)}
    said = r"bias is missing; kernl is none of the model's; kernel is \(4, 8\), not \(8, 4\)"
    with pytest.raises(UserError, match=said):
        front.update(model, wrong)
    jax.tree.map(np.testing.assert_array_equal, front.parameters(model), before)


def test_a_model_of_shapes_alone_is_planned_with() -> None:
    model = nnx.eval_shape(lambda: nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)))
    params, x = front.parameters(model), jnp.ones((1, WIDTH))
    assert params["kernel"] == jax.ShapeDtypeStruct((WIDTH, 4), jnp.float32)
    targets = front.targets(model, x)
    adapter = jax.eval_shape(lambda params: init(params, LoRA(rank=2), targets), params)
    assert adapter.trainable["kernel"]["A"].shape == (WIDTH, 2)


def test_what_a_call_never_used_is_named() -> None:
    class Idle(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.used, self.idle = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2))

        def __call__(self, x: jax.Array, both: bool = False) -> jax.Array:
            return self.used(self.idle(x) if both else x)

    model, x = Idle(nnx.Rngs(0)), jnp.ones((1, WIDTH))
    params = front.parameters(model)
    adapter = init(params, LoRA(rank=2), front.targets(model, x, both=True))
    assert front.adapt(model)(params, adapter, x, both=True).shape == (1, WIDTH)
    with pytest.raises(UserError, match=r"used 1 of 2 adapted kernels; never used: .*idle/kernel"):
        front.adapt(model)(params, adapter, x)


def test_the_core_does_without_nnx() -> None:
    code = "import sys, lora_mini_jax; sys.exit('flax.nnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Dropping(nnx.Module):
    """A layer with dropout of the model's own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.drop = nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.drop(self.up(x))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.up(x)


class Stack(nnx.Module):
    """The same in layers that are scanned."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        split = nnx.split_rngs(splits=LAYERS)
        self.layers: Any = split(nnx.vmap(Dropping, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def call(x: jax.Array, layer: Dropping) -> jax.Array:
            return layer(x)

        return nnx.scan(call, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


@pytest.mark.parametrize("kind", [Dropping, Stack])
def test_the_models_own_dropout_is_drawn_from_the_calls_key(kind: Any) -> None:
    model, x = kind(nnx.Rngs(0)), draws(jnp.zeros((4, 8)), 1.0)
    params, targets = front.parameters(model), front.targets(model, x)
    adapter = init(params, LoRA(rank=2), targets)
    apply = front.adapt(model)
    with pytest.raises(UserError, match=r"draws random numbers .* give the call a dropout_key"):
        apply(params, adapter, x)
    call = jax.jit(lambda key: apply(params, adapter, x, dropout_key=key))
    one, other = call(jax.random.key(1)), call(jax.random.key(2))
    np.testing.assert_array_equal(one, call(jax.random.key(1)))
    assert (one != other).any()
    if kind is Stack:  # and its layers do not share a mask
        zero = jax.tree.map(jnp.zeros_like, params)
        zero["layers"]["up"]["bias"] += 1
        kept = apply(zero, adapter, jnp.zeros((64, 8)), dropout_key=3) / 2
        assert set(np.unique(kept)) == set(range(LAYERS + 1))
    model.eval()
    np.testing.assert_allclose(front.adapt(model)(params, adapter, x), model(x), atol=1e-6)


def test_a_recurrent_model_needs_no_key_for_its_first_state() -> None:
    rngs = nnx.Rngs(0)
    cell = nnx.LSTMCell(6, 4, rngs=rngs)
    model, x = nnx.RNN(cell, rngs=rngs), draws(jnp.zeros((2, 5, 6)), 1.0)
    params, targets = front.parameters(model), front.targets(model, x)
    adapter = randomised(init(params, LoRA(rank=2), targets))
    front.update(model, merge(params, adapter))
    np.testing.assert_allclose(front.adapt(model)(params, adapter, x), model(x), atol=1e-5)


class Reading(nnx.Module):
    """A head that is made of the table by hand, beside a layer that is called."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table, self.up = nnx.Embed(7, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.up(self.table(ids)) @ self.table.embedding[...].T


def test_a_table_that_the_model_reads_itself_is_refused() -> None:
    model = Reading(nnx.Rngs(0))
    params, targets = front.parameters(model), front.targets(model, IDS % 7)
    assert {target.path: target.read for target in targets} == {
        "table/embedding": True, "up/kernel": False,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"table/embedding .* the model uses it past"):
        init(params, LoRA(rank=2), targets)


def test_another_method_of_the_model_is_called() -> None:
    model, x = Dropping(nnx.Rngs(0)), draws(jnp.zeros((4, 8)), 1.0)
    params = front.parameters(model)
    (target,) = front.targets(model, x, method="encode")
    adapter = randomised(init(params, LoRA(rank=2), [target]))
    y = front.adapt(model)(params, adapter, x, method="encode")
    front.update(model, merge(params, adapter))
    np.testing.assert_allclose(y, model.encode(x), atol=1e-5)
