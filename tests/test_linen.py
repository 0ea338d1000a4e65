"""Any user module, unchanged: the adapted call equals merged weights, or says why it cannot."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_mini_jax import (
    Adapter,
    LoRA,
    LoRAMini,
    TrainState,
    UserError,
    init,
    join,
    linen,
    make_train_step,
    merge,
    select,
    sharding,
)
from lora_mini_jax.methods import Full, MiSS
from lora_mini_jax.tree import Target, parameters
from tests.cases import cross_entropy, draws, random_params, randomised

METHOD = LoRA(rank=1, alpha=2.0)
X = draws(jnp.zeros((2, 3, 4)), 1.0)
IDS = jnp.array([[0, 3, 6], [2, 2, 1]])


def adapted(
    model: nn.Module, params: Any, *inputs: Any, method: Any = METHOD, **kw: Any
) -> Adapter:
    """An adapter of every kernel there is, as after training."""
    targets = linen.targets(model, params, *inputs, **kw)
    assert targets
    return randomised(init(params, method, targets), 0.5)


def agree(a: Any, b: Any, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)


def check(model: Any, *inputs: Any, paths: str | None = None, atol: float = 2e-5) -> None:
    """Adapted call == merged weights, on the kernels named (default: all targets there are)."""
    params = random_params(model, *inputs)
    adapter = adapted(model, params, *inputs)
    assert paths is None or sorted(adapter.trainable) == sorted(paths.split())
    y = linen.adapt(model)(params, adapter, *inputs)
    plain = model.apply({"params": params}, *inputs)
    assert y.dtype == plain.dtype
    assert y.shape == plain.shape
    wanted = model.apply({"params": merge(params, adapter)}, *inputs)
    agree(y, wanted, atol)
    assert jnp.abs(y - plain).max() > 0.1


class Wrap(nn.Module):
    """A model made of a function, so that a case is one line."""

    body: Any

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        return self.body(*inputs)


class Scaled(nn.Dense):
    """A user's layer that builds on Dense's own call."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 2 * super().__call__(inputs)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(nn.Dense(4)(x))


JitDense = nn.jit(nn.Dense)
JitBlock = nn.jit(Block)


def shared(x: jax.Array) -> jax.Array:
    layer = nn.Dense(4)
    return layer(jnp.tanh(layer(x)))


def tied(ids: jax.Array) -> jax.Array:
    table = nn.Embed(7, 4)
    return table.attend(jnp.tanh(table(ids)))


