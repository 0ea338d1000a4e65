"""A kernel and its adapter in one product: the numbers of two products, in every model and method.

What multiplies is a plain product here; the kernel for GPUs has tests of its own, in test_hopper.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import Adapter, LoRA, LoRAMini, hardware, init, linen, select
from lora_mini_jax.algebra import hopper, joint
from lora_mini_jax.algebra.products import through
from lora_mini_jax.call import output
from lora_mini_jax.methods import DoRA, LoRAXS, MiSS, VeRA
from lora_mini_jax.models import Llama, LlamaConfig
from tests.gpus import pretend
from tests.test_products import CHAINS, IN, OUT, T, drawn

METHODS = [LoRA(4), LoRAMini(4, a=8, b=8), LoRAMini(4, a=8, b=8, outer="bfloat16"), MiSS(4),
           MiSS(4, mode="mini", mini_rank=2), VeRA(4), LoRAXS(4)]  # fmt: skip
CONFIG = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 16)))
KERNELS = 7 * CONFIG.num_hidden_layers


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """As on a device that has the kernel, for any shape; the shapes of what was multiplied."""
    seen: list[tuple[int, ...]] = []

    def product(x: Any, w: Any, h: Any, b: Any, turned: bool = False) -> Any:
        assert h.shape[1] in hopper.RANKS
        seen.append((*x.shape, *w.shape))
        return x @ w.T + h @ b.T if turned else x @ w + h @ b

    for module in (joint, output):
        monkeypatch.setattr(module, "takes_joint_products", lambda: True)
    monkeypatch.setattr(joint, "fits", lambda *_: True)
    monkeypatch.setattr(joint, "_sum", product)
    return seen


def close(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max())), got, want)  # fmt: skip


def two_products(x: Any, kernel: Any, chain: Any) -> Any:
    return x @ kernel + through(x, chain)


@pytest.mark.parametrize("shapes", [c for c in CHAINS.values() if len(c) > 1])
@pytest.mark.parametrize("trained", ["all", "inner", "none"])
def test_value_and_gradients_are_those_of_two_products(shapes: Any, trained: str, calls: Any):
    x, chain = drawn(shapes)
    kernel = drawn([(IN, OUT)])[1][0]
    which = {"all": range(len(chain)), "inner": range(1, len(chain)), "none": ()}[trained]

    def gradients(function: Callable) -> Any:
        def loss(x: Any, moving: dict[int, Any], kernel: Any) -> Any:
            own = [moving.get(i, each) for i, each in enumerate(chain)]
            return jnp.sin(function(x, kernel, own) / 100).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(x, {i: chain[i] for i in which}, kernel)

    close(jax.jit(lambda: gradients(joint.multiplied))(), gradients(two_products))
    assert calls == [(T, IN, IN, OUT), (T, OUT, IN, OUT)]


def test_a_frozen_kernel_keeps_the_narrow_input_alone(calls: Any):
    x, (a_aux, a, b, b_aux) = drawn(CHAINS["mini"])
    kernel = drawn([(IN, OUT)])[1][0]
    _, backward = jax.vjp(lambda t: joint.multiplied(x, kernel, [a_aux, *t, b_aux]), (a, b))
    kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert (T, a_aux.shape[1]) in kept
    assert (T, IN) not in kept


def adapted(method: Any, **how: Any) -> tuple[Callable, Any, Adapter]:
    """The loss of a Llama by its adapter, which is not at its start."""
    model = Llama(CONFIG, **how)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    adapter = init(params, method, select(linen.targets(model, params, TOKENS)))
    trained = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(
        leaf.shape), adapter.trainable)  # fmt: skip
    apply = linen.adapt(model)

    def loss(trained: Any, **more: Any) -> Any:
        return jnp.sin(apply(params, adapter.with_trainable(trained), TOKENS, **more)).sum()

    return loss, trained, adapter


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_layer_of_a_model_multiplies_once(method: Any, calls: Any, monkeypatch):
    loss, trained, _ = adapted(method)
    got = jax.jit(jax.value_and_grad(loss))(trained)
    # No gradient goes into what the first layer's query, key and value read.
    assert len(calls) >= 2 * KERNELS - 3
    monkeypatch.setattr(output, "takes_joint_products", lambda: False)
    close(got, jax.jit(jax.value_and_grad(lambda t: loss(t)))(trained))


@pytest.mark.parametrize("how", [{"scan_layers": True}, {"remat": "full"}, {"remat": "dots"}])
def test_scanned_and_recomputed_layers_too(how: Any, calls: Any, monkeypatch):
    loss, trained, _ = adapted(METHODS[1], **how)
    got = jax.jit(jax.value_and_grad(loss))(trained)
    assert calls
    monkeypatch.setattr(output, "takes_joint_products", lambda: False)
    close(got, jax.jit(jax.value_and_grad(lambda t: loss(t)))(trained))


def test_what_remat_keeps_has_the_joint_products_in_it(calls: Any):
    """Else a layer that keeps its products would multiply by its kernels once more."""
    loss, trained, _ = adapted(LoRA(4), remat="dots")
    text = str(jax.make_jaxpr(jax.grad(loss))(trained))
    assert text.count(f"name={joint.KEPT}") == KERNELS


def test_dropout_and_methods_of_another_form_take_two_products(calls: Any):
    loss, trained, _ = adapted(LoRA(4, dropout=0.5))
    jax.eval_shape(lambda t: loss(t, dropout_key=jax.random.key(0)), trained)
    assert not calls
    for method in (DoRA(4), LoRAMini(4, a=8, b=8, outer="recompute"), MiSS(4, mode="bat")):
        loss, trained, _ = adapted(method)
        jax.eval_shape(loss, trained)
        assert not calls


def test_a_layer_s_own_product_and_a_subclass_are_respected(calls: Any):
    def halved(*args: Any, **kw: Any) -> Any:
        return jax.lax.dot_general(*args, **kw) / 2

    class Doubled(nn.Dense):
        def __call__(self, inputs: Any) -> Any:
            return 2 * super().__call__(inputs)

    x = jnp.ones((4, 8))
    for layer, joined in ((nn.Dense(6, dot_general=halved), 0), (Doubled(6), 1)):
        params = layer.init(jax.random.key(0), x)["params"]
        adapter = init(params, LoRA(2), linen.targets(layer, params, x))
        adapter = adapter.with_trainable(jax.tree.map(jnp.ones_like, adapter.trainable))
        out = linen.adapt(layer)(params, adapter, x)
        scale, own = (2, 1) if joined else (1, 0.5)
        delta = 8 * x[:, :1] @ jnp.ones((1, 2)) @ jnp.ones((2, 6)) * 8
        close(out, scale * (own * (x @ params["kernel"]) + delta))
        assert len(calls) == joined


def test_it_has_to_be_asked_for(monkeypatch):
    pretend(monkeypatch, "9.0")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert not hardware.takes_joint_products()
    monkeypatch.setenv(hardware.JOINT, "1")
    assert hardware.takes_joint_products()
    with hardware.without_kernels():
        assert not hardware.takes_joint_products()
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not hardware.takes_joint_products()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    pretend(monkeypatch, "10.0")
    assert not hardware.takes_joint_products()
