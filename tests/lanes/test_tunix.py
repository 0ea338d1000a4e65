"""Tunix's NNX models, adapted as they are."""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

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
    init,
    load,
    make_train_step,
    merge,
    save,
    select,
)
from lora_mini_jax import nnx as front
from lora_mini_jax.call.views import View
from tests.cases import draws, randomised
from tests.lanes import only_in

only_in("tunix")
pytest.importorskip("tunix")

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()
METHODS = {"lora-mini": LoRAMini(rank=2, a=6, b=6), "lora": LoRA(rank=2)}
VOCAB = 11
IDS = jnp.array([[5, 3, 8, 2, 9], [7, 6, 6, 4, 3]])
HERE = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
SEEN = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5))
CALL = (IDS, HERE, None, SEEN)
SIZES = {
    "num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8,
    "num_kv_heads": 2,
}  # fmt: skip
LIKE_LLAMA = {**SIZES, "vocab_size": VOCAB, "rope_theta": 10_000, "norm_eps": 1e-6}


class Case(NamedTuple):
    """A model of Tunix's with random parameters, and its own call, compiled."""

    model: Any
    params: Any
    plain: Callable[[Any], jax.Array]
    count: int  # of linear kernels that are not the head


def llama3() -> Any:
    home = import_module("tunix.models.llama3.model")
    return home.Llama3(home.ModelConfig(**LIKE_LLAMA), rngs=nnx.Rngs(0)), 2 * 7


def qwen2() -> Any:
    """Whole layers are computed again in the backward pass."""
    home = import_module("tunix.models.qwen2.model")
    config = home.ModelConfig(**LIKE_LLAMA, remat_config=home.RematConfig.DECODER)
    return home.Qwen2(config, rngs=nnx.Rngs(0)), 2 * 7


def qwen3() -> Any:
    """The head is the table; blocks are computed again in the backward pass."""
    home = import_module("tunix.models.qwen3.model")
    remat = home.RematConfig.BLOCK
    config = home.ModelConfig(**LIKE_LLAMA, use_tied_embedding=True, remat_config=remat)
    return home.Qwen3(config, rngs=nnx.Rngs(0)), 2 * 7


def gemma() -> Any:
    """Keys and values are one kernel, with an axis of two."""
    home = import_module("tunix.models.gemma.model")
    config = home.ModelConfig(
        **SIZES, num_embed=VOCAB, final_logit_softcap=None, use_post_attn_norm=False,
        use_post_ffw_norm=False, attention_types=[home.AttentionType.GLOBAL] * 2,
    )  # fmt: skip
    return home.Gemma(config, rngs=nnx.Rngs(0)), 2 * 6


def gemma3() -> Any:
    home = import_module("tunix.models.gemma3.model")
    sizes = {**SIZES, "num_embed": VOCAB, "sliding_window_size": 4}
    config = home.ModelConfig(**sizes, param_dtype=jnp.float32)
    return home.Gemma3(config, rngs=nnx.Rngs(0)), 2 * 6


@pytest.fixture(scope="module", params=[llama3, qwen2, qwen3, gemma, gemma3])
def case(request: Any) -> Case:
    model, count = request.param()
    params = draws(front.parameters(model))
    front.update(model, params)
    graph, state, _ = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def plain(params: Any) -> jax.Array:
        fresh = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
        front.update(fresh, params)
        return fresh(*CALL)[0]

    return Case(model, params, plain, count)


def differ(a: Any, b: Any) -> list[bool]:
    """Leaf by leaf."""
    return jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) != y).any()), a, b))


def test_the_default_choice_is_every_linear_kernel_but_the_head(case: Case) -> None:
    targets = select(front.targets(case.model, *CALL))
    assert len(targets) == case.count
    (out,) = (t for t in targets if t.path.startswith("layers/1/attn") and t.shape == (4, 8, 16))
    assert (out.n_in, out.n_out) == (32, 16)


@pytest.mark.parametrize("name", METHODS)
def test_adapted_call_equals_the_models_own_on_merged_weights(case: Case, name: str) -> None:
    targets = front.targets(case.model, *CALL)  # an untied head too
    adapter = randomised(init(case.params, METHODS[name], targets))
    y, _ = jax.jit(front.adapt(case.model))(case.params, adapter, *CALL)
    np.testing.assert_allclose(y, case.plain(merge(case.params, adapter)), rtol=1e-5, atol=1e-5)
    assert jnp.abs(y - case.plain(case.params)).max() > 0.01


@pytest.mark.parametrize("name", METHODS)
def test_training_changes_the_adapter_alone_and_it_is_saved(
    case: Case, name: str, tmp_path: Path
) -> None:
    apply = front.adapt(case.model)

    def cross_entropy(logits: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS).mean()

    tx = optax.adam(2e-2)
    step = make_train_step(lambda p, a, batch, key: cross_entropy(apply(p, a, *batch)[0]), tx)
    start = init(case.params, METHODS[name], select(front.targets(case.model, *CALL)))
    drawn, base = jax.tree.map(np.array, (start, case.params))
    state = TrainState.create(start, tx)
    for _ in range(20):
        state, _ = step(state, case.params, CALL)

    assert all(differ(state.adapter.trainable, drawn.trainable))
    assert not any(differ((state.adapter.frozen, case.params), (drawn.frozen, base)))
    merged = merge(case.params, state.adapter)
    assert cross_entropy(case.plain(merged)) < 0.95 * cross_entropy(case.plain(case.params))

    save(tmp_path / "adapter", state.adapter, case.params)
    again = load(tmp_path / "adapter", case.params)
    jax.tree.map(np.testing.assert_array_equal, again, state.adapter)
    front.update(case.model, merged)
    jax.tree.map(np.testing.assert_array_equal, front.parameters(case.model), merged)
    front.update(case.model, case.params)


def table(module: Any, method: str, args: tuple) -> View | None:
    """The rule of Qwen3's table, which is looked up, and the head where it is tied."""
    use = {"encode": "rows", "decode": "transposed"}.get(method)
    return View(args[0], leaf="input_embedding", use=use, kind="embed") if use else None


def test_a_tied_table_is_adapted_in_both_places_by_a_rule() -> None:
    model, _ = qwen3()
    rules = {type(model.embedder): table}
    targets = select(front.targets(model, *CALL, rules=rules), ["embedder"])
    params = draws(front.parameters(model))
    adapter = randomised(init(params, METHODS["lora"], targets))
    y, _ = jax.jit(front.adapt(model, rules))(params, adapter, *CALL)
    front.update(model, merge(params, adapter))
    np.testing.assert_allclose(y, model(*CALL)[0], rtol=1e-5, atol=1e-5)


def test_the_example_in_the_docs_runs(monkeypatch: Any) -> None:
    (example,) = re.findall(r"```python tunix\n(.*?)```", PAGE, re.S)
    names: dict = {}
    exec(example, names)
    logits, _ = names["model"](*names["call"])
    np.testing.assert_allclose(logits, names["logits"], rtol=1e-5, atol=1e-5)