class Layer(nn.Module):
    """A body for nn.scan."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(nn.Dense(4)(x)), None


def scanned(x: jax.Array, **how: Any) -> jax.Array:
    return nn.scan(Layer, length=3, **how)()(x, None)[0]


MODULES = {
    "Dense": lambda x: nn.Dense(5)(x),
    "Dense without bias": lambda x: nn.Dense(5, use_bias=False)(x),
    "Dense called by keyword": lambda x: nn.Dense(5)(inputs=x),
    "Dense subclass that calls its parent": lambda x: Scaled(5)(x),
    "DenseGeneral, many features": lambda x: nn.DenseGeneral((2, 3))(x),
    "DenseGeneral, two axes": lambda x: nn.DenseGeneral(5, axis=(-2, -1))(x),
    "DenseGeneral, axes in another order": lambda x: nn.DenseGeneral(5, axis=(-1, -2))(x),
    "DenseGeneral, first axis": lambda x: nn.DenseGeneral(5, axis=1)(x),
    "DenseGeneral, batch axis": lambda x: nn.DenseGeneral((5,), axis=-1, batch_dims=(0,))(x),
    "DenseGeneral, batch and two axes": lambda x: nn.DenseGeneral(
        (2, 2), axis=(-2, -1), batch_dims=(0,)
    )(x),
    "Einsum": lambda x: nn.Einsum((4, 2, 3), "btd,dnh->btnh")(x),
    "Einsum, output moved": lambda x: nn.Einsum((4, 2, 3), "btd,dnh->nbth")(x),
    "Einsum, kernel transposed": lambda x: nn.Einsum((5, 4), "btd,kd->btk")(x),
    "Einsum, batch axis": lambda x: nn.Einsum((3, 4, 5), "btd,tdk->btk", use_bias=False)(x),
    "Einsum, two contracted": lambda x: nn.Einsum((3, 4, 5), "btd,tdk->bk")(x),
    "Einsum, ellipsis": lambda x: nn.Einsum((4, 5), "...d, dk -> ...k")(x),
    "Einsum, string at the call": lambda x: nn.Einsum((4, 5), None)(x, "btd,dk->btk"),
    "Einsum, string by keyword": lambda x: nn.Einsum((4, 5), None)(x, einsum_str="btd,dk->btk"),
    "attention": lambda x: nn.MultiHeadDotProductAttention(2)(x),
    "attention, called by keyword": lambda x: nn.MultiHeadDotProductAttention(2)(
        inputs_q=x, inputs_k=x
    ),
    "a layer shared by two calls": shared,
    "remat": lambda x: nn.remat(Block)()(x),
    "jit": lambda x: nn.jit(Block)()(x),
    "jit, two layers of one class": lambda x: JitDense(4)(JitDense(4)(x)),
    "jit, two blocks of one class": lambda x: JitBlock()(JitBlock()(x)),
    "scan": lambda x: scanned(x, variable_axes={"params": 0}, split_rngs={"params": True}),
    "scan, shared parameters": lambda x: scanned(
        x, variable_broadcast="params", split_rngs={"params": False}
    ),
    "vmap, split": lambda x: nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}
    )(5)(x),
    "vmap, shared": lambda x: nn.vmap(
        nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}
    )(5)(x),
}


@pytest.mark.parametrize("name", MODULES)
def test_adapted_call_equals_merged_weights(name: str):
    check(Wrap(MODULES[name]), X)


def test_two_jitted_layers_are_two_targets():
    model = Wrap(MODULES["jit, two layers of one class"])
    params = random_params(model, X)
    for _ in range(2):  # the second time jit has seen it before
        assert len(linen.targets(model, params, X)) == 2


def test_a_jitted_submodule_stays_adapted_when_called_again():
    model = Wrap(lambda x: JitBlock()(x))
    params = random_params(model, X)
    model.apply({"params": params}, X)
    target = Target("JitBlock_0/Dense_0/kernel", (4, 4))
    adapter = randomised(init(params, METHOD, [target]), 0.5)
    apply = linen.adapt(model)
    first, again = apply(params, adapter, X), apply(params, adapter, X)
    other = jax.jit(apply)(params, adapter, X)
    wanted = model.apply({"params": merge(params, adapter)}, X)
    for y in (first, again, other):
        agree(y, wanted)


def test_embedding_is_adapted_where_it_is_looked_up_and_attended():
    check(Wrap(lambda ids: nn.Embed(7, 4)(ids)), IDS)
    check(Wrap(tied), IDS, paths="Embed_0/embedding")
    check(Wrap(lambda ids: nn.Embed(7, 4)(inputs=ids)), IDS)


@pytest.mark.parametrize("name", ["Dense", "Einsum", "DenseGeneral, two axes"])
def test_bfloat16_computation_keeps_its_dtype(name: str):
    layers = {
        "Dense": lambda x: nn.Dense(5, dtype=jnp.bfloat16)(x),
        "Einsum": lambda x: nn.Einsum((4, 5), "btd,dk->btk", dtype=jnp.bfloat16)(x),
        "DenseGeneral, two axes": lambda x: nn.DenseGeneral(
            5, axis=(-2, -1), dtype=jnp.bfloat16
        )(x),
    }  # fmt: skip
    check(Wrap(layers[name]), X, atol=0.1)


def test_modules_defined_in_setup_have_their_own_names():
    class Two(nn.Module):
        def setup(self):
            self.layers = [nn.Dense(4), nn.Dense(4)]

        def __call__(self, x):
            return self.layers[1](jnp.tanh(self.layers[0](x)))

    check(Two(), X, paths="layers_0/kernel layers_1/kernel")


def test_other_collections_and_random_streams_pass_through():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(5)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    model, key = Net(), jax.random.key(3)
    variables = model.init(jax.random.key(0), X, False)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    keywords: dict[str, Any] = {"rngs": {"dropout": key}, "mutable": ["batch_stats"]}
    shown = linen.targets(model, params, X, False, variables=rest)
    assert [target.path for target in shown] == ["Dense_0/kernel"]
    adapter = randomised(init(params, METHOD, shown), 0.5)
    y, new = linen.adapt(model)(params, adapter, X, True, variables=rest, **keywords)
    whole = {"params": merge(params, adapter), **rest}
    wanted, stats = model.apply(whole, X, True, **keywords)
    agree(y, wanted)
    jax.tree.map(agree, new, stats)
    assert set(new) == {"batch_stats"}


@pytest.mark.parametrize("mutable", [True, "params", ["params", "batch_stats"]])
def test_parameters_come_back_as_they_were_given(mutable: Any):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=mutable == "params")(nn.Dense(5)(x))

    variables = Net().init(jax.random.key(0), X)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    targets = linen.targets(Net(), params, X, variables=rest, mutable=True)
    for method in (METHOD, Full()):
        adapter = randomised(init(params, method, targets), 0.5)
        y, new = linen.adapt(Net())(params, adapter, X, variables=rest, mutable=mutable)
        whole = {"params": merge(params, adapter), **rest}
        wanted, other = Net().apply(whole, X, mutable=mutable)
        agree(y, wanted)
        assert set(new) == set(other)
        jax.tree.map(agree, new, {**other, "params": params})


def test_another_method_of_the_model_can_be_called():
    class Net(nn.Module):
        def setup(self):
            self.inner = nn.Dense(5)

        def __call__(self, x):
            return self.encode(x).sum()

        def encode(self, x):
            return self.inner(x)

    model, params = Net(), random_params(Net(), X)
    adapter = adapted(model, params, X)
    y = linen.adapt(model)(params, adapter, X, method="encode")
    wanted = model.apply({"params": merge(params, adapter)}, X, method="encode")
    agree(y, wanted)


class MyDense(nn.Module):
    """A layer of the user's own, stored the other way round."""

    flipped: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (5, 4) if self.flipped else (4, 5)
        kernel = self.param("kernel", nn.initializers.normal(), shape)
        return x @ (kernel.T if self.flipped else kernel)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_layer_of_the_users_own_is_brought_in_with_a_rule(flipped: bool):
    model = Wrap(lambda x: MyDense(flipped, name="mine")(x))
    params = random_params(model, X)
    assert linen.targets(model, params, X) == ()
    rule = linen.transposed_dense if flipped else linen.dense
    rules: dict[type | str, linen.Rule] = {MyDense: rule}
    targets = linen.targets(model, params, X, rules=rules)
    assert [(t.path, t.n_in, t.n_out) for t in targets] == [("mine/kernel", 4, 5)]
    adapter = randomised(init(params, LoRAMini(rank=1, a=3, b=2), targets))
    y = linen.adapt(model, rules)(params, adapter, X)
    agree(y, model.apply({"params": merge(params, adapter)}, X))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


@pytest.mark.parametrize("own", [False, True], ids=["plain", "adapted"])
def test_a_model_applied_within_a_model_is_not_the_models(own: bool):
    """Its layers have the same names, and parameters and an adapter of their own."""
    inner, params = Inner(), random_params(Inner(), X)
    adapter = adapted(inner, params, X)

    def encoded(x: jax.Array) -> jax.Array:
        if own:
            return linen.adapt(inner)(params, adapter, x)
        return inner.apply({"params": params}, x)  # ty: ignore[invalid-explicit-return]

    check(Wrap(lambda x: nn.Dense(4)(encoded(x))), X, paths="Dense_0/kernel")


class Gated(nn.Dense):
    @nn.compact
    def __call__(self, x, gate):  # ty: ignore[incompatible-method-override]
        return super().__call__(x) * gate


def test_a_subclass_may_take_other_arguments_than_its_layer():
    check(Wrap(lambda x: Gated(5)(x, jnp.float32(0.5))), X, paths="Gated_0/kernel")


def test_names_with_slashes_stay_what_they_are():
    model = Wrap(lambda x: nn.Dense(5)(nn.WeightNorm(nn.Dense(4, name="normed"))(x)))
    params = random_params(model, X)
    assert "normed/kernel/scale" in params["WeightNorm_0"]
    targets = select(linen.targets(model, params, X), ["Dense_0/kernel"])
    adapter = randomised(init(params, METHOD, targets), 0.5)
    merged = merge(params, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    y = linen.adapt(model)(params, adapter, X)
    agree(y, model.apply({"params": merged}, X))


def test_inputs_may_all_be_given_by_name():
    mesh = sharding.make_mesh("data=2,tensor=-1")
    model, params = Inner(), random_params(Inner(), X)
    apply = linen.adapt(model, rows=sharding.of_batch(mesh))
    adapter = adapted(model, params, X)
    agree(apply(params, adapter, x=X), linen.adapt(model)(params, adapter, X))


def test_boxed_parameters_are_to_be_unboxed():
    boxed = {"Dense_0": {"kernel": nn.Partitioned(jnp.ones((4, 4)), ("in", "out"))}}
    with pytest.raises(UserError, match=r"Dense_0/kernel is a Partitioned.*unbox"):
        init(boxed, METHOD, [Target("Dense_0/kernel", (4, 4))])


def test_a_kernel_the_call_never_used_raises_and_is_named():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, both: bool):
            y = nn.Dense(4, name="always")(x)
            return nn.Dense(4, name="sometimes")(y) if both else y

    model = Two()
    params = model.init(jax.random.key(0), X, True)["params"]
    targets = [Target(f"{name}/kernel", (4, 4)) for name in ("always", "sometimes")]
    adapter = init(params, METHOD, targets)
    with pytest.raises(UserError, match=r"used 1 of 2 .* sometimes/kernel"):
        linen.adapt(model)(params, adapter, X, False)


def test_parameters_of_another_model_raise_listing_every_misfit():
    model, other = Wrap(lambda x: nn.Dense(5)(nn.Dense(4)(x))), Wrap(lambda x: nn.Dense(6)(x))
    params = random_params(model, X)
    adapter, wrong = adapted(model, params, X), random_params(other, X)
    for call in (
        lambda: linen.adapt(other)(wrong, adapter, X),
        lambda: merge(wrong, adapter),
        lambda: join(wrong, adapter),
        lambda: init(wrong, METHOD, [site.target for site in adapter.sites]),
    ):
        with pytest.raises(UserError) as caught:
            call()
        for part in ("Dense_0/kernel is (4, 6), not (4, 5)", "Dense_1/kernel is missing"):
            assert part in str(caught.value)


def test_parameters_stacked_along_another_axis_raise():
    model = Wrap(lambda x: nn.vmap(
        nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, axis_size=2
    )(5)(x))  # fmt: skip
    params = random_params(model, X)
    with pytest.raises(UserError, match="stacked along axis 0"):
        linen.targets(model, params, X)


def test_partitioned_parameters_say_what_to_do():
    boxed = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    model = nn.Dense(5, kernel_init=boxed)
    params = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(UserError, match="unbox"):
        linen.targets(model, params, X)
    with pytest.raises(UserError, match="unbox"):
        parameters(params, [])
    plain = nn.meta.unbox(params)
    assert linen.targets(model, plain, X)


PATHS = ("embed/embedding", "layers_0/q_proj/kernel", "layers_0/up/kernel", "lm_head/kernel")
TARGETS = tuple(
    Target(path, (6, 8), kind="embed" if "embed" in path else "linear") for path in PATHS
)


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ("all-linear", (), (1, 2)),
        ("q_proj|up", (), (1, 2)),
        (r"layers_\d+/up", (), (2,)),
        (["q_proj", "lm_head"], (), (1, 3)),
        (["q_pro", "q_proj"], (), None),
        (("layers_0/up",), (), (2,)),
        (".", "embed", (1, 2, 3)),
        (".", ["embed", "up"], (1, 3)),
        ("all-linear", ["q_proj"], (2,)),
        ("nothing", (), None),
        (".", "nothing", None),
        (".", ["up", "nothing"], None),
        ("up", "up", None),
        ("(", (), None),
        ([], (), None),
        ("", (), None),
    ],
)
def test_select_chooses_by_pattern_or_raises(include: Any, exclude: Any, chosen: Any):
    if chosen is not None:
        picked = [t.path for t in select(TARGETS, include, exclude)]
        assert picked == [PATHS[i] for i in chosen]
        return
    with pytest.raises(UserError):
        select(TARGETS, include, exclude)


def test_presets_know_heads_and_biases_by_whole_names():
    heads = ("lm_head", "head", "classifier", "score", "logits", "output_head")
    for name in heads:
        named = [Target(f"{path}/kernel", (6, 8)) for path in (name, f"{name}s", f"my_{name}ing")]
        assert select(named, "head-only") == tuple(named[:1])
        assert select(named) == tuple(named[1:])
    biases = Target("up/bias", (8,), ins=(), outs=(0,), kind="array"), Target("bias/kernel", (6, 8))
    assert select(biases, "bias-only") == biases[:1]


def test_a_pattern_that_matches_nothing_lists_the_kernels():
    with pytest.raises(UserError) as caught:
        select(TARGETS, ["q_proj", "qproj"])
    assert "'qproj'" in str(caught.value)
    assert "'q_proj'" not in str(caught.value)
    assert all(path in str(caught.value) for path in PATHS)


def test_a_model_without_a_known_layer_says_so():
    model = nn.Conv(4, (1,))
    targets = linen.targets(model, random_params(model, X), X)
    with pytest.raises(UserError, match="none of a known layer, or `rules`"):
        select(targets)


def test_overrides_change_the_kernels_they_name():
    params = {"up": {"kernel": jnp.ones((8, 6))}, "down": {"kernel": jnp.ones((6, 8))}}
    targets = [Target("up/kernel", (8, 6)), Target("down/kernel", (6, 8))]
    changed = {"rank": 3, "alpha": 1, "a": 5, "b": 4}
    adapter = init(params, LoRAMini(rank=1, a=2, b=2), targets, overrides={"down": changed})
    up, down = adapter.trainable["up/kernel"], adapter.trainable["down/kernel"]
    assert (up["A"].shape, up["B"].shape) == ((2, 1), (1, 2))
    assert (down["A"].shape, down["B"].shape) == ((5, 3), (3, 4))
    assert [site.method.alpha for site in adapter.sites] == [16.0, 1.0]  # ty: ignore
    for wrong in ({"nothing": {"rank": 1}}, {"up": {"width": 1}}, {"up": {"rank": 5, "a": 3}}):
        with pytest.raises(UserError):
            init(params, LoRAMini(rank=1, a=2, b=2), targets, overrides=wrong)


def test_a_rank_too_large_raises_listing_every_kernel():
    with pytest.raises(UserError) as caught:
        init({}, LoRA(rank=7), TARGETS)
    assert all(f"{path} (6 x 8)" in str(caught.value) for path in PATHS)


TOKENS = jnp.array([[5, 3, 8, 2], [7, 1, 1, 4]])
HERE = jnp.broadcast_to(jnp.arange(4), TOKENS.shape)


def gpt2(transformers: Any) -> tuple[Any, tuple, str]:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    module = transformers.FlaxGPT2LMHeadModel(config, _do_init=False).module
    return module, (TOKENS, jnp.ones_like(TOKENS), HERE), "c_attn|c_fc|c_proj"


def roberta(transformers: Any) -> tuple[Any, tuple, str]:
    config = transformers.RobertaConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=12, num_labels=11,
    )  # fmt: skip
    module = transformers.FlaxRobertaForTokenClassification(config, _do_init=False).module
    mask, zeros = jnp.ones_like(TOKENS), jnp.zeros_like(TOKENS)
    return module, (TOKENS, mask, zeros, HERE + 2, None), "query|value|dense"


@pytest.mark.parametrize("make", [gpt2, roberta])
def test_a_flax_model_of_transformers_is_adapted_as_it_is(make: Any):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        pytest.skip("this transformers has no Flax classes: 4.57.6 is the last that does")
    module, inputs, pattern = make(transformers)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"])
    params, calls = draws(shapes), linen.adapt(module)
    targets = select(linen.targets(module, params, *inputs), pattern)
    if make is gpt2:  # Conv1D keeps (out, in)
        wide = next(t for t in targets if "c_attn" in t.path)
        assert (wide.shape, wide.n_in, wide.n_out) == ((36, 12), 12, 36)
    adapter = init(params, LoRAMini(rank=2, a=8, b=8), targets)

    def apply(params: Any, adapter: Any) -> Any:
        return calls(params, adapter, *inputs, return_dict=False)[0]

    moved = randomised(adapter)
    merged = {"params": merge(params, moved)}
    plain = jax.jit(lambda v: module.apply(v, *inputs, return_dict=False)[0])
    wanted = plain(merged)
    agree(jax.jit(apply)(params, moved), wanted, 1e-4)
    assert jnp.abs(wanted - plain({"params": params})).max() > 0.01

    tx = optax.adam(1e-2)
    step = make_train_step(lambda p, a, b, key: cross_entropy(apply(p, a), b), tx)
    state, first = step(TrainState.create(adapter, tx), params, TOKENS)
    _, second = step(state, params, TOKENS)
    assert second.loss < first.loss


@pytest.mark.parametrize("method", [LoRA(rank=2), MiSS(rank=3)], ids=lambda method: method.name)
def test_rows_are_looked_up_by_numbers_of_any_kind(method: Any):
    model = nn.Embed(7, 5)
    params = random_params(model, IDS)
    adapter = adapted(model, params, IDS, method=method)
    merged = {"params": merge(params, adapter)}
    for ids in (jnp.array([[-1, -7], [6, 0]]), jnp.array([6, 5], jnp.uint8)):
        agree(linen.adapt(model)(params, adapter, ids), model.apply(merged, ids))


class Up(nn.Module):
    """A layer that can be scanned."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(nn.Dense(6)(x)), None


class Reads(nn.Module):
    """Scanned, recomputed and looped layers, and a head made of the table by hand."""

    by_hand: bool

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = nn.Embed(7, 6, name="table")
        over: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        x, _ = nn.scan(nn.remat(Up), **over)()(table(ids), None)
        again = nn.Dense(6, name="again")
        x = again(again(x))
        return x @ table.embedding.T if self.by_hand else table.attend(x)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_table_that_the_model_reads_itself_is_refused_but_where_it_is_trained_whole(by_hand):
    model = Reads(by_hand)
    params = random_params(model, IDS % 7)
    targets = linen.targets(model, params, IDS % 7)
    assert [target.path for target in targets if target.read] == ["table/embedding"] * by_hand
    assert len(targets) == 3
    method = Full() if by_hand else LoRA(rank=2)
    adapter = randomised(init(params, method, targets))
    merged = {"params": merge(params, adapter)}
    agree(linen.adapt(model)(params, adapter, IDS % 7), model.apply(merged, IDS % 7))
    if by_hand:
        with pytest.raises(UserError, match=r"table/embedding .* let the model call the layer"):
            init(params, LoRA(rank=2), targets)


class Norm(nn.Dense):
    """Built on a layer of Flax's, and reads its kernel."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs) / jnp.linalg.norm(self.variables["params"]["kernel"])


class Way(nn.Module):
    """A layer ``d``, called or read in some way; and numbers that are no arrays beside it."""

    way: str

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        scale = self.param("a_number", lambda key: 1.0)
        d = (Norm if self.way == "subclass" else nn.Dense)(4, name="d")
        y = d(x)

        def looped(x: jax.Array, once: Any) -> jax.Array:
            def body(state: Any) -> Any:
                return state[0] + 1, state[2], once(state[1]), state[3]

            start = jnp.int32(0), x, x, jnp.zeros(4)
            return jax.lax.while_loop(lambda state: state[0] < 3, body, start)[1]

        ways: Any = {
            "subclass": lambda: y,
            "jit and while": lambda: jax.jit(lambda x: looped(x, d))(x),
            "remat": lambda: jax.checkpoint(lambda x: looped(x, d))(x),
            "cond": lambda: jax.lax.cond(x.sum() > 0, lambda x: d(x), jnp.sin, x),
            "custom": lambda: jax.custom_gradient(lambda x: (d(x), lambda g: g))(x),
            "print": lambda: jax.debug.print("{}", d.variables["params"]["kernel"].sum()) or y,
            "read in a loop": lambda: looped(x, lambda x: x @ d.variables["params"]["kernel"]),
            "read in a branch": lambda: jax.lax.cond(
                x.sum() > 0, lambda x: x @ d.variables["params"]["kernel"], jnp.sin, x
            ),
        }
        return ways[self.way]() * scale


@pytest.mark.parametrize(("way", "read"), [
    ("subclass", True), ("jit and while", False), ("remat", False), ("cond", False),
    ("custom", False), ("print", False), ("read in a loop", True), ("read in a branch", True),
])  # fmt: skip
def test_what_a_model_reads_itself_is_told_through_transformations(way: str, read: bool):
    model, x = Way(way), draws(jnp.zeros((2, 4)))
    params = model.init(jax.random.key(0), x)["params"]
    (target,) = linen.targets(model, params, x)
    assert (target.path, target.read) == ("d/kernel", read)
    if not read:
        adapter = randomised(init(params, LoRA(rank=2), [target]))
        merged = model.apply({"params": merge(params, adapter)}, x)
        agree(linen.adapt(model)(params, adapter, x), merged)


def test_targets_are_found_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("x", None))
    with jax.set_mesh(mesh):
        model, x = Stacked(), jax.device_put(jnp.ones((8, 6)), rows)
        params = model.init(jax.random.key(0), jnp.ones((8, 6)))["params"]
        (target,) = linen.targets(model, params, x)
    assert target.shape == (2, 6, 6)


class Stacked(nn.Module):
    """Two layers in a scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        over: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        return nn.scan(Up, **over)()(x, None)[0]


def test_a_kernel_in_a_loop_is_not_taken_for_one_that_the_model_reads():
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            dense = nn.Dense(4)
            dense(x)

            def body(module: nn.Module, state: Any) -> Any:
                return module(state[0]), state[1] + 1

            return nn.while_loop(lambda module, s: s[1] < 3, body, dense, (x, 0))[0]

    model, x = Loop(), draws(jnp.zeros((2, 4)))
    params = random_params(model, x)
    (target,) = linen.targets(model, params, x)
    assert not target.read
